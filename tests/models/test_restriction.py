"""What restrict_to does not name stays as it is, to the bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

import distsampler as ds
from distsampler import recipe
from distsampler.chains.chain import Chain
from distsampler.errors import ConfigError, StoreError
from distsampler.models.replica import ChainSpec, Replica
from distsampler.references import Mask
from distsampler.sampling.prepare import prepare
from tests.problems import anchored, config, regression, squared_error

ALL = {"0.weight", "0.bias", "2.weight", "2.bias"}
HALF = torch.arange(15).reshape(3, 5) % 2 == 0


class Net(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))


def spec(restrict_to: Any, **fields: Any) -> ChainSpec:
    return prepare(Net(), regression()[1], squared_error, config(restrict_to=restrict_to, **fields))


def moved(recipe: ChainSpec, draws: int = 5) -> dict[str, Tensor]:
    """Which entries of each parameter differ from w* after some draws."""
    walker = Chain(recipe, 0, anchored(recipe))
    walker.advance(draws)
    before = dict(recipe.model.named_parameters())
    after = walker.replica.model.named_parameters()
    return {name: p.detach() != before[name].detach() for name, p in after}


@pytest.mark.parametrize(
    ("restriction", "names"),
    [
        ("0.weight", {"0.weight"}),
        (r"2\..*", {"2.weight", "2.bias"}),
        (("0.bias", "2.bias"), {"0.bias", "2.bias"}),
        ({"2.weight": torch.ones(1, 3, dtype=torch.bool)}, {"2.weight"}),
        (None, ALL),
    ],
)
def test_a_chain_restricted_to_a_layer_moves_that_layer_only(
    restriction: Any, names: set[str]
) -> None:
    for name, entries in moved(spec(restriction)).items():
        assert bool(entries.all()) == (name in names), name
        assert bool(entries.any()) == (name in names), name


@pytest.mark.parametrize(
    "sampler", ["sgld", "lmsgld", "rmsprop_sgld", "adam_sgld", "sghmc", "sgnht"]
)
def test_a_masked_entry_keeps_its_bits_under_every_sampler(sampler: str) -> None:
    masks = {"0.weight": HALF, "2.bias": [True], "2.weight": np.zeros((1, 3), bool)}
    options = ds.SamplerConfig(name=sampler, lr=1e-4, localization=10.0)
    found = moved(spec(masks, sampler=options))
    assert torch.equal(found["0.weight"], HALF)
    assert found["2.bias"].all()
    assert not found["2.weight"].any()
    assert not found["0.bias"].any()


def test_a_corrected_chain_is_masked_too() -> None:
    hot = ds.SamplerConfig(lr=1e-4, localization=10.0, correct_heat=True)
    assert torch.equal(moved(spec({"0.weight": HALF}, sampler=hot))["0.weight"], HALF)


def test_a_mask_of_all_is_no_mask_to_the_bit() -> None:
    full = {name: torch.ones_like(p, dtype=torch.bool) for name, p in Net().named_parameters()}
    blocks = []
    for restriction in (None, full):
        recipe = spec(restriction)
        assert Replica(recipe, torch.device("cpu")).masks is None
        blocks.append(Chain(recipe, 0, anchored(recipe)).advance(6))
    for name, values in blocks[0].values.items():
        assert np.array_equal(values, blocks[1].values[name]), name


def test_a_masked_chain_that_is_restored_goes_on_to_the_bit() -> None:
    recipe = spec({"0.weight": HALF})
    found = anchored(recipe)
    first, other = Chain(recipe, 0, found), Chain(recipe, 0, found)
    other.restore(first.advance(7).state)
    one, two = first.advance(5), other.advance(5)
    assert one.state == two.state
    assert all(np.array_equal(one.values[name], two.values[name]) for name in one.values)


def test_weights_are_projected_where_they_move() -> None:
    recipe = prepare(
        nn.Linear(5, 2000),
        regression()[1],
        lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1),
        config(restrict_to={"weight": torch.arange(10_000).reshape(2000, 5) == 77}),
    )
    values = Chain(recipe, 0, anchored(recipe)).advance(4).values["weight_projections"]
    assert np.all(values != 0)


def test_a_mask_lies_as_its_parameter_does() -> None:
    """Channels-last memory: the flat tensor keeps it, so the mask must too."""
    model = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    mask = torch.rand(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    images = torch.randn(64, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    recipe = prepare(
        model,
        images,
        lambda net, batch: net(batch).square().sum((1, 2, 3)),
        config(restrict_to={"weight": mask}),
    )
    walker = Chain(recipe, 0, anchored(recipe))
    walker.advance(3)
    weight = dict(walker.replica.model.named_parameters())["weight"]
    assert not weight.is_contiguous()
    assert torch.equal(weight.detach() != model.weight.detach(), mask)


@pytest.mark.parametrize(
    ("masks", "sentence"),
    [
        ({"0.wieght": HALF}, "did you mean '0.weight'"),
        ({"0.weight": HALF.T}, "0.weight: a mask must have its parameter's shape (3, 5), got"),
        ({"0.weight": HALF.int()}, "0.weight: a mask must hold booleans, got int32"),
        ({"0.weight": [[True], [True, False]]}, "0.weight: a mask must be rectangular"),
        ({"0.weight": HALF & False}, "masks without a single True"),
        ({}, "masks without a single True"),
        (3, "names or regular expressions of parameters, components, or masks by name, got 3"),
        ({"0.weight": str(Mask.of(HALF))}, "give the masks again"),
    ],
)  # fmt: skip
def test_a_wrong_mask_is_named(masks: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        spec(masks)
    assert sentence in str(caught.value)


def test_the_manifest_holds_digests_and_a_run_goes_on_with_the_same_masks_only(
    tmp_path: Path,
) -> None:
    def sample(mask: Tensor) -> ds.Run:
        return ds.sample(
            Net(), regression()[1], squared_error, config(restrict_to={"0.weight": mask}, draws=3),
            store=tmp_path / "run", pool=ds.SerialPool(), resume="auto", quiet=True,
        )  # fmt: skip

    sample(HALF)
    stored = ds.open(tmp_path / "run").manifest.config.restrict_to
    assert isinstance(stored, dict)
    assert stored["0.weight"] == Mask.of(HALF)
    assert stored["0.weight"].entries is None
    assert len((tmp_path / "run/run.json").read_text()) < 5000
    sample(HALF.clone())
    with pytest.raises(StoreError, match=r"config.restrict_to: stored .*8 of 15 entries.*7 of 15"):
        sample(~HALF)


def test_equal_counts_do_not_make_masks_equal() -> None:
    one, other = torch.tensor([True, False]), torch.tensor([False, True])
    assert Mask.of(one) != Mask.of(other)
    assert Mask.of(one) != Mask.of(one[:, None])
    assert Mask.of(one) == Mask.of([True, False]) == Mask.of(one.numpy())


def test_masks_can_be_written_in_yaml() -> None:
    fields = yaml.safe_load("restrict_to: {0.bias: [true, false, true]}")
    assert moved(spec(fields["restrict_to"]))["0.bias"].tolist() == [True, False, True]


def test_a_yaml_file_can_name_a_file_of_masks(tmp_path: Path) -> None:
    np.savez(tmp_path / "half.npz", **{"0.weight": HALF.numpy()})
    fields = {part: f"tests.user_code:{part}" for part in ("model", "data", "loss")}
    for name in ("half.npz", "none.npz"):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({**fields, "restrict_to": name}))
        if name == "half.npz":
            found = recipe.load(tmp_path / "run.yaml").config.restrict_to
            assert found == {"0.weight": Mask.of(HALF)}
    with pytest.raises(ConfigError, match=r"none.npz must be a file of numpy.savez"):
        recipe.load(tmp_path / "run.yaml")

"""What is restricted to components moves them alone: from Python, from a file, in a sweep."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from typer.testing import CliRunner

import distsampler as ds
from distsampler.cli import app
from distsampler.errors import ConfigError
from distsampler.models.restriction import digest_of_components, selected
from distsampler.recipe import load
from distsampler.sampling.prepare import prepare
from distsampler.sampling.sample import sample_recipe
from tests.models.transformers_by_type import small_llama, token_losses, tokens
from tests.problems import config

UNION = "l0h1+l1.mlp"


def entries_that_moved(run: ds.Run) -> dict[str, Tensor]:
    """Which entries of each parameter ever differed from w*."""
    before = dict(small_llama().named_parameters())
    moved = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in before.items()}
    for key, values in run.wide.items():
        name = key.removeprefix("weights/")
        if name in before:
            draws = torch.from_numpy(np.asarray(values))
            moved[name] = (draws != before[name].detach()).flatten(0, 1).any(0)
    return moved


def expected_to_move(names: str) -> dict[str, Tensor]:
    parts = ds.components(small_llama())
    moving = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in small_llama().named_parameters()}
    for name in names.split("+"):
        for parameter, mask in parts[name].masks.items():
            moving[parameter] |= mask
    return moving


def short(**fields: Any) -> ds.RunConfig:
    return config(**{"draws": 4, "burn_in": 1, "save_weights_every": 1, **fields})


@pytest.mark.filterwarnings("ignore::distsampler.errors.NotConvergedWarning")
@pytest.mark.parametrize("names", ["l0h1", UNION, "l1g0+model.norm.weight"])
def test_what_is_in_no_named_component_keeps_its_bits(names: str, tmp_path: Path) -> None:
    listed, restriction = names, names
    if "norm" in names:  # a parameter by its name, beside a component
        restriction = names.split("+")  # type: ignore[assignment]
        listed = names.replace("model.norm.weight", "other")
    run = ds.sample(
        small_llama(), tokens(40), token_losses, short(restrict_to=restriction),
        store=tmp_path / "run", pool=ds.SerialPool(), quiet=True,
    )  # fmt: skip
    moved, expected = entries_that_moved(run), expected_to_move(listed)
    assert all(torch.equal(moved[name], expected[name]) for name in expected)


FILE = {
    "model": "tests.models.transformers_by_type:small_llama",
    "data": "tests.models.transformers_by_type:tokens",
    "data_kwargs": {"rows": 40},
    "loss": "tests.models.transformers_by_type:token_losses",
}


@pytest.mark.filterwarnings("ignore::distsampler.errors.NotConvergedWarning")
def test_a_run_from_yaml_goes_on_with_the_same_components_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = short(restrict_to=UNION).model_dump(mode="json", exclude_unset=True)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(FILE | fields))
    store, pool = str(tmp_path / "run"), ds.SerialPool()
    recipe = load(tmp_path / "run.yaml")
    run = sample_recipe(recipe, store, pool, "never", quiet=True)
    moved, expected = entries_that_moved(run), expected_to_move(UNION)
    assert all(torch.equal(moved[name], expected[name]) for name in expected)
    marks = run.manifest.fingerprint["components"]
    longer = load(tmp_path / "run.yaml", ["draws=6"])
    again = sample_recipe(longer, store, pool, "must", quiet=True)
    assert again.manifest.fingerprint["components"] == marks
    assert again.manifest.config.draws == 6
    monkeypatch.setattr("distsampler.sampling.fingerprint.digest_of_components", lambda *_: "moved")
    with pytest.raises(ds.StoreError, match=r"components: stored .* now 'moved'"):
        sample_recipe(longer, store, pool, "must", quiet=True)


@pytest.mark.filterwarnings("ignore::distsampler.errors.NotConvergedWarning")
def test_a_sweep_has_a_cell_for_each_head(tmp_path: Path) -> None:
    done = ds.sweep(
        small_llama(), tokens(40), token_losses, short(),
        restrictions={head: head for head in ("l0h0", "l1h3")},
        store=tmp_path / "sweep", pool=ds.SerialPool(), quiet=True,
    )  # fmt: skip
    for cell in done.manifest.grid.cells:
        moved = entries_that_moved(done.run(cell.name))
        expected = expected_to_move(cell.restriction)
        assert all(torch.equal(moved[name], expected[name]) for name in expected)


def test_only_runs_that_name_components_have_their_digest() -> None:
    model = small_llama()
    for restriction in (
        None,
        "model.norm.weight",
        r"lm_head\..*",
        {"model.norm.weight": [True] * 32},
    ):
        assert digest_of_components(model, config(restrict_to=restriction)) is None
    one, other, union = (
        digest_of_components(model, config(restrict_to=each))
        for each in ("l0h0", "l0h1", "l0h0+l0h1")
    )
    assert len({one, other, union}) == 3


@pytest.mark.parametrize(
    ("restriction", "sentence"),
    [
        ("l0h9", "unknown component 'l0h9': did you mean 'l0h3'"),
        ("l0h1+l1.mpl", "unknown component 'l1.mpl': did you mean 'l1.mlp'"),
        ("l7", "unknown component 'l7'"),
        ("l0.h1", "unknown component 'l0.h1'"),
        (
            "heads",
            "or name a component such as l0h1 or l0.mlp, which ds.components(model) lists: unknown pattern 'heads'",
        ),
    ],
)
def test_an_unknown_component_is_told_its_neighbours(restriction: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        selected(small_llama(), config(restrict_to=restriction))
    assert sentence in str(caught.value)


def test_a_sampler_without_masks_takes_whole_layers_and_no_heads() -> None:
    plain = ds.SamplerConfig(name="tests.models.transformers_by_type:PlainSGD", lr=1e-3)
    prepare(small_llama(), tokens(40), token_losses, config(sampler=plain, restrict_to="l0.mlp"))
    with pytest.raises(ConfigError, match="as a head, is a mask too"):
        prepare(small_llama(), tokens(40), token_losses, config(sampler=plain, restrict_to="l0h1"))


def test_the_command_previews_what_can_be_restricted_to(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump({"model": FILE["model"]}))  # neither data nor loss
    listed = CliRunner().invoke(app, ["components", str(path), "--json"])
    assert listed.exit_code == 0, listed.output
    components = json.loads(listed.stdout)["components"]
    parts = ds.components(small_llama())
    assert components == [each.as_dict() for each in parts.values()]
    text = CliRunner().invoke(app, ["components", str(path)])
    assert text.stdout.strip() == str(parts).strip()
    assert "l0h0 .. l0h3" in text.stdout

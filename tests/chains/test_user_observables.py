"""Users' own observables: measured where the draw is; small ones travel, large ones are wide."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import distsampler as ds
from distsampler import recipe
from distsampler.errors import StoreError
from tests.assertions import digest
from tests.fakes import FlakyPool
from tests.problems import config, mean_squared_error, regression, squared_error


def size(model: nn.Module, batch: Any) -> Tensor:
    return sum(p.square().sum() for p in model.parameters())  # type: ignore[return-value]


def three(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0])[:3, 0]


def table(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0])[:10, 0].view(2, 5).double()


def per_token(model: nn.Module, batch: Any) -> Tensor:
    """As if an example were a sequence of four tokens."""
    losses = squared_error(model, batch)
    return losses[:, None] * torch.arange(1.0, 5.0)


OWN = {"size": size, "three": three, "table": table, "token_losses": per_token}


def sample(store: Path | str, pool: Any = None, block: int = 7, **fields: Any) -> ds.Run:
    model, data = regression()
    loss, resume = fields.pop("loss", squared_error), fields.pop("resume", "never")
    placement = ds.PlacementConfig(block=block)
    settings = config(**{"observables": OWN, "placement": placement, **fields})
    return ds.sample(
        model, data, loss, settings, store=store, pool=pool or ds.SerialPool(), resume=resume,
        quiet=True,
    )  # fmt: skip


@pytest.mark.parametrize("pack", [1, 2])
def test_each_is_what_it_gives_at_the_weights_of_the_draw(tmp_path: Path, pack: int) -> None:
    run = sample(tmp_path / "run", save_losses=True, save_weights_every=1, pack=pack)
    model, (x, y) = regression()
    rows = torch.tensor(run.losses["example"].values)
    batch = (x[rows], y[rows])
    assert run.posterior["three"].dims == ("chain", "draw", "three_dim_0")
    assert run.posterior["table"].sizes == {
        "chain": 2,
        "draw": 40,
        "table_dim_0": 2,
        "table_dim_1": 5,
    }
    assert set(run.wide) == {"losses", "weights/weight", "token_losses"}
    tokens = run.wide["token_losses"]
    assert tokens.sizes == {
        "chain": 2,
        "draw": 40,
        "token_losses_dim_0": 32,
        "token_losses_dim_1": 4,
    }
    for chain, draw in [(0, 0), (1, 17), (0, 39)]:
        with torch.no_grad():
            model.weight.copy_(torch.from_numpy(run.weights["weight"][chain, draw].values))
            for name in ("size", "three", "table"):
                expected = OWN[name](model, batch).double().numpy()
                assert np.array_equal(run.posterior[name][chain, draw], expected), name
            assert np.array_equal(tokens[chain, draw], per_token(model, batch))


def test_they_change_no_other_bit_and_depend_on_no_block_and_no_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distsampler.execution.driver.random.uniform", lambda a, b: 0.0)
    own, bare = sample(tmp_path / "own"), sample(tmp_path / "bare", observables={})
    for name in bare.posterior:
        assert np.array_equal(bare.posterior[name], own.posterior[name]), name
    died = sample(tmp_path / "died", FlakyPool(2, deaths=(3, 6, 7)), block=4)
    assert digest(died) == digest(own)
    assert died.wide["token_losses"].identical(own.wide["token_losses"])


def worst(model: nn.Module, batch: Any, losses: Tensor) -> Tensor:
    return torch.stack([losses.max(), squared_error(model, batch).max()])


def scaled(model: nn.Module, batch: Any, factor: float = 2.0) -> Tensor:
    return factor * squared_error(model, batch).max()


def test_one_that_asks_for_the_losses_of_the_probe_gets_them(tmp_path: Path) -> None:
    own = {"worst": worst, "scaled": scaled}
    run = sample(tmp_path / "run", draws=10, observables=own, save_losses=True)
    handed, computed = run.posterior["worst"].values[..., 0], run.posterior["worst"].values[..., 1]
    assert np.array_equal(handed, computed)
    assert np.array_equal(handed.astype(np.float32), run.losses.max("example").values)
    assert np.array_equal(run.posterior["scaled"].values, 2 * computed)


def noisy(model: nn.Module, batch: Any) -> Tensor:
    return torch.randn(2) + size(model, batch)


def sloped(model: nn.Module, batch: Any) -> Tensor:
    with torch.enable_grad():
        loss = squared_error(model, batch).mean()
        (slope,) = torch.autograd.grad(loss, list(model.parameters()))
    return slope.norm()


def test_what_they_draw_at_random_is_seeded_and_gradients_may_be_asked_for(tmp_path: Path) -> None:
    own = {"noisy": noisy, "sloped": sloped}
    torch.manual_seed(1)
    regression()  # it draws too
    before = torch.get_rng_state()
    torch.manual_seed(1)
    one = sample(tmp_path / "one", observables=own)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    other = sample(tmp_path / "other", block=3, observables=own, pack=1)
    assert digest(one) == digest(other)
    assert float(one.posterior["noisy"].diff("draw").std()) > 1.0
    assert float(one.posterior["sloped"].min()) > 0
    packed = sample(tmp_path / "packed", observables=own, pack=2)
    bare = sample(tmp_path / "bare", observables={}, pack=2)
    assert np.array_equal(packed.posterior["loss"], bare.posterior["loss"])


def test_the_probe_comes_whole_where_the_loss_gives_means(tmp_path: Path) -> None:
    run = sample(tmp_path / "run", loss=mean_squared_error)
    assert run.wide["token_losses"].sizes["token_losses_dim_0"] == 32


def test_a_config_with_functions_survives_json_and_names_what_it_holds() -> None:
    settings = config(observables=OWN)
    text = settings.model_dump_json()
    names = json.loads(text)["observables"]
    assert names["size"] == "tests.chains.test_user_observables:size"
    assert ds.RunConfig(**json.loads(text)) == settings
    bound = config(observables={"x": functools.partial(three, batch=(1,))}).observables["x"]
    assert str(bound) == "tests.chains.test_user_observables:three(batch=(1,))"


def test_a_run_is_continued_by_the_names_that_its_store_holds(tmp_path: Path) -> None:
    sample(tmp_path / "run", draws=20)
    model, data = regression()
    longer = ds.resume(
        tmp_path / "run", model, data, squared_error, draws=40, pool=ds.SerialPool(), quiet=True
    )
    assert digest(longer) == digest(sample(tmp_path / "whole"))


def test_another_function_of_the_same_name_is_refused(tmp_path: Path) -> None:
    sample(tmp_path / "run", draws=20)

    def other(model: nn.Module, batch: Any) -> Tensor:
        return size(model, batch) + 1

    other.__module__, other.__qualname__ = size.__module__, size.__qualname__
    with pytest.raises(StoreError, match=r"observables\.size: stored 'size, \w+', now 'size, \w+'"):
        sample(tmp_path / "run", observables={**OWN, "size": other}, resume="must")
    with pytest.raises(StoreError, match=r"config\.observables: stored"):
        sample(tmp_path / "run", observables={}, resume="must")


class Late:
    """An observable that does something else after a while."""

    def __init__(self, then: Callable[[Tensor], Any]) -> None:
        self.then, self.calls = then, 0

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        self.calls += 1
        value = three(model, batch)
        return value if self.calls < 5 else self.then(value)


def steps(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    return torch.zeros(())


def leaves_a_gradient(model: nn.Module, batch: Any) -> Tensor:
    with torch.enable_grad():
        squared_error(model, batch).mean().backward()
    return torch.zeros(())


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("raises", {"x": lambda m, b: b[7]}, r"observables\.x: <lambda>\(model, batch\) must work on the probe.*IndexError"),
    ("no tensor", {"x": lambda m, b: 3.0}, "must return a tensor of real numbers, got float"),
    ("complex", {"x": lambda m, b: torch.zeros(2, dtype=torch.complex64)}, "real numbers, got torch.complex64"),
    ("not finite", {"x": lambda m, b: torch.tensor([0.0, float("nan")])}, r"must be finite at w\*: got nan at \(1,\)"),
    ("too large for float32", {"x": lambda m, b: torch.full((65,), 1e39, dtype=torch.float64)}, "must be finite at"),
    ("a readout's name", {"probe_loss": size}, "'probe_loss' is taken"),
    ("a dimension's name", {"projection": size}, "'projection' is taken"),
    ("a wide name", {"losses": size}, "'losses' is taken"),
    ("no identifier", {"a b": size}, "must be an identifier, got 'a b'"),
    ("no function", {"x": 3}, r"observables\.x: must be a function, or 'module:callable', got 3"),
    ("no colon", {"x": "size"}, r"observables\.x: must be 'module:callable'"),
    ("not importable", {"x": "no_such_module:f"}, r"observables\.x: 'no_such_module:f' cannot be imported"),
    ("moves the model", {"x": steps}, "must leave the model as it is"),
    ("leaves a gradient", {"x": leaves_a_gradient}, "use torch.autograd.grad, not backward"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("own", "sentence"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES]
)
def test_a_mistake_is_told_before_anything_is_written(
    tmp_path: Path, own: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ds.ConfigError, match=sentence):
        sample(tmp_path / "run", observables=own)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("then", "sentence"),
    [
        (lambda v: v[:2], r"observable 'x' of chain \d at draw \d must have the shape.*\(3,\): got \(2,\)"),
        (lambda v: 3, "must have the shape .*: got int"),
        (lambda v: v.fail(), r"observable 'x' of chain \d at draw \d raised AttributeError"),
        (lambda v: v / 0.0, "x is not finite"),
    ],
)  # fmt: skip
def test_a_mistake_that_shows_later_is_named_with_chain_and_draw(
    tmp_path: Path, then: Callable[[Tensor], Any], sentence: str
) -> None:
    with pytest.raises(ds.RunFailed, match=sentence):
        sample(tmp_path / "run", observables={"x": Late(then)})


def test_a_file_beside_the_yaml_names_them(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def norm(model, batch):\n    return model.weight.norm()\n")
    code = Path(__file__).parents[1] / "user_code.py"
    parts = "".join(f"{part}: '{code}:{part}'\n" for part in ("model", "data", "loss"))
    (tmp_path / "config.yaml").write_text(parts + "observables: {norm: 'own.py:norm'}\n")
    found = recipe.load(tmp_path / "config.yaml")
    assert found.config.observables["norm"].name == "own.py:norm"
    assert found.config.observables["norm"].function is not None
    (tmp_path / "other").mkdir()
    recipe.write(found, tmp_path / "other/config.yaml")
    again = recipe.load(tmp_path / "other/config.yaml")
    assert again.config.observables["norm"].name == f"{tmp_path}/own.py:norm"
    assert recipe.reload(found.record, found.config).config == found.config

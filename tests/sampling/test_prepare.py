"""What is seen of model, loss and data before a run is acted on: the right number, or a refusal."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import distsampler as ds
from distsampler.errors import ConfigError
from tests.assertions import assert_mean, assert_same
from tests.problems import config, regression, squared_error

MODEL, DATA = regression()


def sample(model: nn.Module, loss: Any, data: Any = DATA, **fields: Any) -> ds.Run:
    given = {name: fields.pop(name) for name in ("store", "resume", "pool") if name in fields}
    settings = {"pool": ds.SerialPool(), **given}
    few = {"draws": 12, "burn_in": 3, "divergence_factor": None, **fields}
    return ds.sample(model, data, loss, config(**few), quiet=True, **settings)


class Keeping(nn.Module):
    """Multiplies with a sum over its weights: kept at its first call, or computed at each."""

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.inner, self.keeps, self.kept = regression()[0], keeps, None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None or not self.keeps:
            self.kept: Any = self.inner.weight.detach().sum()
        return torch.as_tensor(self.inner(x) * self.kept)


class Following(nn.Module):
    """Subtracts a mean that follows its inputs, in every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = regression()[0]
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x - self.mean)
        self.mean: Tensor = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return torch.as_tensor(out)


def contrasted(model: nn.Module, batch: Any) -> Tensor:
    out = model(batch[0])
    return F.cross_entropy(-(out - batch[1].T).square(), torch.arange(len(out)), reduction="none")


def weighted(model: nn.Module, batch: Any) -> Tensor:
    losses, weights = squared_error(model, batch), 1 + batch[0][:, 0].abs()
    return (weights * losses).sum() / weights.sum()


def test_the_sum_of_the_losses_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"their sum: rows 0 and 1 have .* use reduction='none'"):
        sample(MODEL, lambda m, b: squared_error(m, b).sum(), store=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:a forward pass")
def test_what_a_model_keeps_of_its_first_weights_is_forgotten() -> None:
    fields: dict[str, Any] = {"sampler": ds.SamplerConfig(lr=1e-6)}
    kept, computed = (sample(Keeping(keeps), squared_error, **fields) for keeps in (True, False))
    assert_same(kept, computed)
    assert kept.posterior.distance.values.max() > 0.01, "the weights moved"


@pytest.mark.filterwarnings("ignore:a forward pass")
@pytest.mark.parametrize("model", [Keeping(True), Following()], ids=["attribute", "buffer"])
def test_bits_do_not_depend_on_how_a_run_was_cut(model: nn.Module) -> None:
    fields: dict[str, Any] = {"sampler": ds.SamplerConfig(lr=1e-6)}
    cut = sample(model, squared_error, placement=ds.PlacementConfig(block=2), **fields)
    assert_same(sample(model, squared_error, **fields), cut)


@pytest.mark.filterwarnings("ignore:the loss of a")
@pytest.mark.parametrize("loss", [contrasted, weighted])
def test_where_examples_touch_each_other_w_star_is_measured_in_the_same_batch(loss: Any) -> None:
    run = sample(MODEL, loss, sampler=ds.SamplerConfig(lr=1e-30))
    losses, excess = run.posterior.loss.values, run.posterior.excess_loss.values
    assert np.ptp(losses) > 0.1, "batches differ"
    assert float(np.abs(excess).max()) < 1e-6
    assert any("the LLC is that of" in note for note in run.advisories)


def test_a_gradient_within_the_loss_needs_no_word_of_the_user() -> None:
    def penalised(model: nn.Module, batch: Any) -> Tensor:
        x = batch[0].detach().requires_grad_()
        out = torch.tanh(model(x))
        (slopes,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return (out - batch[1]).square().sum(1) + slopes.square().sum(1)

    def careful(model: nn.Module, batch: Any) -> Tensor:
        with torch.enable_grad():
            return penalised(model, batch)

    assert_same(sample(MODEL, penalised), sample(MODEL, careful))


def test_weights_tied_as_one_parameter_have_the_llc_of_what_is_free() -> None:
    """The tied model is a regression with four weights: 2 within error, and 4 untied."""

    class Twice(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.a, self.b = (nn.Linear(4, 1, bias=False) for _ in range(2))
            nn.init.ones_(self.a.weight)
            nn.init.ones_(self.b.weight)
            if tied:
                self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.a(x[:, :4]) + self.b(x[:, 4:]))

    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    fields = {
        "sampler": ds.SamplerConfig(name="lmsgld", lr=2e-4, localization=1.0, nbeta=1000.0),
        "draws": 400,
        "burn_in": 50,
        "thin": 2,
        "batch_size": 400,
        "watch": False,
    }
    for tied, llc in ((True, 2.0), (False, 4.0)):
        estimate = sample(Twice(tied), squared_error, (x, x.sum(1, keepdim=True)), **fields).llc(
            "ignore"
        )
        assert_mean(estimate.mean, llc, estimate.se)


def test_a_model_that_keeps_its_last_activation_stays_as_it_is() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = regression()[0], torch.zeros(1)

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.inner(x)
            return self.last

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return squared_error(model, batch) + 0.01 * torch.as_tensor(model.last).square().sum(1)

    model = Last()
    loss(model, DATA)
    last = model.last
    with pytest.raises(RuntimeError):
        copy.deepcopy(model)  # which is why a run does it otherwise
    assert sample(model, loss).manifest.status == "finished"
    assert model.last is last


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, own: bool) -> None:
        self.own = own

    def __len__(self) -> int:
        return 300

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index) if self.own else None
        return DATA[0][index] + 0.1 * torch.randn(5, generator=generator), DATA[1][index]


def test_data_that_are_others_at_each_reading_are_named_before_the_run(tmp_path: Path) -> None:
    store, fields = tmp_path / "run", {"draws": 20, "data": Augmented(own=False)}
    with pytest.warns(UserWarning, match="the data are others at each reading.*manual_seed"):
        run = sample(MODEL, squared_error, store=store, **fields)
    assert "others at each reading" in run.manifest.fingerprint["data"]
    assert any("others at each reading" in note for note in run.advisories)
    with pytest.warns(UserWarning, match="the data are others"):
        longer = sample(MODEL, squared_error, store=store, resume="must", **{**fields, "draws": 25})
    assert longer.manifest.kept == 25
    mended = {**fields, "data": Augmented(own=True)}
    assert_same(sample(MODEL, squared_error, **mended), sample(MODEL, squared_error, **mended))


def test_only_the_first_process_of_torchrun_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="this one is rank 1 of 4 that torchrun has started"):
        sample(MODEL, squared_error)
    monkeypatch.setenv("RANK", "0")
    assert sample(MODEL, squared_error, draws=3).manifest.status == "finished"


def test_a_finished_run_is_returned_without_a_call_of_its_loss(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return squared_error(model, batch)

    calls = list[int]()
    one, other = (sample(MODEL, loss, store=tmp_path / "run", resume="auto") for _ in range(2))
    made = len(calls)
    sample(MODEL, loss, store=tmp_path / "run", resume="auto")
    assert len(calls) == made
    assert_same(one, other)


def test_a_sampler_may_measure_what_a_draw_holds_too() -> None:
    sampler = ds.SamplerConfig(lr=1e-4, distance=True)
    run = sample(MODEL, squared_error, sampler=sampler)
    stats = run.inference_data["sample_stats"]
    assert np.allclose(stats["distance"], run.posterior["distance"])

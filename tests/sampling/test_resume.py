"""Going on with a run: the same path as a first start, refused where it could not be the same."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import distsampler as ds
from distsampler.errors import StoreError
from distsampler.store import lease
from distsampler.store.files import Files, StoreFault
from distsampler.store.trace import Trace
from tests.assertions import digest
from tests.problems import config, regression, squared_error


def sample(store: Path | str, model: nn.Module | None = None, **fields: Any) -> ds.Run:
    given, data = regression()
    resume = fields.pop("resume", "never")
    return ds.sample(
        model or given, data, fields.pop("loss", squared_error),
        config(**{"draws": 100, "placement": ds.PlacementConfig(block=10), **fields}),
        store=store, pool=ds.SerialPool(), resume=resume, quiet=True,
    )  # fmt: skip


def test_a_finished_run_is_extended_to_the_bits_of_a_long_one(tmp_path: Path) -> None:
    short = sample(tmp_path / "run", draws=40)
    model, data = regression()
    longer = ds.resume(
        short.store, model, data, squared_error, draws=100, pool=ds.SerialPool(), quiet=True
    )
    assert longer.posterior.sizes["draw"] == 100
    assert longer.manifest.epoch == 2
    assert digest(longer) == digest(sample(tmp_path / "whole"))


def test_an_extension_goes_on_from_the_last_state(tmp_path: Path) -> None:
    sample(tmp_path / "run", draws=40)
    calls = []

    def counted(model: nn.Module, batch: Any) -> torch.Tensor:
        calls.append(1)
        return squared_error(model, batch)

    counted.__qualname__ = squared_error.__qualname__
    sample(tmp_path / "run", draws=41, resume="must")
    model, data = regression()
    settings = config(draws=42, placement=ds.PlacementConfig(block=10))
    with pytest.raises(StoreError, match="loss: stored"):
        ds.sample(model, data, counted, settings, store=tmp_path / "run", resume="must")


def test_a_converged_run_stays_converged(tmp_path: Path) -> None:
    easy = ds.GateConfig(rhat=3.0, ess=1.0, every=100)
    first = sample(tmp_path / "run", draws=400, gate=easy)
    again = sample(tmp_path / "run", draws=500, gate=easy, resume="must")
    assert (first.manifest.kept, again.manifest.kept) == (100, 100)
    assert digest(again) == digest(first)


def test_fewer_draws_are_refused(tmp_path: Path) -> None:
    sample(tmp_path / "run", draws=40)
    with pytest.raises(StoreError, match=r"config\.draws: stored 40, now 30"):
        sample(tmp_path / "run", draws=30, resume="auto")


class Other(nn.Linear):
    """A model of another structure."""


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"thin": 4}, r"config\.thin: stored 3, now 4"),
        ({"seed": 1}, r"config\.seed: stored 0, now 1"),
        ({"threads": 2}, r"config\.threads: stored 1, now 2"),
        ({"chains": 3}, r"config\.chains: stored 2, now 3"),
        ({"sampler": ds.SamplerConfig(lr=2e-3, localization=10.0)}, r"config\.sampler: stored"),
        ({"loss": lambda model, batch: squared_error(model, batch) * 1.0}, "loss: stored"),
        ({"model": Other(5, 1, bias=False)}, "model: stored"),
    ],
)
def test_what_changes_the_numbers_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], key: str
) -> None:
    first = sample(tmp_path / "run", draws=20)
    before = digest(first)
    with pytest.raises(StoreError, match=key):
        sample(tmp_path / "run", **{"draws": 30, "resume": "auto", **change})
    assert digest(ds.open(tmp_path / "run")) == before


def test_what_changes_no_number_is_allowed(tmp_path: Path) -> None:
    sample(tmp_path / "run", draws=20)
    (tmp_path / "run").rename(tmp_path / "moved")
    more = sample(
        tmp_path / "moved", draws=100, resume="must", min_chains=1, commit_seconds=0.1,
        max_state_mb=0.0, placement=ds.PlacementConfig(block=7),
    )  # fmt: skip
    assert digest(more) == digest(sample(tmp_path / "whole"))


def test_another_device_type_is_refused_another_model_is_noted(tmp_path: Path) -> None:
    run = sample(tmp_path / "run", draws=20)
    trace = Trace(run.store)
    assert trace.manifest.fingerprint["device"] == "cpu"
    with pytest.raises(StoreError, match="device: stored 'cpu', now 'cuda"):
        trace.record_device("cuda:0 (NVIDIA H200)")
    trace.record_device("cpu (another)")
    assert trace.events()[-1]["event"] == "device_changed"


def test_states_that_are_large_go_to_the_store_directly(tmp_path: Path) -> None:
    run = sample(tmp_path / "run", max_state_mb=0.0, commit_seconds=1e-9)
    assert digest(run) == digest(sample(tmp_path / "whole"))
    for state in (tmp_path / "run/checkpoints").rglob("*.pt"):
        state.write_bytes(b"torn")
    again = sample(tmp_path / "run", draws=120, max_state_mb=0.0, resume="must")
    assert digest(again) == digest(sample(tmp_path / "longer", draws=120))


def test_a_remote_store_holds_a_run_as_a_disk_does(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/run"
    run = sample(url, draws=40)
    assert run.store == url
    assert digest(run) == digest(sample(tmp_path / "run", draws=40))
    assert digest(sample(url, draws=100, resume="must")) == digest(sample(tmp_path / "whole"))


class Ends:
    """A store that fails for good at some write."""

    def __init__(self, store: Path, writes: int, error: OSError) -> None:
        self.files, self._left, self._error = Files(store, at=self._at), writes, error

    def _at(self, point: str) -> None:
        self._left -= 1
        if self._left <= 0:
            raise self._error


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), OSError(30, "Read-only file system"),
              PermissionError(13, "Permission denied")],
)  # fmt: skip
def test_a_disk_that_fails_is_named_and_what_was_committed_stays(
    tmp_path: Path, error: OSError
) -> None:
    whole = digest(sample(tmp_path / "whole", commit_seconds=1e-9))
    with pytest.raises(StoreFault, match=rf"{error.strerror}.* stays readable: make room"):
        sample(Ends(tmp_path / "run", 400, error).files, commit_seconds=1e-9)  # type: ignore[arg-type]
    cut = ds.open(tmp_path / "run")
    assert 0 < min(cut.manifest.n_committed) < 110
    assert np.isfinite(cut.posterior["probe_loss"]).all()
    assert digest(sample(tmp_path / "run", resume="must", commit_seconds=1e-9)) == whole


class Deletes:
    """A loss that takes its store away."""

    def __init__(self, store: Path, after: int) -> None:
        self.store, self.after = store, after

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        self.after -= 1
        if self.after == 0:
            import shutil

            shutil.rmtree(self.store)
        return squared_error(model, batch)


def test_a_store_that_is_deleted_is_not_half_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "FRESH_SECONDS", 0.0)
    with pytest.raises(StoreFault, match="exchanged or deleted while in use"):
        sample(tmp_path / "run", loss=Deletes(tmp_path / "run", 200), commit_seconds=1e-9)
    assert not list((tmp_path).rglob("run.json"))


def begun(store: Path, **fields: Any) -> ds.Running:
    model, data = regression()
    settings = config(draws=100_000, placement=ds.PlacementConfig(block=10), **fields)
    return ds.start(model, data, squared_error, settings, store=store, pool=ds.SerialPool())


def until_it_draws(running: ds.Running) -> None:
    for _ in range(3000):
        if running.progress is not None and running.progress.chains[0].draws > 20:
            return
        threading.Event().wait(0.01)
    raise AssertionError(running.progress)


def test_a_started_run_shows_progress_waits_and_stops_cleanly(tmp_path: Path) -> None:
    running = begun(tmp_path / "run")
    until_it_draws(running)
    with pytest.raises(TimeoutError, match="it goes on"):
        running.wait(timeout=0.01)
    assert not running.done
    running.stop()
    run = running.wait(60)
    assert running.done
    assert run.manifest.status == "interrupted"
    assert "stopped by its owner" in run.manifest.reason
    assert min(run.manifest.n_committed) > 0


def test_what_a_start_refuses_it_refuses_at_once(tmp_path: Path) -> None:
    model, data = regression()
    with pytest.raises(ds.ConfigError, match="batch_size"):
        ds.start(model, data, squared_error, config(batch_size=10**6), store=tmp_path / "run")


def test_what_happens_later_is_raised_by_wait(tmp_path: Path) -> None:
    model, data = regression()
    hot = config(sampler=ds.SamplerConfig(lr=1.0, localization=100.0), draws=200)
    running = ds.start(
        model, data, squared_error, hot, store=tmp_path / "run", pool=ds.SerialPool()
    )
    with pytest.raises(ds.RunFailed, match="chains are left"):
        running.wait(60)


def test_two_drivers_at_once_the_second_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    running = begun(tmp_path / "run")
    until_it_draws(running)
    with pytest.raises(StoreError, match=r"belongs to the driver with pid \d+ on host"):
        sample(tmp_path / "run", draws=100_000, resume="auto")
    running.stop()
    running.wait(60)


def test_a_driver_that_was_taken_over_stops_and_no_bit_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The zombie's heart does not beat; it works on until its next commit, beside its heir."""
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 0.5)
    monkeypatch.setattr(lease.Lease, "_beat", lambda self: None)
    model, data = regression()
    settings = config(draws=400, placement=ds.PlacementConfig(block=5), commit_seconds=1e-9)
    pool = _Waits()
    zombie = ds.start(model, data, squared_error, settings, store=tmp_path / "run", pool=pool)
    assert pool.reached.wait(60)
    heir = ds.sample(
        model, data, squared_error, settings, store=tmp_path / "run", pool=ds.SerialPool(),
        resume="must", quiet=True,
    )  # fmt: skip
    pool.go_on.set()
    with pytest.raises(StoreFault, match="taken over"):
        zombie.wait(60)
    assert heir.manifest.epoch == 2
    undisturbed = ds.sample(
        model, data, squared_error, settings, store=tmp_path / "whole", pool=ds.SerialPool(),
        quiet=True,
    )  # fmt: skip
    assert digest(ds.open(tmp_path / "run")) == digest(undisturbed)


class _Waits(ds.SerialPool):
    """A pool that falls asleep after some works."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.go_on, self._works = threading.Event(), threading.Event(), 0

    def wait(self, timeout: float) -> Any:
        self._works += 1
        if self._works == 20:
            self.reached.set()
            self.go_on.wait(120)
        return super().wait(timeout)

"""The loop with real chains and a pool whose places die."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import distsampler as ds
from distsampler.execution import deadlines, driver
from distsampler.execution.pool import ChainPool
from distsampler.report.summary import diagnosis_text
from tests.assertions import assert_same
from tests.fakes import FlakyPool
from tests.problems import config, mean_squared_error, regression, squared_error
from tests.processes import until

SHORT = {"placement": ds.PlacementConfig(block=6), "chains": 3, "draws": 120}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.random, "uniform", lambda low, high: 0.0)


def sample(store: Path, pool: ChainPool, resume: Any = "never", **fields: Any) -> ds.Run:
    model, data = regression()
    settings = config(**{**SHORT, **fields})
    return ds.sample(model, data, squared_error, settings, store=store, pool=pool, resume=resume,
                     quiet=True)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> ds.Run:
    return sample(tmp_path_factory.mktemp("runs") / "run", ds.SerialPool())


@pytest.mark.parametrize("deaths", [[0], [1], [5], [20, 21, 22], list(range(3, 60, 7))])
def test_deaths_change_no_bit(tmp_path: Path, undisturbed: ds.Run, deaths: list[int]) -> None:
    pool = FlakyPool(2, deaths)
    run = sample(tmp_path / "run", pool)
    assert pool.died == len(deaths)
    assert sum(event["event"] == "lost" for event in run.events) == len(deaths)
    assert_same(run, undisturbed)


IMPATIENT = ds.PlacementConfig(block=6, answer_timeout=0.1, start_timeout=0.02)


@pytest.mark.parametrize("hangs", [{0}, {5, 9}, {30, 31}])
def test_works_that_are_never_answered_are_done_elsewhere_and_change_no_bit(
    tmp_path: Path, undisturbed: ds.Run, hangs: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    run = sample(tmp_path / "run", FlakyPool(2, hangs=hangs), placement=IMPATIENT)
    faults = [event["fault"] for event in run.events if event["event"] == "lost"]
    assert set(faults) == {"hung"}
    assert len(faults) >= len(hangs), "a busy machine may be suspected wrongly, at no bit's cost"
    assert_same(run, undisturbed)
    assert caplog.text.count("it is given up") == len(faults)
    assert f"lost ({len(faults)} hung)" in diagnosis_text(run)


def test_a_run_whose_loss_never_returns_fails_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "FACTOR", 0.0)  # answer_timeout alone, however busy the machine
    pool = FlakyPool(3, hangs=range(20, 10**6))
    with pytest.raises(ds.RunFailed, match=r"hung 4 times at the same work: chain \d's actor on"):
        sample(tmp_path / "run", pool, placement=IMPATIENT)
    assert pool.stopped
    assert not ds.open(tmp_path / "run").lost_chains


def test_a_stopped_run_does_not_wait_for_what_hangs(
    tmp_path: Path, undisturbed: ds.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "ENDING", (0.05, 0.1))
    model, data = regression()
    settings = config(**SHORT)
    pool = FlakyPool(2, hangs=range(20, 10**6))
    running = ds.start(model, data, squared_error, settings, store=tmp_path / "run", pool=pool)
    until(lambda: pool.works > 20)
    running.stop()
    run = running.wait(60)
    assert run.manifest.status == "interrupted"
    assert min(run.manifest.n_committed) > 0
    assert_same(sample(tmp_path / "run", ds.SerialPool(), resume="must"), undisturbed)


def yielding(model: nn.Module, batch: Any) -> Tensor:
    """Lets other threads run between two draws from the global generator."""
    hidden = model(batch[0])
    time.sleep(1e-4)
    return squared_error(model, batch) + 0.0 * hidden.sum()


def test_runs_in_one_process_take_turns_and_have_the_bits_they_have_alone(tmp_path: Path) -> None:
    _, data = regression()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.5), nn.Linear(16, 1))
    runs = [config(mode="train", draws=30, seed=seed, threads=1 + seed) for seed in (0, 1)]
    threads = torch.get_num_threads()
    alone = [
        ds.sample(model, data, yielding, each, pool=ds.SerialPool(), quiet=True) for each in runs
    ]
    running = [ds.start(model, data, yielding, each, pool=ds.SerialPool()) for each in runs]
    for one, other in zip(alone, running, strict=True):
        assert_same(one, other.wait(60))
    assert torch.get_num_threads() == threads


def test_a_place_gone_for_good_leaves_its_chains_to_the_others(
    tmp_path: Path, undisturbed: ds.Run
) -> None:
    pool = FlakyPool(3, [9], kind="fatal")
    run = sample(tmp_path / "run", pool)
    assert pool.died == 1
    assert_same(run, undisturbed)


def test_when_every_place_is_gone_the_run_fails_and_can_be_continued(
    tmp_path: Path, undisturbed: ds.Run
) -> None:
    pool = FlakyPool(1, [30], kind="fatal")
    with pytest.raises(ds.RunFailed, match="no place is left to run on: killed by the script"):
        sample(tmp_path / "run", pool)
    assert pool.stopped
    failed = ds.open(tmp_path / "run")
    assert failed.manifest.status == "failed"
    assert min(failed.manifest.n_committed) > 0
    assert_same(sample(tmp_path / "run", FlakyPool(2), resume="must"), undisturbed)


def test_max_seconds_stops_cleanly_and_the_rest_follows(
    tmp_path: Path, undisturbed: ds.Run
) -> None:
    run = sample(tmp_path / "run", ds.SerialPool(), max_seconds=0.15)
    assert run.manifest.status == "interrupted"
    assert "max_seconds=0.15 is over" in run.manifest.reason
    counts = run.manifest.n_committed
    assert max(counts) < 130
    again = sample(tmp_path / "run", ds.SerialPool(), resume="auto")
    assert again.manifest.status == "finished"
    assert_same(again, undisturbed)


def test_a_finished_run_is_returned_as_it_is(tmp_path: Path) -> None:
    first = sample(tmp_path / "run", ds.SerialPool(), draws=5)
    before = Path(first.store, "run.json").read_bytes()
    pool = FlakyPool()
    again = sample(tmp_path / "run", pool, resume="auto", draws=5)
    assert pool.works == 0
    assert pool.stopped, "it may have joined Ray to inspect shards"
    assert Path(again.store, "run.json").read_bytes() == before


def test_a_pool_is_stopped_where_a_run_cannot_be_continued(tmp_path: Path) -> None:
    sample(tmp_path / "run", ds.SerialPool(), draws=5)
    pool = FlakyPool()
    with pytest.raises(ds.DistsamplerError, match="thin"):
        sample(tmp_path / "run", pool, resume="auto", draws=5, thin=7)
    assert pool.stopped


def test_the_gate_ends_a_run_at_the_first_look_that_converged(tmp_path: Path) -> None:
    easy = ds.GateConfig(rhat=3.0, ess=1.0, every=100)
    run = sample(tmp_path / "run", ds.SerialPool(), draws=1000, gate=easy)
    assert (run.manifest.kept, run.manifest.reason) == (100, "converged")
    assert run.posterior.sizes["draw"] == 100
    assert run.verdict.converged


def test_a_diverged_chain_is_named_and_the_others_finish(tmp_path: Path) -> None:
    from tests.problems import Exploding

    model, data = regression()
    run = ds.sample(
        model, data, Exploding(chain=1, after=20), config(chains=3), store=tmp_path / "run",
        pool=ds.SerialPool(), quiet=True,
    )  # fmt: skip
    assert list(run.lost_chains) == [1]
    assert "chain 1 diverged at step" in run.lost_chains[1]
    assert run.posterior["chain"].values.tolist() == [0, 2]
    assert run.manifest.n_committed[1] < min(run.manifest.n_committed[0], 50)
    assert "2 of 3 chains" in str(run.llc("ignore"))


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (squared_error, r"but 4 of 300 examples give nan \(rows 5, 17, 23, \.\.\.\): leave"),
        (mean_squared_error, r"but its mean over all data is nan: leave"),
    ],
)
def test_a_loss_that_is_not_finite_at_the_anchor_is_refused_and_leaves_no_run(
    tmp_path: Path, loss: Any, got: str
) -> None:
    model, (x, y) = regression()
    y[[5, 17, 23, 200]] = torch.nan
    for resume in ("never", "auto"):
        with pytest.raises(ds.RunFailed, match=f"^the loss at w.* must be finite .*, {got}"):
            ds.sample(
                model, (x, y), loss, config(), store=tmp_path, resume=resume,  # type: ignore[arg-type]
                pool=ds.SerialPool(), quiet=True,
            )  # fmt: skip
        assert list(tmp_path.iterdir()) == []


class Hungry:
    """A loss for which the device's memory is not enough, at some of its calls."""

    def __init__(self, first: int, times: int) -> None:
        self.calls, self.first, self.stop = 0, first, first + times

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        if self.first <= self.calls < self.stop:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return squared_error(model, batch)


def test_a_device_without_memory_is_a_lost_place_and_not_a_lost_chain(
    tmp_path: Path, undisturbed: ds.Run
) -> None:
    model, data = regression()
    run = ds.sample(
        model, data, Hungry(90, times=2), config(**SHORT), store=tmp_path / "run",
        pool=ds.SerialPool(), quiet=True,
    )  # fmt: skip
    assert [event["fault"] for event in run.events if event["event"] == "lost"] == ["memory"] * 2
    assert not run.lost_chains
    assert_same(run, undisturbed)


def test_a_device_that_never_has_the_memory_ends_the_run_with_advice(tmp_path: Path) -> None:
    model, data = regression()
    with pytest.raises(ds.RunFailed, match="ran out of memory 3 times: lower batch_size or "):
        ds.sample(
            model, data, Hungry(90, times=10**6), config(**SHORT), store=tmp_path / "run",
            pool=ds.SerialPool(), quiet=True,
        )  # fmt: skip
    assert not ds.open(tmp_path / "run").lost_chains


@pytest.mark.filterwarnings("ignore:the step is too large")
def test_below_min_chains_the_run_fails_with_what_it_has(tmp_path: Path) -> None:
    model, data = regression()
    hot = config(sampler=ds.SamplerConfig(lr=1.0, localization=100.0), thin=1, draws=200)
    with pytest.raises(ds.RunFailed, match=r"1 of 2 chains are left.*lower sampler\.lr"):
        ds.sample(
            model, data, squared_error, hot, store=tmp_path / "run", pool=ds.SerialPool(),
            quiet=True,
        )  # fmt: skip
    assert ds.open(tmp_path / "run").lost_chains


def test_progress_is_shown_now_and_then_and_every_phase_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "SHOW_SHARE", 1e9)
    shown = list[Any]()
    monkeypatch.setattr(driver.Progress, "snapshot", _counted(driver.Progress.snapshot, shown))
    sample(tmp_path / "run", FlakyPool(2))
    phases = [each.phase for each in shown]
    assert phases == ["anchoring", "sampling", "draining", "finished"] or phases == [
        "anchoring", "sampling", "finished"
    ]  # fmt: skip
    assert shown[0].anchor["rows"] == (0, 300)


def _counted(snapshot: Any, shown: list[Any]) -> Any:
    def counted(*arguments: Any) -> Any:
        shown.append(snapshot(*arguments))
        return shown[-1]

    return counted


def test_commits_that_take_long_are_made_more_rarely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits, commit = list[float](), driver.Trace.commit

    def slow(trace: Any, blocks: Any) -> None:
        commits.append(time.monotonic())
        commit(trace, blocks)
        time.sleep(0.05)

    monkeypatch.setattr(driver.Trace, "commit", slow)
    monkeypatch.setattr(driver, "SHORT_COMMIT", 0.0)
    sample(tmp_path / "run", FlakyPool(2), commit_seconds=1e-6)
    gaps = np.diff(commits)[:-2]  # at the end a commit is not waited for
    assert all(gap >= 10 * 0.05 for gap in gaps)

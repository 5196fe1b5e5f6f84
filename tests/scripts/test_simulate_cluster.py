"""The simulated cluster: its bookkeeping, and what it must find in cases that are known."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("simulated_cluster")


def costs(module: ModuleType, **fields: float) -> Any:
    free = dict.fromkeys(module.Costs.__dataclass_fields__, 0.0)
    return module.Costs(**{**free, **fields})


def run(module: ModuleType, cluster: Any, found: Any) -> Any:
    """A run in which decisions cost nothing, so that it is a function of its seed."""
    simulation = module.Simulation(cluster, found, clock=lambda: 0.0)
    tally = simulation.run()
    return tally, tally.report(cluster.actors), simulation


def test_where_nothing_costs_or_dies_all_time_is_useful(simulated: ModuleType) -> None:
    cluster = simulated.Cluster(8, 100.0, 0.0, 0.1, spread=0.0)
    tally, report, _ = run(simulated, cluster, costs(simulated))
    assert report["efficiency"] == pytest.approx(1.0, abs=1e-6)
    assert report["draws_per_second"] == pytest.approx(80.0, rel=0.05)  # 8 actors, 10 a second
    assert tally.deaths == 0
    assert report["commits"] == pytest.approx(100 / simulated.COMMIT_SECONDS, abs=3)


def test_every_actors_time_is_accounted_for(simulated: ModuleType) -> None:
    found = costs(simulated, start=3.0, latency=0.01, submit=0.002, collect=0.003, commit=0.05)
    cluster = simulated.Cluster(20, 600.0, 5.0, 0.1)
    tally, report, _ = run(simulated, cluster, found)
    missing = sum(report["missing"].values())
    assert tally.deaths > 5
    assert report["efficiency"] + missing == pytest.approx(1.0, abs=0.005)
    assert 0 < report["missing"]["lost work"] < 0.05
    assert report["driver_load"] == pytest.approx(sum(tally.driver.values()) / tally.elapsed)


def test_draws_are_received_once_whatever_dies(simulated: ModuleType) -> None:
    cluster = simulated.Cluster(6, 900.0, 40.0, 0.1, seed=3)
    tally, _, simulation = run(simulated, cluster, costs(simulated, start=1.0))
    assert tally.deaths > 20
    assert sum(simulation.state.received) == tally.draws


@pytest.mark.parametrize(
    ("fields", "deaths", "bottleneck"),
    [
        ({"commit_block": 0.05}, 0.0, ": commits"),
        ({"collect": 0.05}, 0.0, "driver: replies"),
        ({"wait": 2e-2}, 0.0, "driver: looking for replies"),
        ({"start": 60.0}, 20.0, "actors that start"),
        ({"latency": 0.5}, 0.0, "waiting for the driver"),
        ({"collect": 1e-5}, 0.0, "none yet; of the driver: replies"),
    ],
)
def test_the_bottleneck_is_what_was_made_dear(
    simulated: ModuleType, fields: dict[str, float], deaths: float, bottleneck: str
) -> None:
    cluster = simulated.Cluster(40, 600.0, deaths, 0.1)
    _, report, _ = run(simulated, cluster, costs(simulated, **fields))
    assert report["bottleneck"].endswith(bottleneck)


def test_the_same_seed_gives_the_same_cluster_and_another_another(simulated: ModuleType) -> None:
    cluster, found = simulated.Cluster(10, 300.0, 20.0, 0.1), costs(simulated, start=2.0)
    _, first, _ = run(simulated, cluster, found)
    assert run(simulated, cluster, found)[1] == first
    assert run(simulated, replace(cluster, seed=1), found)[1] != first


def test_the_script_prints_what_it_found(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/simulate_cluster.py"), "--actors", "10", "20"]
    command += ["--deaths", "1", "--seconds", "60"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--json"], check=True, capture_output=True, text=True, env=environment
    )
    found = json.loads(done.stdout)
    assert [row["actors"] for row in found["clusters"]] == [10, 20]
    assert {"efficiency", "driver_load", "missing", "bottleneck"} <= set(found["clusters"][0])
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert "first bottleneck" in told.stdout

"""The simulated cluster: its bookkeeping, and what it must find in cases that are known."""

from dataclasses import replace
from typing import Any

import pytest

from scripts.cluster.simulation import COMMIT_SECONDS, Cluster, Costs, Simulation


def costs(**fields: float) -> Costs:
    free = dict.fromkeys(Costs.__dataclass_fields__, 0.0)
    return Costs(**{**free, **fields})


def run(cluster: Cluster, what: Costs) -> Any:
    """A run in which decisions cost nothing, so that it is a function of its seed."""
    simulation = Simulation(cluster, what, clock=lambda: 0.0)
    tally = simulation.run()
    return tally, tally.report(cluster.actors), simulation


def test_where_nothing_costs_or_dies_all_time_is_useful() -> None:
    cluster = Cluster(8, 100.0, 0.0, 0.1, spread=0.0)
    tally, report, _ = run(cluster, costs())
    assert report["efficiency"] == pytest.approx(1.0, abs=1e-6)
    assert report["draws_per_second"] == pytest.approx(80.0, rel=0.05)  # 8 actors, 10 a second
    assert tally.deaths == 0
    assert report["commits"] == pytest.approx(100 / COMMIT_SECONDS, abs=3)


def test_every_actors_time_is_accounted_for() -> None:
    dear = costs(start=3.0, latency=0.01, submit=0.002, collect=0.003, commit=0.05)
    cluster = Cluster(20, 600.0, 5.0, 0.1)
    tally, report, _ = run(cluster, dear)
    missing = sum(report["missing"].values())
    assert tally.deaths > 5
    assert report["efficiency"] + missing == pytest.approx(1.0, abs=0.005)
    assert 0 < report["missing"]["lost work"] < 0.05
    assert report["driver_load"] == pytest.approx(sum(tally.driver.values()) / tally.elapsed)


def test_draws_are_received_once_whatever_dies() -> None:
    cluster = Cluster(6, 900.0, 40.0, 0.1, seed=3)
    tally, _, simulation = run(cluster, costs(start=1.0))
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
    fields: dict[str, float], deaths: float, bottleneck: str
) -> None:
    cluster = Cluster(40, 600.0, deaths, 0.1)
    _, report, _ = run(cluster, costs(**fields))
    assert report["bottleneck"].endswith(bottleneck)


def test_the_same_seed_gives_the_same_cluster_and_another_another() -> None:
    cluster, dear = Cluster(10, 300.0, 20.0, 0.1), costs(start=2.0)
    _, first, _ = run(cluster, dear)
    assert run(cluster, dear)[1] == first
    assert run(replace(cluster, seed=1), dear)[1] != first

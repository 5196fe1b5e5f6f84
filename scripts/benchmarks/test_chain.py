"""The race of scripts/bench chain: its protocol and its fairness. Speeds are never asserted."""

import sys
from typing import Any

import pytest

import distsampler as ds
from distsampler.sampling import packing
from distsampler.sampling.prepare import prepare
from scripts.benchmarks import chain, chain_worker
from scripts.benchmarks.race import Contestant
from scripts.benchmarks.workloads import WORKLOADS


def test_contestants_start_from_the_same_loss_and_count_their_steps() -> None:
    result = chain.race("linear", dict.fromkeys(chain.OURS, sys.executable), 0.02, 2)
    assert result["parameters"] == 1024
    assert result["contestants"].keys() == chain.OURS.keys()
    for row in result["contestants"].values():
        assert row["steps_per_second"] > 0
    text = chain.table(result, "no network")
    assert text.count("NOT MEASURED: no network") == len(chain.PEERS)


def test_a_turn_makes_whole_draws() -> None:
    worker = Contestant(sys.executable, "chain_worker", "linear", "thin10")
    answer: dict[str, Any] = worker.go(0.02)
    worker.close()
    assert answer["steps"] >= 10
    assert answer["steps"] % 10 == 0
    assert answer["seconds"] > 0


def test_a_race_between_different_losses_is_refused() -> None:
    chain.check_fair({"bare": 2.0, "thin10": 2.0000001})
    with pytest.raises(SystemExit, match="not fair"):
        chain.check_fair({"bare": 2.0, "thin10": 2.01})


@pytest.mark.filterwarnings("error:watch is off")
def test_every_workload_can_be_packed_and_watched() -> None:
    for workload in WORKLOADS.values():
        first_loss, _ = chain_worker.loop(workload)
        packed, run = chain_worker.chain(workload, 1, pack=2)
        assert packed == pytest.approx(first_loss, rel=1e-5)
        assert run(2) == 2
        config = ds.RunConfig(pack=2, chains=2, batch_size=8)
        spec = prepare(workload.model(), workload.rows(), workload.loss, config)
        assert packing.refusal(spec) is None

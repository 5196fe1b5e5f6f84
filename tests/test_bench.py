"""The race of scripts/bench: its protocol and its fairness. Speeds are never asserted."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


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

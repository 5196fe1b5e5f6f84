"""The jobs of scripts/certify-all: each is done once, by one process; exact values are kept."""

import json
from pathlib import Path
from typing import Any

import pytest

from distsampler.truth import networks, targets
from scripts.certificate import certify_all
from scripts.certificate.jobs import Job, Truths


def test_parts_are_all_jobs_once_and_every_bar_has_some() -> None:
    whole = [(job.bar, job.name) for job in certify_all.chosen("1/1", None)]
    parts = [(job.bar, job.name) for i in (1, 2, 3) for job in certify_all.chosen(f"{i}/3", None)]
    assert len(set(whole)) == len(whole)
    assert sorted(parts) == sorted(whole)
    assert {bar for bar, _ in whole} == set(certify_all.BARS)
    with pytest.raises(SystemExit, match="i/k"):
        certify_all.chosen("3/2", None)


def test_jobs_that_are_done_are_not_done_again(tmp_path: Path) -> None:
    calls: list[str] = []

    def make(truths: object) -> list[dict[str, Any]]:
        calls.append("made")
        return [{"case": "a"}]

    job = Job("pools", "one", 1.0, make)
    certify_all.run([job], tmp_path)
    certify_all.run([job], tmp_path)
    assert calls == ["made"]
    assert certify_all.read(tmp_path)["pools"] == [{"case": "a"}]
    assert json.loads(certify_all.path_of(tmp_path, job).read_text())["seconds"] >= 0


def test_a_job_that_another_process_is_at_is_left_to_it(tmp_path: Path) -> None:
    def make(truths: object) -> list[dict[str, Any]]:
        certify_all.run([job], tmp_path)  # meanwhile another comes by
        assert not certify_all.path_of(tmp_path, job).exists()
        return [{"case": "a"}]

    job = Job("pools", "one", 1.0, make)
    certify_all.run([job], tmp_path)
    assert certify_all.read(tmp_path)["pools"] == [{"case": "a"}]


def test_truths_are_found_once(tmp_path: Path) -> None:
    net = networks.unit_network((2, 2), 1).known(targets.Known(2.0, 0.1, "here"))
    truths = Truths(tmp_path, certify_all.write)
    truths.of(net)
    assert truths.of(net.known(targets.Known(3.0))).exact == (2.0, 0.1, "here")
    tighter = networks.unit_network((2, 2), 1, localization=5.0).known(targets.Known(1.5))
    assert truths.of(tighter).exact.mean == 1.5  # of another posterior, though of equal name

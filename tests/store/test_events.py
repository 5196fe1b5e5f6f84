"""Events: what a run has logged, in the words that stores have held from the start."""

import json
import math
from pathlib import Path

import pytest

from distsampler.store import events
from distsampler.store.events import (
    Damaged,
    DeviceChanged,
    Draining,
    Ended,
    GateRound,
    Lost,
    Packed,
    Retired,
    RunEvent,
    Started,
    StepTooLarge,
    divergences,
    of_kind,
)
from distsampler.store.files import Files

LINES: list[tuple[RunEvent, str]] = [
    (
        Packed("auto", 4, "", {1: 2.0}),
        '"event": "packing", "asked": "auto", "pack": 4, "refused": "", "speeds": {"1": 2.0}',
    ),
    (
        Started(2, {"host": "a", "pid": "7"}),
        '"event": "started", "place": 2, "host": "a", "pid": "7"',
    ),
    (Draining(2, "spot"), '"event": "draining", "place": 2, "reason": "spot"'),
    (
        Lost(2, "memory", (0, 1), 3, "gone"),
        '"event": "lost", "place": 2, "fault": "memory", "chains": [0, 1], "losses": 3, '
        '"reason": "gone"',
    ),
    (
        Lost(2, "start", None, 1, "gone"),
        '"event": "lost", "place": 2, "fault": "start", "losses": 1, "reason": "gone"',
    ),
    (Retired(3, "diverged"), '"event": "retired", "chain": 3, "reason": "diverged"'),
    (
        GateRound(200, "CONVERGED", ""),
        '"event": "verdict", "draws": 200, "status": "CONVERGED", "reason": ""',
    ),
    (StepTooLarge(1, "lower it"), '"event": "step_too_large", "chain": 1, "reason": "lower it"'),
    (DeviceChanged("a", "b"), '"event": "device_changed", "stored": "a", "now": "b"'),
    (Damaged([5, 5], [5, 3]), '"event": "damaged", "committed": [5, 5], "intact": [5, 3]'),
    (Damaged(what="init_loss"), '"event": "damaged", "what": "init_loss"'),
    (Ended("finished", "converged"), '"event": "finished", "reason": "converged"'),
]


@pytest.mark.parametrize(("event", "line"), LINES)
def test_an_event_is_written_as_the_line_it_has_always_been(
    tmp_path: Path, event: RunEvent, line: str
) -> None:
    files = Files(tmp_path)
    events.append(files, event)
    text = (tmp_path / "events.jsonl").read_text()
    assert text.endswith(f", {line}}}\n")
    (record,) = events.read(files)
    assert list(json.loads(text)) == list(record)
    assert record["time"] > 0


def test_events_are_selected_by_their_kind(tmp_path: Path) -> None:
    files = Files(tmp_path)
    for event, _ in LINES:
        events.append(files, event)
    lines = events.read(files)
    assert [line["losses"] for line in of_kind(lines, Lost)] == [3, 1]
    assert of_kind(lines, Started) == [lines[1]]


def test_divergences_are_read_and_a_line_that_lacks_a_part_is_left_out() -> None:
    retired = {"event": "retired", "diverged": True}
    lines = [
        {**retired, "chain": 0, "gentle_lr": 0.005},
        {**retired, "chain": 1},
        {**retired, "chain": 2, "gentle_lr": "much"},
        {**retired, "chain": "three", "gentle_lr": 0.1},
        {**retired, "gentle_lr": 0.1},
        {"event": "retired", "chain": 5, "reason": "raised", "gentle_lr": 0.1},
    ]
    lrs = divergences(lines)
    assert list(lrs) == [0, 1, 2]
    assert lrs[0] == 0.005
    assert math.isnan(lrs[1])
    assert math.isnan(lrs[2])

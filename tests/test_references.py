"""Another process imports what the driver can."""

import os
from pathlib import Path

import pytest

from distsampler.references import follow_path, path_here

LIBRARY = os.path.dirname(os.__file__)


@pytest.mark.parametrize(
    ("sent", "expected"),
    [(False, ["new", "worker", "LIB", "old"]), (True, ["worker", "LIB", "new", "old"])],
)
def test_the_drivers_folders_are_found_in_its_order_but_behind_code_that_was_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: bool, expected: list[str]
) -> None:
    names = {name: str(tmp_path / name) for name in ("new", "old", "worker", "elsewhere")}
    names["LIB"] = LIBRARY
    for name in ("new", "old", "worker"):
        (tmp_path / name).mkdir()
    here = [names["worker"], LIBRARY]
    monkeypatch.setattr("sys.path", here)
    driver = [names["elsewhere"], names["new"], LIBRARY, names["old"]]
    for _ in range(2):  # a process may serve more than one driver
        follow_path(driver, code_was_sent=sent)
        assert here == [names[name] for name in expected]


def test_the_working_folder_is_named_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", ["", LIBRARY])
    assert path_here() == [os.getcwd(), LIBRARY]

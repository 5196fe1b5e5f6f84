"""What a sweep keeps beside its runs, and who may replace it."""

import logging
from pathlib import Path
from typing import Any

import pytest

import distsampler as ds
from distsampler.errors import StoreError
from distsampler.store.files import Files, StoreFault
from distsampler.store.lease import Lease
from distsampler.sweeps.cells import Cell
from distsampler.sweeps.manifest import CellRecord, read_record, write_record
from tests.problems import config, regression, squared_error

SHORT: dict[str, Any] = {"draws": 6, "burn_in": 2, "probe": 8, "watch": False}


def sweep(store: Path, load: Any, steps: tuple[str, ...], **fields: Any) -> ds.Sweep:
    model, data = regression(n=40)
    return ds.sweep(
        model, data, squared_error, config(**SHORT), store=store, checkpoints=list(steps),
        load=load, quiet=True, pool=ds.SerialPool(), **fields,
    )  # fmt: skip


def lost(name: str) -> Any:
    raise OSError("no such bucket")


def there(name: str) -> Any:
    return regression(n=40)[0].state_dict()


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_sweep_without_a_draw_is_replaced_and_one_with_a_draw_is_kept(
    tmp_path: Path, resume: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "s"
    failed = sweep(store, lost, ("step1", "step2"))
    assert failed.counts() == {"failed": 2}
    with caplog.at_level(logging.WARNING):
        mended = sweep(store, there, ("step3",), resume=resume)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"the sweep in {store} had not made a draw: it is replaced"]
    assert mended.counts() == {"finished": 1}
    assert [path.name for path in (store / "cells").iterdir()] == ["step3"]
    with pytest.raises(StoreError, match=r"holds a sweep|checkpoints: stored"):
        sweep(store, there, ("step4",), resume=resume)
    assert ds.open_sweep(store).counts() == {"finished": 1}


def test_a_sweep_that_could_not_start_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> Any:
        raise ds.PlacementError("no room")

    monkeypatch.setattr("distsampler.sweeps.sweep.fleet_of", full)
    with pytest.raises(ds.PlacementError):
        sweep(tmp_path / "runs/s", there, ("step1",))
    assert list(tmp_path.iterdir()) == []


def test_the_record_of_a_cell_is_not_written_after_another_driver_has_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distsampler.store.lease.EXPIRY_SECONDS", 0.0)
    files, cell = Files(tmp_path / "s"), Cell("step1", "all", "config", "data", "step1")
    first = Lease(files)
    write_record(files, cell, CellRecord(cell={}, failure="early"))
    Lease(Files(tmp_path / "s"))
    assert first.epoch == 1
    with pytest.raises(StoreFault, match="another has taken over"):
        write_record(files, cell, CellRecord(cell={}, failure="late"))
    assert read_record(Files(tmp_path / "s/cells/step1"), cell).failure == "early"

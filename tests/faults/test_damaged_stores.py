"""No damaged file gives a number, and no foreign one runs, leads out, or reaches a terminal raw."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

import distsampler as ds
from distsampler import cli
from distsampler.draws import AtAnchor, DrawBlock, WideVariable
from distsampler.errors import StoreError
from distsampler.facts import Facts, Posterior
from distsampler.report import listing, run_report, summary, watch
from distsampler.sampling.directory import stored_recipe
from distsampler.store import integrity, manifest
from distsampler.store.events import GateRound
from distsampler.store.files import Files
from distsampler.store.large_arrays import WideWriter
from distsampler.store.manifest import Manifest
from distsampler.store.trace import Trace
from tests.faults import fuzz
from tests.problems import regression, squared_error
from tests.stores import COUNTED, NBETA, N, autoregressive, counted, make_run

POSTERIOR, CONSTANTS = "trace.zarr/posterior", "trace.zarr/constant_data"
EVIL = "\x1b]0;title\x07\x1b[2J\x1b[31mEVIL [bold]<script>"
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(autoregressive(2, 120, 0.5))
    Trace(run.store).log(GateRound(100, "CONVERGED", ""))
    return Path(shutil.move(run.store, tmp_path_factory.mktemp("whole") / "run"))


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def edit(name: str, change: Callable[[Any], object]) -> Damage:
    """Damage a JSON document."""

    def damage(store: Path) -> None:
        document = json.loads((store / name).read_text())
        change(document)
        (store / name).write_text(json.dumps(document))

    return damage


def zero_for_missing(store: Path) -> None:
    edit(f"{POSTERIOR}/excess_loss/zarr.json", lambda o: o.update(fill_value=0.0))(store)
    shutil.rmtree(store / f"{POSTERIOR}/excess_loss/c")


def another_variable(store: Path) -> None:
    shutil.copy(store / f"{POSTERIOR}/probe_loss/c/0/0", store / f"{POSTERIOR}/excess_loss/c/0/0")


def exchanged(store: Path) -> None:
    (store / CONSTANTS / "n").rename(store / "n")
    (store / CONSTANTS / "nbeta").rename(store / CONSTANTS / "n")
    (store / "n").rename(store / CONSTANTS / "nbeta")


def another_run(store: Path) -> None:
    """Every array of a run with other draws."""
    other = make_run(autoregressive(2, 120, 0.5, seed=1)).store
    shutil.rmtree(store / "trace.zarr")
    shutil.move(f"{other}/trace.zarr", store / "trace.zarr")


def another_runs_chunk(store: Path) -> None:
    other = make_run(autoregressive(2, 120, 0.5, seed=1)).store
    chunk = f"{POSTERIOR}/excess_loss/c/0/0"
    shutil.copy(Path(other, chunk), store / chunk)


DAMAGES: dict[str, Damage] = {
    "fewer draws": edit("run.json", lambda o: o.update(kept=50)),
    "variables left out": edit("run.json", lambda o: o["variables"].pop()),
    "counts one short": edit("run.json", lambda o: o.update(n_committed=[119, 119])),
    "more chains": edit("run.json", lambda o: o["config"].update(chains=3)),
    "no such type": edit("run.json", lambda o: o["variables"][1].update(dtype="int66")),
    "endless": edit("run.json", lambda o: o.update(kept=10**12)),
    "no seal": edit("run.json", lambda o: o.pop("seal")),
    "deep": lambda store: (store / "run.json").write_text("[" * 100_000 + "]" * 100_000),
    "other bytes order": edit(
        f"{POSTERIOR}/excess_loss/zarr.json",
        lambda o: o["codecs"][0]["configuration"].update(endian="big"),
    ),
    "zero for what is missing": zero_for_missing,
    "a chunk of another variable": another_variable,
    "a chunk of another run": another_runs_chunk,
    "arrays of another run": another_run,
    "nbeta for n": exchanged,
    "a constant lost": lambda store: shutil.rmtree(store / CONSTANTS / "localization"),
    "a link for a chunk": lambda store: move_out(store, f"{POSTERIOR}/excess_loss/c/0/0"),
    "a link for a folder": lambda store: move_out(store, "trace.zarr"),
}


def move_out(store: Path, name: str) -> None:
    """Put what is right in another place, and a link in its own."""
    outside = store.parent / "outside"
    shutil.move(store / name, outside)
    (store / name).symlink_to(outside)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_store_gives_no_number(store: Path, damage: Damage) -> None:
    damage(store)
    with pytest.raises(StoreError, match=str(store)):
        ds.open(store).llc("ignore")
    (entry,) = listing.entries(store)
    assert (entry.status, entry.llc) == ("damaged", None)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def endless(path: Path) -> None:
    os.truncate(path, 2**40)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("name", ["run.json", "events.jsonl"])
@pytest.mark.parametrize("put", [pipe, endless, device, folder])
def test_what_is_no_file_is_an_error_and_hides_no_other_run(
    store: Path, name: str, put: Damage
) -> None:
    good = shutil.copytree(store, store.parent / "other")
    put(store / name)
    listed = {entry.name: entry for entry in listing.entries(store.parent)}
    assert listed["other"].llc == pytest.approx(ds.open(good).llc("ignore").mean, rel=1e-12)
    if "run" in listed:  # a folder is no manifest
        assert listed["run"].status == "damaged"
    with pytest.raises(StoreError):
        summary.diagnosis_text(ds.open(store))


LINES = ['{"time": 1.0}', '{"event": "started"}', '{"time": null, "event": "x"}', "[" * 200_000,
         '{"time": 1e308, "event": "started"}', '{"time": 1, "event": "verdict", "draws": "x"}',
         '{"time": 1, "event": "lost", "place": [], "chains": {}}', "\u2028", "7"]  # fmt: skip


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_a_line_that_is_no_event_is_passed_over(whole: Path, store: Path, line: str) -> None:
    with (store / "events.jsonl").open("a") as file:
        file.write(line + "\n")
    (entry,), (right,) = listing.entries(store), listing.entries(whole)
    assert (entry.llc, entry.verdict, entry.looked) == (right.llc, "CONVERGED", 100)
    assert watch.Follower(store).read().llc == pytest.approx(right.llc, rel=1e-12)
    assert "2 chains of 100 draws" in summary.diagnosis_text(ds.open(store))


def test_text_of_a_store_reaches_no_terminal_and_no_page_raw(store: Path) -> None:
    files = Files(store)
    made = manifest.read(files)
    manifest.write(files, made.replaced(reason=EVIL, retired={1: EVIL}, versions={EVIL: EVIL}))
    Trace(files).log(GateRound(7, EVIL, EVIL))
    for words in (["ls", str(store)], ["diagnose", str(store)], ["watch", str(store), "--once"]):
        out = CliRunner().invoke(cli.app, words, color=True).output
        assert "\x1b" not in out
        assert "\x07" not in out
        assert "\\x1b[31mEVIL [bold]" in out, out
    page = run_report.render(ds.open(store))
    assert "\x1b" not in page
    assert "EVIL [bold]&lt;script&gt;" in page


def test_a_report_follows_no_link(store: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (store / "report.html").symlink_to(victim)
    run_report.put("<html>", Files(store), None)
    assert victim.read_text() == "precious"
    assert (store / "report.html").read_text() == "<html>"


def test_what_a_store_names_is_said_and_imported_only_if_it_is_trusted() -> None:
    url = "memory://foreign/run"  # whose it is, nobody knows
    record = {
        "folder": "/nowhere", "restrict_to": None, "model": "evil.py:model",
        "data": "evil.py:data", "loss": "evil.py:loss", "model_kwargs": {}, "data_kwargs": {},
        "loss_kwargs": {},
    }  # fmt: skip
    config = ds.RunConfig(observables={"mine": "evil.py:mine"})
    facts: dict[str, Any] = {"fingerprint": {}, "versions": {}, "n_committed": (0,) * 4}
    Trace.create(url, Manifest(config=config, variables=COUNTED, recipe=record, **facts))
    said = list[str]()
    with pytest.raises(StoreError, match="add --trust"):
        stored_recipe(ds.open(url), [], False, said.append)
    assert "model evil.py:model" in said[0]
    assert "observable evil.py:mine" in said[0]
    with pytest.raises(ds.ConfigError, match=r"evil\.py:model' cannot be imported"):
        stored_recipe(ds.open(url), [], True, said.append)
    with pytest.raises(StoreError, match=r"observable evil\.py:mine; .* pass trust=True"):
        ds.resume(url, *regression(), squared_error)
    with pytest.raises(ds.ConfigError, match=r"evil\.py:mine' cannot be imported"):
        ds.resume(url, *regression(), squared_error, trust=True, pool=ds.SerialPool())


def test_an_own_store_is_trusted(store: Path) -> None:
    assert Files(store).own("run.json")
    if os.getuid() == 0:  # who alone can give a file away
        os.chown(store / "run.json", 12345, 12345)
        assert not Files(store).own("run.json")


def unsealed(store: Path) -> None:
    """Make a store as they were written before there were seals."""
    made = json.loads((store / "run.json").read_text())
    identity = made.pop("identity")
    made.pop("seal")
    (store / "run.json").write_text(json.dumps({**made, "schema_version": 1}))
    for path in (path for path in store.glob("trace.zarr/**/*") if path.is_file()):
        name = path.relative_to(store).as_posix()
        if path.name == "zarr.json":
            metadata = json.loads(path.read_text())
            del metadata["attributes"]["seal"]
            path.write_text(json.dumps(metadata))
        else:
            body = path.read_bytes()[: -4 - len(integrity._frame(identity, name))]
            path.write_bytes(body + google_crc32c.value(body).to_bytes(4, "little"))


def test_a_store_of_before_seals_is_read_and_written_as_before(whole: Path, store: Path) -> None:
    unsealed(store)
    old, new = (ds.open(path).llc("ignore") for path in (store, whole))
    assert (old.per_chain, old.interval) == (new.per_chain, new.interval)
    assert listing.entries(store)[0].llc == listing.entries(whole)[0].llc
    trace = Trace(store)
    trace.reopen(trace.manifest.config, 2)
    trace.seal("finished", "converged", 100, 1.0)
    assert ds.open(store).llc("ignore").mean == ds.open(whole).llc("ignore").mean
    edit(f"{POSTERIOR}/excess_loss/zarr.json", lambda o: o.update(fill_value=0.0))(store)
    with pytest.raises(StoreError, match="value of what is missing"):
        ds.open(store).llc("ignore")


def test_any_zarr_library_reads_the_arrays(whole: Path) -> None:
    tree = xr.open_datatree(whole / "trace.zarr", engine="zarr", consolidated=False)
    ours = ds.open(whole).posterior
    for name in ours.data_vars:
        assert np.array_equal(tree[f"posterior/{name}"].values, ours[name].values), name


def test_what_is_wide_of_a_run_without_kept_draws_is_empty(tmp_path: Path) -> None:
    config = ds.RunConfig(chains=2, draws=30, burn_in=25, probe=8)
    wide = (
        WideVariable("losses", "losses", ("example",), (8,)),
        WideVariable("weights/w", "w", ("row",), (3,), every=2),
    )
    facts: dict[str, Any] = {"fingerprint": {}, "versions": {}, "n_committed": (0, 0)}
    trace = Trace.create(
        tmp_path / "run", Manifest(config=config, variables=COUNTED, wide=wide, **facts)
    )
    trace.record_facts(Facts(N, Posterior(NBETA)), AtAnchor(None, 0.5, 0.4, np.zeros(8)))
    for chain in range(2):
        writer = WideWriter(trace.wide, chain)
        for draw in range(3):
            writer.put(draw, {"losses": np.ones(8), "weights/w": np.ones(3)})
        block = counted(chain, 0, 3)
        trace.commit([DrawBlock(chain, 0, block.values, b"state", wide=writer.flush())])
    run = ds.open(tmp_path / "run")
    assert run.losses.values.shape == (2, 0, 8)
    assert run.losses.draw.dtype == np.int64
    assert run.weights["w"].load().shape == (2, 0, 3)


def test_damage_at_random_gives_the_right_number_or_a_store_error(tmp_path: Path) -> None:
    for name, _, outcome in fuzz.fuzz(tmp_path, seed=2, share=0.003, reports=False):
        assert outcome.right + outcome.named, name
        assert not outcome.wrong, name

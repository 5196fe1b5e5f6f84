import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import distsampler as ds
from distsampler.analysis import inference_data
from distsampler.draws import AtAnchor
from distsampler.errors import StoreError
from distsampler.facts import Facts, Posterior
from distsampler.store import zarr_arrays, zarr_files
from distsampler.store.events import Started
from distsampler.store.files import Files
from distsampler.store.manifest import Manifest
from distsampler.store.trace import Trace
from tests.stores import COUNTED, counted


def make(path: Path, draws: int = 50, burn_in: int = 10, chains: int = 3) -> Trace:
    config = ds.RunConfig(chains=chains, draws=draws, burn_in=burn_in)
    facts: dict[str, Any] = {"fingerprint": {}, "versions": {}, "n_committed": (0,) * chains}
    return Trace.create(path, Manifest(config=config, variables=COUNTED, **facts))


def fill(trace: Trace, draws: int = 60, size: int = 7) -> None:
    for first in range(0, draws, size):
        trace.commit([counted(c, first, min(size, draws - first)) for c in range(3)])


def test_what_is_committed_is_read_whatever_the_blocks(tmp_path: Path) -> None:
    trace = make(tmp_path / "run")
    fill(trace)
    found = inference_data.datasets(Trace(tmp_path / "run"))
    for chain in range(3):
        expected = 1000.0 * chain + np.arange(60)
        assert np.array_equal(found["warmup_posterior"]["probe_loss"][chain], expected[:10])
        assert np.array_equal(found["posterior"]["probe_loss"][chain], expected[10:])
        assert np.array_equal(found["sample_stats"]["step"][chain], expected[10:])
        assert found["posterior"]["projections"][chain, 4, 2] == pytest.approx(expected[14] + 0.3)


def test_blocks_of_one_commit_may_follow_each_other_and_lag_behind(tmp_path: Path) -> None:
    trace = make(tmp_path / "run")
    trace.commit([counted(0, 0, 20), counted(0, 20, 5), counted(1, 0, 3)])
    assert trace.committed == (25, 3, 0)
    assert trace.state(0) == b"state 0 25"
    assert trace.state(2) is None
    assert Trace(tmp_path / "run").manifest.n_committed == (25, 3, 0)


def test_a_gap_is_refused(tmp_path: Path) -> None:
    trace = make(tmp_path / "run")
    trace.commit([counted(0, 0, 10)])
    with pytest.raises(StoreError, match="must continue at draw 10, got a block from 15"):
        trace.commit([counted(0, 15, 10)])
    assert trace.committed == (10, 0, 0)


def test_draws_that_exist_are_not_written_again(tmp_path: Path) -> None:
    trace = make(tmp_path / "run")
    trace.commit([counted(0, 0, 10)])
    again = counted(0, 0, 20)
    again.values["probe_loss"][:10] = 7.0
    trace.commit([again])
    trace.commit([counted(0, 3, 5)])
    assert trace.committed == (20, 0, 0)
    assert trace.read("warmup_posterior", "probe_loss")[0].tolist() == list(range(10))
    assert trace.state(0) == b"state 0 20"


def test_the_newest_two_states_are_kept(tmp_path: Path) -> None:
    trace = make(tmp_path / "run")
    fill(trace)
    names = sorted(p.name for p in (tmp_path / "run/checkpoints/chain-0001").iterdir())
    assert [name[:13] for name in names] == ["draw-00000056", "draw-00000060"]


def test_a_sealed_trace_is_cut_and_opens_as_it_is(tmp_path: Path) -> None:
    import arviz

    trace = make(tmp_path / "run")
    fill(trace)
    trace.record_facts(Facts(100, Posterior(3.0)), AtAnchor(None, 0.5, 0.25, np.zeros(8)))
    trace.seal("finished", "converged", 30, 1.0)
    tree = xr.open_datatree(tmp_path / "run/trace.zarr", engine="zarr", consolidated=False)
    assert tree["posterior"].sizes == {"chain": 3, "draw": 30, "projection": 3}
    assert not np.isnan(tree["posterior"]["probe_loss"]).any()
    assert arviz.InferenceData.from_datatree(tree).posterior.sizes["draw"] == 30
    again = Trace(tmp_path / "run")
    assert (again.kept, again.manifest.status) == (30, "finished")
    assert again.facts() == Facts(100, Posterior(3.0), law=again.manifest.law)
    losses = {"init_loss": 0.5, "probe_init_loss": 0.25}
    assert again.constants.numbers() == {"nbeta": 3.0, "n": 100.0, "localization": 0.0, **losses}


def test_a_retired_chain_leaves_the_posterior_and_keeps_its_draws(tmp_path: Path) -> None:
    trace = make(tmp_path / "run")
    fill(trace, 40)
    trace.commit([counted(0, 40, 20), counted(2, 40, 20)])
    trace.retire(1, "diverged")
    found = inference_data.datasets(trace)["posterior"]
    assert found["chain"].values.tolist() == [0, 2]
    assert found.sizes["draw"] == 50
    assert np.array_equal(trace.read("posterior", "probe_loss")[1, :30], 1000.0 + np.arange(10, 40))


def test_a_missing_chunk_below_the_count_is_an_error(tmp_path: Path) -> None:
    trace = make(tmp_path / "run")
    fill(trace)
    chunk = tmp_path / "run/trace.zarr/posterior/probe_loss/c/0/0"
    chunk.unlink()
    named = r"posterior/probe_loss/c/0/0 is missing or damaged: .* of chain 0 at draw 10, which was"
    with pytest.raises(StoreError, match=named):
        inference_data.datasets(trace)


def test_a_damaged_chunk_is_an_error(tmp_path: Path) -> None:
    trace = make(tmp_path / "run")
    fill(trace)
    chunk = tmp_path / "run/trace.zarr/posterior/probe_loss/c/0/0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(bytes(data))
    with pytest.raises(StoreError, match=r"posterior/probe_loss/c/0/0 is missing or damaged"):
        inference_data.datasets(trace)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 99}', '{"schema_version": 1}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    make(tmp_path / "run")
    (tmp_path / "run/run.json").write_text(text)
    with pytest.raises(StoreError, match=r"run\.json"):
        Trace(tmp_path / "run")


def test_a_torn_last_event_is_left_out(tmp_path: Path) -> None:
    trace = make(tmp_path / "run")
    trace.log(Started(1, {}))
    with (tmp_path / "run/events.jsonl").open("a") as file:
        file.write('{"event": "lo')
    assert [event["event"] for event in trace.events()] == ["started"]


@pytest.mark.parametrize("retired", [None, 1])
@pytest.mark.parametrize("every", [1, 3, 17])
def test_what_is_read_late_and_thinned_is_what_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, retired: int | None
) -> None:
    monkeypatch.setattr(zarr_arrays, "CHUNK", (64, 16))
    trace = make(tmp_path / "run")
    fill(trace)
    if retired is not None:
        trace.retire(retired, "diverged")
    for group in ("posterior", "sample_stats"):
        late, whole = (
            inference_data.lazy_groups(trace)[group],
            inference_data.datasets(trace)[group],
        )
        cut = {"draw": slice(None, None, every)}
        xr.testing.assert_identical(late.isel(cut).load(), whole.isel(cut))
        xr.testing.assert_identical(late.isel(draw=4).load(), whole.isel(draw=4))
        xr.testing.assert_identical(late.isel(chain=[1, 0]).load(), whole.isel(chain=[1, 0]))
    first = inference_data.lazy_groups(trace, 20)["posterior"]
    assert first.sizes["draw"] == 20
    assert first["probe_loss"][0, -1] == 29


def test_what_is_read_late_reads_no_more_than_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, read, names = make(tmp_path / "run", draws=3000), Files.read, list[str]()
    for first in range(0, 3010, 301):
        trace.commit([counted(chain, first, 301) for chain in range(3)])

    def watched(files: Files, name: str) -> bytes:
        names.append(name)
        return read(files, name)

    monkeypatch.setattr(Files, "read", watched)
    late = inference_data.lazy_groups(trace)["posterior"]
    assert not [name for name in names if "/c/" in name and "/draw/" not in name]
    names.clear()
    thin = late["probe_loss"].isel(draw=slice(1100, 3000, 900)).values
    assert thin[0].tolist() == [1110.0, 2010.0, 2910.0]
    chunks = {name.partition("probe_loss/")[2] for name in names if "/c/" in name}
    assert chunks == {"c/0/1", "c/0/2"}


def test_what_is_read_thinned_takes_the_memory_of_what_is_asked_for(tmp_path: Path) -> None:
    trace = make(tmp_path / "run", draws=200_000, burn_in=0)
    trace.commit([counted(chain, 0, 200_000) for chain in range(3)])
    late = inference_data.lazy_groups(trace)["posterior"]["projections"]  # 14.4 MB
    tracemalloc.start()
    thin = late.isel(draw=slice(None, None, 1000)).values
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert thin.shape == (3, 200, 3)
    assert peak < 3e6


@pytest.mark.parametrize("cut", [0, 4, 10])
@pytest.mark.parametrize("rows", [[0, 1, 2], [3, 4], [9, 1, 4, 3, 4], [6], []])
def test_rows_in_two_arrays_are_as_in_one(tmp_path: Path, cut: int, rows: list[int]) -> None:
    values = np.arange(40.0).reshape(4, 10)
    root = zarr_files.create_root(Files(tmp_path), "x", "id")
    first, rest = (
        root.create_array(name, data=part, chunks=(2, 3), fill_value=np.nan, **zarr_files.codecs())
        for name, part in (("first", values[:, :cut]), ("rest", values[:, cut:]))
    )
    stored = zarr_files.ZarrRows("x", [(first, 0), (rest, cut)])
    chains, draws = np.array([2, 0]), np.array(rows, np.int64)
    assert np.array_equal(stored.read(chains, draws), values[chains][:, draws])
    assert np.array_equal(stored.read(1, draws), values[1, draws])
    assert stored.whole([10, 5, 0, 3]).tolist() == [10, 5, 0, 3]
    hole = min(cut + 2, 9)
    rest[3, hole - cut :] = np.nan
    assert stored.whole([10, 10, 10, 10]).tolist() == [10, 10, 10, hole if cut < 10 else 10]


def test_what_is_read_by_rows_of_chains_is_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = make(tmp_path / "run")
    fill(trace)
    whole = inference_data.lazy_groups(trace)["posterior"].load()
    for rows in (1, 2, 3):
        monkeypatch.setattr(zarr_arrays, "CHUNK", (rows, 1024))
        trace = make(tmp_path / f"run-{rows}")
        fill(trace)
        trace.retire(1, "lost")
        read = inference_data.lazy_groups(trace)["posterior"].load()
        xr.testing.assert_identical(read, whole.sel(chain=[0, 2]))
    trace.retire(0, "lost")
    trace.retire(2, "lost")
    assert inference_data.lazy_groups(trace)["posterior"].load().sizes["chain"] == 0


def test_a_missing_chunk_is_an_error_when_it_is_met(tmp_path: Path) -> None:
    trace = make(tmp_path / "run")
    fill(trace)
    (tmp_path / "run/trace.zarr/posterior/probe_loss/c/0/0").unlink()
    late = inference_data.lazy_groups(trace)["posterior"]
    assert late["projections"].isel(draw=0).values.shape == (3, 3)
    with pytest.raises(StoreError, match=r"posterior/probe_loss/c/0/0 is missing or damaged"):
        late["probe_loss"].isel(draw=slice(None, None, 10)).values  # noqa: B018 (it is read)


def test_a_commit_touches_the_chunks_of_its_chains_only(tmp_path: Path) -> None:
    trace = make(tmp_path / "run", chains=150)
    trace.commit([counted(chain, 0, 12) for chain in range(150)])
    folder = tmp_path / "run/trace.zarr/posterior/probe_loss/c"
    before = {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/0")}
    assert before.keys() == {"0", "1", "2"}
    trace.commit([counted(70, 12, 5), counted(127, 12, 3)])
    after = {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/0")}
    assert [row for row in before if before[row] != after[row]] == ["1"]
    found = trace.read("posterior", "probe_loss")
    for chain, end in ((69, 12), (70, 17), (127, 15), (149, 12)):
        assert np.array_equal(found[chain, : end - 10], 1000.0 * chain + np.arange(10, end))
        assert np.isnan(found[chain, end - 10 :]).all()

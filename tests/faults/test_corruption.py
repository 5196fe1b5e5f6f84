"""Any file of a run directory may be damaged: it is computed again, or named; no wrong number."""

import functools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import distsampler as ds
from distsampler.errors import StoreError
from tests.assertions import digest
from tests.problems import config, regression, squared_error


def settings(block: int) -> ds.RunConfig:
    return config(
        draws=30, burn_in=6, thin=1, probe=8, commit_seconds=1e-9, save_losses=True,
        save_weights_every=4, placement=ds.PlacementConfig(block=block),
    )  # fmt: skip


def sample(store: Path) -> ds.Run:
    model, data = regression(n=60)
    return ds.sample(
        model, data, squared_error, settings(9), store=store, pool=ds.SerialPool(),
        resume="auto", quiet=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(sample(tmp_path_factory.mktemp("runs") / "finished").store)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped half way, as it lies on the disk."""
    store = tmp_path_factory.mktemp("runs") / "interrupted"
    running = ds.start(
        *regression(n=60), squared_error, settings(3), store=store, pool=_Stops(after=12)
    )
    _Stops.running = running
    assert running.wait(60).manifest.status == "interrupted"
    counts = ds.open(store).manifest.n_committed
    assert 6 < min(counts) < 36
    return store


class _Stops(ds.SerialPool):
    """Asks its run to stop after some works."""

    running: Any = None

    def __init__(self, after: int) -> None:
        super().__init__()
        self._left = after

    def wait(self, timeout: float) -> Any:
        self._left -= 1
        if self._left <= 0 and _Stops.running is not None:
            _Stops.running.stop()
        return super().wait(timeout)


def halve(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


Damage = Callable[[Path], None]
DAMAGES: list[Damage] = [halve, zero, Path.unlink]


def files_of(store: Path) -> list[str]:
    return sorted(p.relative_to(store).as_posix() for p in store.rglob("*") if p.is_file())


def outcome(work: Callable[[], ds.Run]) -> str:
    """The digest of a run, or what it was refused with, which must name the store's file."""
    try:
        return digest(work())
    except StoreError as error:
        text = str(error)
    return "named" if "/" in text and ("again" in text or "run.json" in text) else text


def check(source: Path, truth: str, names: list[str], damage: Damage, scratch: Path) -> None:
    """Damages files one at a time; opens the run, and continues it."""
    as_it_is = digest(ds.open(source))
    wrong, recovered, named = [], [], []
    for name in names:
        for going_on in (False, True):
            store = scratch / "run"
            shutil.copytree(source, store)
            damage(store / name)
            came = outcome(functools.partial(sample if going_on else ds.open, store))
            if came not in (truth if going_on else as_it_is, "named"):
                wrong.append((name, going_on, came))
            if going_on:
                (named if came == "named" else recovered).append(name)
            shutil.rmtree(store)
    assert not wrong
    assert all(name.endswith(".json") for name in named), named
    assert recovered


SOME = re.compile(
    r"run\.json|events\.jsonl|lease\.json|n_committed|nbeta|probe_losses|trace\.zarr/zarr\.json"
    r"|/posterior/(zarr\.json|probe_loss/|draw/zarr)|warmup_posterior/projections/c|step/c"
    r"|checkpoints/chain-0001|wide\.zarr/(zarr\.json|losses/|weights/weight/c/1)"
)


def test_no_damage_gives_a_wrong_number(interrupted: Path, finished: Path, tmp_path: Path) -> None:
    names = [name for name in files_of(interrupted) if SOME.search(name)]
    assert len(names) > 10
    check(interrupted, digest(ds.open(finished)), names, halve, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("which", ["finished", "interrupted"])
def test_no_damage_to_any_file_gives_a_wrong_number(
    request: pytest.FixtureRequest, finished: Path, tmp_path: Path, which: str, damage: Damage
) -> None:
    source = request.getfixturevalue(which)
    check(source, digest(ds.open(finished)), files_of(source), damage, tmp_path)

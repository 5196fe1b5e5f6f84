"""Numbers for other programs: Ray's metrics, the names of actors, and a function of the user's."""

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

import distsampler as ds
from distsampler.analysis.verdict import Status, Verdict
from distsampler.execution.metrics import METRICS, Logger, Metrics, logged, measured
from distsampler.execution.progress import Progress, Snapshot
from distsampler.store.events import Lost
from tests.problems import Held, config, regression, squared_error
from tests.processes import RAY_ENVIRONMENT, actors, committed, until
from tests.stores import rising


def snapshot(
    draws: int = 60, retired: tuple[int, ...] = (2,), lost: int = 1, judged: bool = False
) -> Snapshot:
    """Three chains that have come far, of which one is lost, and one restarts."""
    progress = Progress((0, 0, 0), burn_in=10, draws=90, nbeta=50.0)
    for first in range(0, draws, 20):
        for chain in range(3):
            progress.add(rising(chain, first, 20))
    for _ in range(lost):
        progress.lost(Lost(0, "hung", [1], 1, ""))
    if judged:
        progress.judged(Verdict(Status.NOT_CONVERGED, "R-hat", 1.25, 33.0))
    return progress.snapshot("sampling", retired, (draws, draws - 5, 7))


class Gauge:
    made: list["Gauge"]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.description, self.tag_keys = name, description, tag_keys
        self.values: dict[tuple[str, ...], float] = {}
        type(self).made.append(self)

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.tag_keys)
        self.values[tuple(tags[key] for key in self.tag_keys)] = value


def test_what_is_exported_is_what_the_snapshot_says() -> None:
    Gauge.made = []
    metrics, shown = Metrics(Gauge, "digits"), snapshot(judged=True)
    metrics.show(shown)
    values = {gauge.name: gauge.values for gauge in Gauge.made}
    assert set(values) == set(METRICS)
    assert values["distsampler_draws_committed"] == {("digits",): 60 + 55 + 7}
    states = {key[1]: value for key, value in values["distsampler_chains"].items()}
    assert states == {"running": 1, "restarting": 1, "lost": 1, "done": 0}
    assert values["distsampler_restarts"] == {("digits",): 1}
    assert values["distsampler_r_hat"] == {("digits",): shown.r_hat}
    assert values["distsampler_llc_running"] == {("digits",): pytest.approx(5.0)}
    assert values["distsampler_ess"][("digits",)] > 0
    assert values["distsampler_worst_r_hat"] == {("digits",): 1.25}
    assert values["distsampler_smallest_ess"] == {("digits",): 33.0}
    assert all(gauge.description == METRICS[gauge.name] for gauge in Gauge.made)


def test_what_is_not_known_is_not_exported() -> None:
    first = Progress((0, 0), 10, 90, 1.0).snapshot("starting", ())
    names = {name for name, _, _ in measured(first)}
    assert names == {"distsampler_draws_committed", "distsampler_chains", "distsampler_restarts"}


def test_the_ess_is_arvizs_of_the_chains_that_are_left() -> None:
    import arviz
    import numpy as np

    shown = snapshot(draws=80)
    values = np.array(shown.series)
    assert values.shape == (2, 70)
    assert shown.ess == pytest.approx(float(arviz.ess(values, method="bulk")))
    assert math.isnan(snapshot(draws=0).ess)


def test_metrics_are_set_at_commits_and_else_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    from distsampler.execution import metrics as module

    Gauge.made, now, sets = [], [0.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Gauge, "set", lambda self, value, tags: sets.append(self.name))
    metrics = Metrics(Gauge, "digits")
    for _ in range(10):
        metrics.show(snapshot())
        now[0] += 0.1
    assert sets.count("distsampler_r_hat") == 1
    metrics.show(snapshot(80))
    assert sets.count("distsampler_r_hat") == 2
    now[0] += 6
    metrics.show(snapshot(80))
    assert sets.count("distsampler_r_hat") == 3


def test_a_log_gets_the_draws_of_every_chain_and_provisional_numbers() -> None:
    step, values = logged(snapshot())
    assert step == 55, "a lost chain holds the step back"
    assert values["draws"] == 122
    assert values["lost_chains"] == 1
    assert values["provisional/llc"] == pytest.approx(5.0)
    assert set(values) == {
        "draws",
        "lost_chains",
        "provisional/llc",
        "provisional/r_hat",
        "provisional/ess",
    }
    assert "provisional/llc" not in logged(snapshot(draws=0))[1]
    assert logged(snapshot(judged=True))[1]["gate/r_hat"] == 1.25


def test_a_log_that_raises_is_a_warning_once() -> None:
    def broken(step: int, values: dict[str, float]) -> None:
        raise ConnectionError("no server")

    logger = Logger(broken)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for draws in (20, 40, 60):
            logger.show(snapshot(draws))
    assert len(said) == 1
    assert "the run's log function raised ConnectionError: no server" in str(said[0].message)


def test_the_log_of_a_run_ends_with_what_the_run_says(tmp_path: Path) -> None:
    said: list[tuple[int, dict[str, float]]] = []
    settings = config(draws=60, commit_seconds=1e-9, placement=ds.PlacementConfig(block=10))
    data = (*regression(), squared_error, settings)
    pool = ds.SerialPool
    run = ds.sample(
        *data, store=tmp_path / "a", pool=pool(), quiet=True, log=lambda s, v: said.append((s, v))
    )
    steps = [step for step, _ in said]
    assert steps == sorted(steps)
    assert len(steps) > 5
    assert steps[-1] == 70
    assert said[-1][1]["provisional/llc"] == pytest.approx(run.llc("ignore").mean)
    assert said[-1][1]["gate/r_hat"] == pytest.approx(run.diagnosis.r_hat)
    assert "gate/r_hat" not in said[-2][1]
    assert "provisional/llc" not in said[0][1], "burn-in is in the running LLC"
    longer: list[int] = []
    ds.resume(
        tmp_path / "a",
        *data[:3],
        draws=80,
        pool=pool(),
        quiet=True,
        log=lambda step, values: longer.append(step),
    )
    assert longer[-1] == 90
    heard: list[int] = []
    running = ds.start(*data, store=tmp_path / "b", pool=pool(), log=lambda s, v: heard.append(s))
    silent = running.wait()
    assert heard[-1] == 70
    assert running.progress is not None
    assert silent.posterior.equals(ds.open(tmp_path / "b").posterior)


def test_a_log_changes_no_bit_and_no_fault_of_it_ends_a_run(tmp_path: Path) -> None:
    def broken(step: int, values: dict[str, float]) -> None:
        raise ValueError("mine")

    data = (*regression(), squared_error, config(draws=20))
    plain = ds.sample(*data, store=tmp_path / "a", pool=ds.SerialPool(), quiet=True)
    with pytest.warns(UserWarning, match="raised ValueError: mine"):
        run = ds.sample(*data, store=tmp_path / "b", pool=ds.SerialPool(), quiet=True, log=broken)
    assert run.manifest.status == "finished"
    assert run.posterior.equals(plain.posterior)
    assert run.manifest.fingerprint == plain.manifest.fingerprint


EXPORTED = """
import socket, sys, time, urllib.request
import ray, torch
torch.set_num_threads(1)
import distsampler as ds
from tests.problems import config, regression, squared_error

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _metrics_export_port=port,
         object_store_memory=100 * 2**20, _system_config={"metrics_report_interval_ms": 500})
said = ""
def look(step, values):
    global said
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        text = page.read().decode()
    said = "\\n".join(l for l in text.splitlines() if l.startswith("ray_distsampler_")) or said
placement = ds.PlacementConfig(cpus_per_chain=0.5, gpus_per_chain=0, block=50)
settings = config(draws=8000, commit_seconds=1, max_seconds=20, placement=placement)
ds.sample(*regression(), squared_error, settings, store=sys.argv[1], quiet=True, log=look)
print(said)
ray.shutdown()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_rays_own_endpoint_has_the_metrics(tmp_path: Path) -> None:
    words = [sys.executable, "-W", "ignore", "-c", EXPORTED, str(tmp_path / "digits")]
    environment = {**os.environ, **RAY_ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[2])}
    out = subprocess.run(words, capture_output=True, text=True, timeout=200, env=environment)
    assert out.returncode == 0, out.stderr
    names = {line.partition("{")[0].removeprefix("ray_") for line in out.stdout.splitlines()}
    at_the_end = {"distsampler_worst_r_hat", "distsampler_smallest_ess"}  # it looks once, then
    assert set(METRICS) - at_the_end <= names <= set(METRICS), out.stdout + out.stderr
    assert all('run="digits"' in line for line in out.stdout.splitlines())


@pytest.mark.ray
def test_actors_have_names_that_read_well_and_survive_restarts(
    ray_cluster: None, tmp_path: Path
) -> None:
    import ray
    from ray._private.state import actors as all_actors

    from distsampler.execution.ray_actor import ChainActor

    def alive() -> set[str]:
        return {a["Name"] for a in all_actors().values() if a["State"] == "ALIVE"}

    placement = ds.PlacementConfig(cpus_per_chain=0.5, gpus_per_chain=0, block=5)
    settings = config(commit_seconds=0.1, placement=placement)
    held, store = tmp_path / "held", tmp_path / "digits"
    held.touch()  # nothing ends before the place that dies is up again
    data = (*regression(), Held(held, 0.02), settings)
    running = ds.start(*data, store=store)
    until(lambda: committed(store) and len(actors(store)) == 2)
    assert {"distsampler:digits:place-0", "distsampler:digits:place-1"} <= alive()
    ray.kill(ray.get_actor("distsampler:digits:place-0"))
    until(lambda: "distsampler:digits:place-0:2" in alive())
    held.unlink()
    run = running.wait()
    assert [event["event"] for event in run.events].count("lost") == 1
    serial = ds.SerialPool()
    again = ds.sample(*data, store=tmp_path / "other/digits", pool=serial, quiet=True)
    assert again.posterior.equals(run.posterior), "a name or a restart has changed the bits"
    actor = ChainActor.__new__(ChainActor)
    actor._name = "run=digits, place=3"
    assert repr(actor) == "ChainActor(run=digits, place=3)"


@pytest.mark.ray
def test_a_name_that_is_taken_is_done_without(ray_cluster: None, tmp_path: Path) -> None:
    import ray

    class Other:
        pass

    other = (
        ray.remote(num_cpus=0, num_gpus=0)(Other).options(name="distsampler:taken:place-0").remote()
    )
    placement = ds.PlacementConfig(cpus_per_chain=0.5, gpus_per_chain=0)
    settings = config(draws=20, placement=placement)
    run = ds.sample(*regression(), squared_error, settings, store=tmp_path / "taken", quiet=True)
    assert run.manifest.status == "finished"
    ray.kill(other)


@pytest.mark.ray
def test_what_the_pool_exports_is_what_ray_is_given(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.util.metrics import Gauge as RayGauge

    said: dict[str, dict[str, float]] = {}
    true_set = RayGauge.set

    def noted(self: Any, value: float, tags: dict[str, str] | None = None) -> None:
        true_set(self, value, tags)
        said.setdefault(self.info["name"], {})[(tags or {}).get("state", "")] = value

    monkeypatch.setattr(RayGauge, "set", noted)
    placement = ds.PlacementConfig(cpus_per_chain=0.5, gpus_per_chain=0)
    settings = config(draws=120, placement=placement)
    run = ds.sample(*regression(), squared_error, settings, store=tmp_path / "digits", quiet=True)
    assert set(said) == set(METRICS)
    assert said["distsampler_draws_committed"][""] == sum(run.manifest.n_committed) == 260
    assert said["distsampler_chains"]["done"] == 2
    assert said["distsampler_worst_r_hat"][""] == pytest.approx(run.diagnosis.r_hat)
    assert said["distsampler_smallest_ess"][""] == pytest.approx(run.diagnosis.ess)
    assert said["distsampler_llc_running"][""] == pytest.approx(run.llc("ignore").mean)

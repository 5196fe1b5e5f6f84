"""Real deaths: whatever dies, every draw is there once, and the trace is the same to the last bit.

The loss is slow as long as a test kills, then fast; the undisturbed run is one process's.
"""

import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import distsampler as ds
from distsampler.schedule import Schedule
from tests.assertions import assert_same
from tests.faults import job
from tests.faults.job import DriverProcess
from tests.faults.nodes import Nodes
from tests.processes import actors, committed, end, events, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]  # the machine may be busy
SHORT = 80  # draws of the fast tests
TWO = {"cpus_per_chain": 1, "chains_per_actor": 2}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> ds.Run:
    folder = tmp_path_factory.mktemp("serial")
    return job.sample(folder / "run", folder / "held", pool=ds.SerialPool())


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> ds.Run:
    folder = tmp_path_factory.mktemp("short")
    return job.sample(folder / "run", folder / "held", pool=ds.SerialPool(), draws=SHORT)


@pytest.fixture
def held(tmp_path: Path) -> Path:
    path = tmp_path / "held"
    path.touch()
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with Nodes() as nodes:
        yield nodes


@pytest.fixture
def nodes(cluster: Nodes) -> Nodes:
    cluster.restore()
    return cluster


def assert_nothing_lost(store: Path, undisturbed: ds.Run) -> ds.Run:
    """Every draw once, and the numbers of the undisturbed run to the last digit."""
    run = ds.open(store)
    assert run.manifest.status == "finished"
    assert not run.lost_chains
    steps = np.concatenate(
        [run._trace.read(f"{g}sample_stats", "step") for g in ("warmup_", "")], 1
    )
    assert (np.diff(steps, axis=1) == run.manifest.config.thin).all()
    assert steps.shape == (job.CHAINS, Schedule.of(run.manifest.config).total)
    assert_same(run, undisturbed)
    assert run.llc("ignore") == undisturbed.llc("ignore")
    return run


class Disturbance(threading.Thread):
    """Does something to a run of this process while it runs, then lets it go on."""

    def __init__(self, held: Path, disturb: Any) -> None:
        super().__init__()
        self._held, self._disturb = held, disturb
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._disturb()
        except BaseException as error:  # raised by check
            self.error = error
        self._held.unlink()

    def check(self) -> None:
        self.join()
        if self.error is not None:
            raise self.error


def test_an_actor_that_is_killed_changes_no_bit(
    ray_cluster: None, short: ds.Run, store: Path, held: Path
) -> None:
    def disturb() -> None:
        until(lambda: committed(store) and len(actors(store)) == 2)
        end(actors(store)[1])
        until(lambda: events(store, "lost"))

    disturbance = Disturbance(held, disturb)
    run = job.sample(store, held, draws=SHORT, placement=TWO)
    disturbance.check()
    (lost,) = [event for event in run.events if event["event"] == "lost"]
    assert (lost["fault"], lost["losses"]) == ("infrastructure", 1)
    assert_nothing_lost(store, short)


def test_an_actor_that_is_stopped_is_given_up_after_a_while(
    ray_cluster: None, short: ds.Run, store: Path, held: Path
) -> None:
    stopped: list[int] = []

    def disturb() -> None:
        until(lambda: committed(store) and len(actors(store)) == 2)
        stopped.append(actors(store)[1])
        end(stopped[0], signal.SIGSTOP)
        until(lambda: events(store, "lost"))

    disturbance = Disturbance(held, disturb)
    run = job.sample(store, held, draws=SHORT, placement={**TWO, "answer_timeout": 1.0})
    disturbance.check()
    (lost,) = [event for event in run.events if event["event"] == "lost"]
    assert "the actor has not answered for" in lost["reason"]
    assert lost["fault"] == "hung"
    assert_nothing_lost(store, short)
    until(lambda: stopped[0] not in actors(store))


def test_an_actor_that_is_killed_while_it_starts_is_started_again(
    ray_cluster: None, short: ds.Run, store: Path, held: Path
) -> None:
    import ray

    pool = ds.RayPool(**TWO)

    def disturb() -> None:
        slot = until(lambda: pool._slots.get(1))
        assert not slot.ready
        ray.kill(slot.actor)
        until(lambda: len(events(store, "started")) == 2)

    disturbance = Disturbance(held, disturb)
    job.sample(store, held, draws=SHORT, pool=pool)
    disturbance.check()
    assert_nothing_lost(store, short)


@pytest.mark.slow
def test_twenty_deaths_of_actors(
    nodes: Nodes, undisturbed: ds.Run, store: Path, held: Path
) -> None:
    chance = random.Random(1)
    with DriverProcess(store, held, placement={"address": nodes.address}) as driver:
        for _ in range(20):
            before = committed(store)
            driver.until(lambda n=before: committed(store) > n)
            time.sleep(chance.uniform(0.0, 2.0))  # the moment of the death, not a wait
            end(chance.choice(driver.until(lambda: actors(store))))
        held.unlink()
        driver.finish()
        lost = events(store, "lost")
        assert len(lost) == 20
        assert_nothing_lost(store, undisturbed)


@pytest.mark.slow
def test_deaths_of_nodes(nodes: Nodes, undisturbed: ds.Run, store: Path, held: Path) -> None:
    with DriverProcess(store, held, placement={"address": nodes.address}) as driver:
        for replaced in (False, True):
            before = len(events(store, "lost"))
            node = driver.until(lambda: _busiest(store))
            nodes.kill(node)
            driver.until(lambda n=before: len(events(store, "lost")) > n)
            if replaced:
                nodes.restore()
            driver.until(lambda: len(actors(store)) == job.CHAINS)
        held.unlink()
        driver.finish()
        assert_nothing_lost(store, undisturbed)


def _busiest(store: Path) -> str:
    """The node with most of the living actors, once all live and have committed."""
    living = set(actors(store))
    if len(living) < job.CHAINS or not committed(store):
        return ""
    homes = [e["node"] for e in events(store, "started") if int(e["pid"]) in living]
    return max(sorted(set(homes)), key=homes.count)


@pytest.mark.slow
def test_ten_deaths_of_the_driver(
    nodes: Nodes, undisturbed: ds.Run, store: Path, held: Path
) -> None:
    chance = random.Random(2)
    for death in range(10):
        before, commits = committed(store), chance.randint(1, 3)
        resume = "must" if death else "never"
        where = {"address": nodes.address}
        with DriverProcess(store, held, resume=resume, placement=where) as driver:
            for _ in range(commits):
                before = driver.until(lambda n=before: (c := committed(store)) > n and c)
            time.sleep(chance.uniform(0.0, 0.3))  # the moment of the death, not a wait
            assert driver.kill()
    held.unlink()
    with DriverProcess(store, held, resume="must", placement=where) as driver:
        driver.finish()
    run = assert_nothing_lost(store, undisturbed)
    assert run.manifest.epoch == 11


@pytest.mark.slow
def test_lost_requests_and_replies(
    nodes: Nodes, undisturbed: ds.Run, store: Path, tmp_path: Path
) -> None:
    failures = (
        '{"CoreWorkerService.grpc_client.PushTask": {"num_failures": 40, "req_failure_prob": 10, '
        '"resp_failure_prob": 10, "in_flight_failure_prob": 10}}'
    )
    free = tmp_path / "free"
    environment = {"RAY_testing_rpc_failure": failures}
    where = {"address": nodes.address, "block": 2}
    with DriverProcess(store, free, environment, placement=where) as driver:
        driver.finish()
        assert "may or may not have been executed" in driver.said()
    assert_nothing_lost(store, undisturbed)


@pytest.mark.slow
def test_a_node_that_will_go_away_gets_nothing_new(
    nodes: Nodes, undisturbed: ds.Run, store: Path, held: Path
) -> None:
    with DriverProcess(store, held, placement={"address": nodes.address}) as driver:
        leaving = driver.until(lambda: _busiest(store))
        nodes.drain(leaving, 300)
        driver.until(lambda: events(store, "draining"))
        driver.until(lambda: _homes(store) and leaving not in _homes(store))
        nodes.kill(leaving)
        held.unlink()
        driver.finish()
    assert not events(store, "lost")  # none had anything left to lose
    drained = {event["place"] for event in events(store, "draining")}
    assert all(leaving in event["reason"] for event in events(store, "draining"))
    started = [event for event in events(store, "started") if event["place"] in drained]
    assert len(started) == 2 * len(drained)
    assert_nothing_lost(store, undisturbed)


def _homes(store: Path) -> set[str]:
    """The nodes of the places, once all are up."""
    last = {event["place"]: event for event in events(store, "started")}
    up = all(int(event["pid"]) in actors(store) for event in last.values())
    return {event["node"] for event in last.values()} if up else set()


@pytest.mark.slow
def test_an_actor_that_takes_too_much_memory_is_told_what_to_do(
    short: ds.Run, store: Path, held: Path
) -> None:
    total, used = _memory()
    hungry = {
        "RAY_memory_monitor_refresh_ms": "100",
        "RAY_memory_usage_threshold": f"{(used + 3e9) / total:.4f}",
    }
    one = {"chains_per_actor": 4, "address": "local"}
    with DriverProcess(
        store, held, hungry, seconds=5.0, memory=5 * 10**9, draws=SHORT, placement=one
    ) as driver:
        assert driver.process.wait(240) == 1
        assert "ran out of memory 3 times: lower batch_size" in driver.said()
    assert [event["fault"] for event in events(store, "lost")] == ["memory"] * 3
    held.unlink()
    with DriverProcess(store, held, resume="must", draws=SHORT, placement=one) as driver:
        driver.finish()
    assert_nothing_lost(store, short)


def _memory() -> tuple[float, float]:
    """Bytes of the machine, and of those in use, as Ray's monitor counts."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    size = {line.split(":")[0]: 1024.0 * int(line.split()[1]) for line in lines}
    return size["MemTotal"], size["MemTotal"] - size["MemAvailable"]

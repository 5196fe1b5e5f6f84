"""Runs on clusters of several nodes, with code that no node has: only the job brings it."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

import distsampler as ds
from distsampler import recipe
from tests.assertions import assert_same
from tests.faults.nodes import Nodes
from tests.processes import RAY_ENVIRONMENT, until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
CLI = [sys.executable, "-c", "from distsampler.cli import main; main()"]
NET = """
import torch
from torch import nn

class Net(nn.Linear):
    pass

def data():
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    return x, x.sum(1, keepdim=True)

def model():
    net = Net(3, 1, bias=False)
    nn.init.ones_(net.weight)
    return net
"""
LOSS = """
def squared(model, batch):
    inputs, targets = batch
    return (model(inputs) - targets).square().sum(1)
"""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A configuration, and the modules that it names."""
    package = tmp_path / "work/landscape"
    package.mkdir(parents=True)
    (package / "net.py").write_text(NET)
    (package / "losses.py").write_text(LOSS)
    (package / "__init__.py").touch()
    fields = {
        "model": "landscape.net:model", "data": "landscape.net:data",
        "loss": "landscape.losses:squared", "device": "cpu", "chains": 6, "draws": 120,
        "burn_in": 20, "batch_size": 16, "probe": 32, "placement": {"gpus_per_chain": 0},
        "sampler": {"name": "sgld", "lr": 1e-3, "localization": 10.0},
    }  # fmt: skip
    (package.parent / "config.yaml").write_text(yaml.safe_dump(fields))
    return package.parent


def outcome(command: list[str], folder: Path, **variables: str) -> tuple[int, str]:
    """Exit code and text of a program."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), **RAY_ENVIRONMENT, **variables}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def in_one_process(work: Path, store: Path) -> ds.Run:
    asked = recipe.load(work / "config.yaml")
    return ds.sample(asked.model, asked.data, asked.loss, asked.config, store=store,
                     pool=ds.SerialPool(), quiet=True)  # fmt: skip


def homes(run: ds.Run) -> set[str]:
    return {event["node"] for event in run.events if event["event"] == "started"}


def test_modules_that_only_the_runtime_environment_brings_reach_three_nodes(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(work))
    serial = in_one_process(work, tmp_path / "serial")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    brought: list[dict[str, Any]] = [
        {"working_dir": str(work)}, {"py_modules": [str(work / "landscape")]}, {}
    ]  # fmt: skip
    with Nodes(workers=3, cpus=2) as nodes:
        for number, environment in enumerate(brought):
            store = tmp_path / f"run{number}"
            code, said = outcome(
                [*CLI, "run", str(work / "config.yaml"), "--store", str(store), "--quiet",
                 "--set", f"placement.address={nodes.address}",
                 "--set", f"placement.runtime_env={json.dumps(environment)}"],
                elsewhere, PYTHONPATH=f"{work}:{ROOT}",
            )  # fmt: skip
            if environment:
                assert code in (0, 3), said
                run = ds.open(store)
                assert homes(run) == set(nodes.ids)
                assert_same(run, serial)
    assert code == 1
    assert "must have the module 'landscape', and does not: install it on all nodes" in said


def test_a_cluster_that_grows_is_waited_for(work: Path, tmp_path: Path) -> None:
    store = tmp_path / "run"
    with Nodes(workers=0) as nodes, ThreadPoolExecutor(1) as pool:
        command = [*CLI, "run", "config.yaml", "--store", str(store), "--quiet",
                   "--set", "placement.autoscale=true",
                   "--set", f"placement.address={nodes.address}"]  # fmt: skip
        running = pool.submit(outcome, command, work, PYTHONPATH=str(ROOT))
        until((store / "run.json").exists)  # it has asked for its actors, and no node has room
        nodes.grow(1)
        code, said = running.result(300)
    assert code in (0, 3), said
    assert homes(ds.open(store)) == set(nodes.ids)


def test_a_submitted_job_runs_from_the_folder_that_comes_with_it(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(work))
    store = tmp_path / "run"
    with Nodes(workers=1, cpus=2, dashboard=True) as nodes:
        submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit"]
        where = ["--address", nodes.url, "--working-dir", str(work)]
        job = [*CLI, "run", "config.yaml", "--store", str(store), "--resume", "auto", "--quiet"]
        command = [*submit, *where, "--", *job]
        first = outcome(command, tmp_path)
        again = outcome(command, tmp_path)
    for code, said in (first, again):  # the second finds the run finished
        assert code in (0, 1), said  # of a job that was not converged, 1
        assert f"run {store}" in said, said
    assert homes(ds.open(store)) == set(nodes.ids)
    assert_same(ds.open(store), in_one_process(work, tmp_path / "serial"))

"""What the README and the guide say is run here."""

import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import distsampler as ds
from distsampler import recipe
from distsampler.sweeps import recipe as sweep_recipe
from tests.chains.test_sampler_trial import both
from tests.execution.test_pools import assert_same
from tests.problems import config, regression, squared_error


def cross_entropy(model: nn.Module, batch: Any) -> torch.Tensor:
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs), targets, reduction="none")


ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "scripts/guide.md")
README = "".join(page.read_text() for page in PAGES)


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::distsampler.errors.NotConvergedWarning")
def test_the_python_of_the_readme_runs(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[:1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 17
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 4, generator=generator)
    train_set = torch.utils.data.TensorDataset(inputs, (inputs[:, 0] > 0).long())
    # The cluster of the tests has GPUs by name only: the README's default would ask for them.
    code = code.replace("seed=0,", 'seed=0, device="cpu",')
    names: dict[str, Any] = {"model": nn.Linear(4, 2), "train_set": train_set}
    exec(compile(code, "README.md", "exec"), names)
    assert re.match(r"LLC \S+ \+- \S+ \| 4 of 4 chains, R-hat ", capsys.readouterr().out)
    assert names["run"].manifest.status == "finished"
    assert (tmp_path / "runs/digits/run.json").exists()


@pytest.mark.ray
def test_the_sampler_of_the_readme_runs_and_its_bits_are_those_of_one_process(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n# my_samplers.py\n(.*?)```", README, re.DOTALL)
    (tmp_path / "my_samplers.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    (name,) = re.findall(r'SamplerConfig\((name="my_samplers.*?)\)`', README)
    sampler = eval(f"ds.SamplerConfig({name})", {"ds": ds})
    there = {"env_vars": {"PYTHONPATH": f"{tmp_path}:{ROOT}"}}
    placement = ds.PlacementConfig(cpus_per_chain=0.5, runtime_env=there)
    serial, ray = both(config(sampler=sampler, placement=placement), tmp_path)
    assert_same(ray, serial)
    steps = ray.inference_data["sample_stats"]["steps"].values
    assert steps.tolist() == [list(range(33, 153, 3))] * 2


@pytest.mark.ray
def test_the_sweep_of_the_readme_runs(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(# one LLC .*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 4, generator=generator)
    model = nn.Sequential(OrderedDict(body=nn.Linear(4, 3), head=nn.Linear(3, 2)))
    (tmp_path / "checkpoints").mkdir()
    for step in (10, 20):
        torch.save(model.state_dict(), tmp_path / f"checkpoints/step{step}.pt")
    names: dict[str, Any] = {
        "ds": ds,
        "model": model,
        "train_set": (inputs, (inputs[:, 0] > 0).long()),
        "loss": cross_entropy,
        "config": config(draws=20, burn_in=5),
    }
    code = code.replace(
        '.run("step20--head--hot").llc()', '.run("step20--head--hot").llc("ignore")'
    )
    exec(compile(code, "README.md", "exec"), names)
    assert dict(names["table"].sizes) == {
        "checkpoint": 2, "restriction": 2, "setting": 2, "data": 1,
    }  # fmt: skip
    assert names["sweep"].counts() == {"finished": 8}
    assert (tmp_path / "training.csv").read_text().count("\n") == 9


def test_the_sweep_file_of_the_readme_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(sweep:\n.*?)```", README, re.DOTALL)
    found = sweep_recipe.SweepConfig(**yaml.safe_load(block)["sweep"])
    assert found.settings == {"cold": {}, "hot": {"sampler.nbeta": 10.0}}
    assert found.restrictions == {"all": None, "head": ["head[.].*"]}


def test_the_loggers_of_the_readme_get_each_number() -> None:
    (code,) = re.findall(r"```python\n# Weights & Biases.*?\n(.*?)```", README, re.DOTALL)
    said: list[Any] = []

    class Heard:
        """Any of the three: what it is called with."""

        def log(self, values: dict[str, float], step: int) -> None:
            said.append((step, values))

        log_metrics = log

        def add_scalar(self, name: str, value: float, step: int) -> None:
            said.append((step, {name: value}))

        def sample(self, *data: Any, log: Any) -> None:
            log(7, {"provisional/llc": 3.0})

    data = dict.fromkeys(("model", "data", "loss", "config"))
    one = dict.fromkeys(("ds", "wandb", "mlflow", "writer"), Heard())
    exec(code, {**data, **one})
    assert said == [(7, {"provisional/llc": 3.0})] * 3


def test_the_command_lines_of_the_readme_are_understood(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.cluster.command_lines"]
    done = subprocess.run([*command, *PAGES], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    count, lines = map(int, re.findall(r"\d+", done.stdout))
    assert count == lines >= 12
    wrong = tmp_path / "wrong.md"
    wrong.write_text("    distsampler llc runs/one --no-such-option\n")
    done = subprocess.run([*command, wrong], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert "no such option" in done.stderr.lower()


def test_files_that_the_readme_names_exist() -> None:
    for path in re.findall(r"(?:scripts|cluster)/[\w./-]*\w", README):
        assert (ROOT / path).exists(), path


def test_the_demos_config_is_one() -> None:
    found = recipe.load(
        ROOT / "scripts/examples/mnist.yaml",
        ["model=tests.user_code:model", "data=tests.user_code:data", "loss=tests.user_code:loss"],
    ).config
    assert found.chains == 4


def test_the_shards_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(def make_shard.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    model, (x, y) = regression(n=6400)
    for index in range(32):
        torch.save((x[index::32], y[index::32]), f"shards/{index:04d}-of-32.pt")
    code = code.replace("sampler=...,", "**short,").replace("store=", "pool=pool, store=")
    few = config(sampler=ds.SamplerConfig(lr=1e-4, localization=10.0))
    short = {name: getattr(few, name) for name in few.model_fields_set}
    names: dict[str, Any] = {"ds": ds, "torch": torch, "model": model, "loss": squared_error}
    names |= {"short": short, "pool": ds.SerialPool()}
    exec(compile(code, "README.md", "exec"), names)
    assert names["run"].manifest.status == "finished"
    assert abs(names["run"].facts["hop_bias"]) < 0.02

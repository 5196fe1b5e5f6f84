"""Each mistake gives one clear error, and nothing is written."""

import os
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

import distsampler as ds
from distsampler.cli import main
from distsampler.errors import DistsamplerError, StoreError
from tests.problems import config, regression, squared_error
from tests.processes import command, written

MODEL, DATA = regression()


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def sample(store: Path, **given: Any) -> ds.Run:
    fields = {"model": MODEL, "data": DATA, "loss": squared_error, **given}
    sampler = fields.pop("sampler", None)
    settings = fields.pop("config", None) or (config(sampler=sampler) if sampler else config())
    parts = [fields.pop(name) for name in ("model", "data", "loss")]
    return ds.sample(*parts, settings, store=store, pool=ds.SerialPool(), quiet=True, **fields)


def frozen() -> nn.Module:
    model, _ = regression()
    model.requires_grad_(False)
    return model


class Spare(nn.Module):
    """A model with a parameter that its output does not depend on."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.inner = regression()[0]
        self.spare = nn.Parameter(torch.zeros(3, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.inner(x))


def sgld(**options: Any) -> ds.SamplerConfig:
    return ds.SamplerConfig(**options)


CASES: list[tuple[str, Callable[[], dict[str, Any]], str]] = [
    ("unknown option of the config", lambda: {"config": config(drawss=3)}, "did you mean 'draws'"),
    ("unknown option of the sampler", lambda: {"sampler": sgld(localisation=1.0)}, "did you mean 'localization'"),
    ("unknown sampler", lambda: {"sampler": sgld(name="sgdl")}, "did you mean 'sgld'"),
    ("sampler that is none", lambda: {"sampler": sgld(name="torch.optim:SGD")}, "must take generator="),
    ("wrong type", lambda: {"config": config(draws="ten")}, "draws: input should be a valid integer"),
    ("lr zero", lambda: {"sampler": sgld(lr=0.0)}, "lr must be"),
    ("lr negative", lambda: {"sampler": sgld(lr=-1e-3)}, "lr must be"),
    ("lr NaN", lambda: {"sampler": sgld(lr=float("nan"))}, "lr must be"),
    ("lr as text", lambda: {"sampler": sgld(lr="small")}, "lr must be"),
    ("callable nbeta", lambda: {"sampler": sgld(nbeta=lambda step: 1.0)}, "sampler.nbeta must be a number"),
    ("no chains", lambda: {"config": config(chains=0)}, "chains: input should be greater than or equal to 1"),
    ("batch over the data", lambda: {"config": config(batch_size=301)}, "at most the number of examples, 300: got 301"),
    ("empty data", lambda: {"data": (torch.empty(0, 5), torch.empty(0, 1))}, "at least one example, got none"),
    ("iterable data", lambda: {"data": Stream()}, "must be map-style"),
    ("loss of a wrong shape", lambda: {"loss": lambda m, b: squared_error(m, b)[:, None]}, r"got shape (2, 1)"),
    ("loss that is no tensor", lambda: {"loss": lambda m, b: 1.0}, "got float"),
    ("loss without gradient", lambda: {"loss": lambda m, b: squared_error(m, b).detach()}, "needs no gradient"),
    ("loss that raises", lambda: {"loss": lambda m, b: m(b)}, "must work on 2 examples, but it raised TypeError"),
    ("loss that is none", lambda: {"loss": None}, "must be callable"),
    ("model without parameters", lambda: {"model": nn.ReLU()}, "has 0 parameters"),
    ("frozen model", lambda: {"model": frozen()}, "none of them trainable"),
    ("model that is none", lambda: {"model": 3}, "must be a torch.nn.Module, got int"),
    ("pattern that matches nothing", lambda: {"config": config(restrict_to="wieght")}, "did you mean 'weight'"),
    ("pattern that is none", lambda: {"config": config(restrict_to="(")}, "regular expressions"),
    ("a part that the loss does not use", lambda: {"model": Spare(), "config": config(restrict_to="spare")}, "restrict_to"),
    ("complex parameters", lambda: {"model": Spare(torch.complex64), "loss": lambda m, b: squared_error(m.inner, b)}, "split a complex parameter"),
    ("acceptance on shards", lambda: {"config": config(data_mode="hop", shards=2, sampler=sgld(lr=1e-4, save_mala_vars=True))}, "leave save_mala_vars out"),
    ("resume of nothing", lambda: {"resume": "must"}, "resume='must' needs a run"),
    ("resume misspelt", lambda: {"resume": "yes"}, "'never', 'auto' or 'must'"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "sentence"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_mistake_is_one_clear_error_and_writes_nothing(
    tmp_path: Path, make: Callable[[], dict[str, Any]], sentence: str
) -> None:
    with pytest.raises(DistsamplerError) as caught:
        sample(tmp_path / "run", **make())
    assert sentence in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_exists_says_what_to_do(tmp_path: Path) -> None:
    short = config(draws=3, burn_in=0)
    sample(tmp_path / "run", config=short)
    before = (tmp_path / "run/run.json").read_bytes()
    with pytest.raises(
        StoreError, match=r"give another store, read it with .* resume='auto', or delete"
    ):
        sample(tmp_path / "run", config=short)
    assert (tmp_path / "run/run.json").read_bytes() == before


def test_a_store_that_may_not_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.geteuid() == 0:  # root may write anywhere: ask as the mode bits would answer others
        monkeypatch.setattr(os, "access", lambda path, mode: os.stat(path).st_mode & stat.S_IWUSR)
    with pytest.raises(StoreError, match="must be writable"):
        sample(tmp_path / "run")


def test_a_run_is_only_continued_as_it_was_started(tmp_path: Path) -> None:
    sample(tmp_path / "run", config=config(draws=3))
    with pytest.raises(StoreError) as caught:
        sample(tmp_path / "run", config=config(draws=3, thin=4, seed=5), resume="auto")
    assert "config.thin: stored 3, now 4" in str(caught.value)
    assert "config.seed: stored 0, now 5" in str(caught.value)
    x, y = DATA
    with pytest.raises(StoreError, match="data: stored"):
        sample(tmp_path / "run", config=config(draws=3), data=(x + 1, y), resume="auto")


def test_cautions_of_the_sampler_are_said_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="noise_level") as seen:
        sample(tmp_path / "run", config=config(draws=3, sampler=sgld(lr=1e-4, noise_level=0.5)))
    assert sum("noise_level" in str(w.message) for w in seen) == 1


def test_the_bare_optimizer_warns_of_nbeta_one() -> None:
    with pytest.warns(UserWarning, match="nbeta is 1"):
        ds.SGLD([torch.zeros(3, requires_grad=True)], lr=1e-3)


def test_a_single_chain_is_sampled_and_undetermined(tmp_path: Path) -> None:
    run = sample(tmp_path / "run", config=config(chains=1, draws=120))
    assert run.verdict.status == "UNDETERMINED"


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The console script in this process: exit code and standard error."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["distsampler", *map(str, words)])
        monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


CLI: list[tuple[str, dict[str, Any], list[str], str]] = [
    ("unknown option", {"drawz": 3}, [], "unknown option 'drawz': did you mean 'draws'"),
    ("unknown nested option", {"gate": {"rhatt": 1.1}}, [], "did you mean 'rhat'"),
    ("unknown sampler option", {}, ["--set", "sampler.lrr=1"], "did you mean 'lr'"),
    ("wrong type", {}, ["--set", "draws=many"], "draws: input should be a valid integer"),
    ("lr zero", {}, ["--set", "sampler.lr=0"], "lr must be"),
    ("model without a colon", {"model": "torch"}, [], "'module:callable'"),
    ("model that is not there", {"model": "no_such_module:model"}, [], "cannot be imported: ModuleNotFoundError"),
    ("model file that is not there", {"model": "nowhere.py:model"}, [], "cannot be imported: FileNotFoundError"),
    ("model that is not callable", {"model": "tests.user_code:not_callable"}, [], "is not callable: int"),
    ("model that raises", {"model_kwargs": {"depth": 3}}, [], "raised TypeError"),
    ("no model", {"model": None}, [], "model: must be"),
    ("set without value", {}, ["--set", "draws"], "--set needs key=value"),
    ("set to what is no YAML", {}, ["--set", "sampler.lr=[1"], "--set sampler.lr: the value must be YAML, got '[1'"),
    ("kwargs that are a list", {"loss_kwargs": [1]}, [], "loss_kwargs must hold options as 'name: value', got [1]"),
    ("option without a name", {"sampler": {1: 2}}, [], "sampler must hold options as 'name: value', got {1: 2}"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words", "sentence"), [c[1:] for c in CLI], ids=[c[0] for c in CLI]
)
def test_a_mistake_on_the_command_line_is_one_sentence(
    tmp_path: Path, here: Command, changes: dict[str, Any], words: list[str], sentence: str
) -> None:
    code, error = here("run", written(tmp_path, **changes), "--store", tmp_path / "run", *words)
    assert code == 2
    assert sentence in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("chains: 2\n  draws: [\n", "line 2"),
        ("- a\n- b\n", "must hold options as 'key: value', got list"),
        (None, "must be readable"),
        ("chains: \udcff", "must be readable text"),
    ],
)
def test_a_file_that_is_no_config_is_named(
    tmp_path: Path, here: Command, text: str | None, sentence: str
) -> None:
    file = tmp_path / "config.yaml"
    if text is not None:
        file.write_bytes(text.encode(errors="surrogateescape"))
    code, error = here("run", file, "--store", tmp_path / "run")
    assert code == 2
    assert sentence in error


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "--calibrate", "--store", "run"], "must not exist, but it holds a run"),
        (["run", "--calibrate", "--store", "new", "--resume", "yes"], "'never', 'auto' or 'must'"),
        (["calibrate", "--out", "no/such.yaml"], "must be a file in a folder that can be written"),
        (["calibrate", "--heatmap", "chart.foo"], "--heatmap must end in one of ."),
    ],
)
def test_what_calibration_could_not_keep_is_refused_before_a_pilot_runs(
    tmp_path: Path, here: Command, monkeypatch: pytest.MonkeyPatch, words: list[str], sentence: str
) -> None:
    def pilots(*_: object, **__: object) -> None:
        raise AssertionError("a pilot ran")

    monkeypatch.setattr("distsampler.sampling.calibration.calibrate", pilots)
    sample(tmp_path / "run", config=config(draws=3))
    file = written(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, error = here(words[0], file, *words[1:])
    assert code == 2
    assert sentence in error


@pytest.mark.parametrize("verb", ["llc", "diagnose", "report"])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, here: Command, verb: str) -> None:
    code, error = here(verb, tmp_path)
    assert code == 2
    assert "holds no run.json" in error


@pytest.mark.ray
def test_a_process_of_its_own_prints_no_traceback(tmp_path: Path) -> None:
    config = written(tmp_path, placement={"gpus_per_chain": 3}, device="auto")
    out = command("run", config, "--store", tmp_path / "run")
    assert out.returncode == 2
    assert out.stderr.startswith("error: one node must hold an actor of 1 CPU and 3 GPU")
    assert "Traceback" not in out.stderr
    assert not (tmp_path / "run").exists()

"""Everything that the README and the guide tell a reader to run is run here."""

import inspect
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
import transformers
import yaml
from torch import nn

import distsampler as ds
from distsampler import recipe
from distsampler.models.restriction import selected
from distsampler.sampling.prepare import prepare
from distsampler.sweeps import recipe as sweep_recipe
from tests.assertions import assert_same
from tests.models.transformers_by_type import ROWS, Toy, token_losses, tokens
from tests.problems import config, regression, squared_error

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "distsampler/guide").glob("*.md")))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SAMPLER = "# my_samplers.py\n"
README_LINE = r"LLC \S+ \+- \S+ \| 4 of 4 chains, R-hat "


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """Every fenced block of a language, with the page that it stands on."""
    for page in PAGES:
        for found, code in BLOCK.findall(page.read_text()):
            if found == language:
                yield page.stem, code


PYTHON = list(blocks("python"))


def cross_entropy(model: nn.Module, batch: Any) -> torch.Tensor:
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs), targets, reduction="none")


def classifier() -> tuple[nn.Module, Any]:
    """A model with a body and a head, and data with two classes."""
    inputs = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(OrderedDict(body=nn.Linear(4, 3), head=nn.Linear(3, 2)))
    return model, torch.utils.data.TensorDataset(inputs, (inputs[:, 0] > 0).long())


def in_this_process() -> SimpleNamespace:
    """The package, with chains that run in this process where a block does not name a pool."""

    def sample(*parts: Any, **options: Any) -> ds.Run:
        return ds.sample(*parts, **{"pool": ds.SerialPool(), "quiet": True, **options})

    def calibrate(*parts: Any, **options: Any) -> Any:
        return ds.calibrate(*parts, **{"pool": ds.SerialPool(), **options})

    public = {name: getattr(ds, name) for name in ds.__all__}
    return SimpleNamespace(**{**public, "sample": sample, "calibrate": calibrate})


def run(page: str, code: str, /, **names: Any) -> dict[str, Any]:
    """The names that a block leaves, after it was given those that its page takes for granted."""
    model, train_set = classifier()
    common = {"model": model, "train_set": train_set, "loss": cross_entropy, "torch": torch}
    space: dict[str, Any] = {"ds": in_this_process(), "F": nn.functional, **common, **names}
    exec(compile(code, f"{page}.md", "exec"), space)
    return space


def block_of(page: str, beginning: str) -> str:
    (code,) = [code for name, code in PYTHON if name == page and code.startswith(beginning)]
    return code


def test_every_block_has_a_test() -> None:
    """A new block needs a test: this one names those that have one."""
    tested = {
        ("README", "import torch.nn.functional as F"),
        ("README", "from transformers import ByT5Tokenizer"),
        ("calibration", "chosen = ds.calibrate"),
        ("components", "parts = ds.components(model)"),
        ("components", "patterns = {"),
        ("language-models", "rows = ds.lm.blocks("),
        ("observables", "def token_losses"),
        ("presets", "config = ds.RunConfig.from_preset("),
        ("probes", "config = ds.RunConfig("),
        ("samplers", SAMPLER.strip()),
        ("shards", "def make_shard"),
        ("sweeps", "# one LLC for every checkpoint"),
        ("verdict", "config = ds.RunConfig("),
        ("watching", "# Weights & Biases, MLflow, TensorBoard"),
    }
    there = [(page, code.splitlines()[0]) for page, code in PYTHON]
    assert len(there) == len(tested)
    for page, line in there:
        assert any(page == p and line.startswith(start) for p, start in tested), (page, line)
    languages = {kind for page in PAGES for kind, _ in BLOCK.findall(page.read_text())}
    assert languages == {"python", "text", "yaml"}
    assert [page for page, _ in blocks("yaml")] == ["probes", "sweeps"]
    assert [page for page, _ in blocks("text")] == ["README"]  # the line that its example prints


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::distsampler.errors.NotConvergedWarning")
def test_the_example_of_the_readme_runs(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    code = block_of("README", "import torch")
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    monkeypatch.chdir(tmp_path)
    # The cluster of the tests has GPUs by name only: the README's default would ask for them.
    code = code.replace("seed=0,", 'seed=0, device="cpu",')
    names = run("README", code, ds=ds)
    assert re.match(README_LINE, capsys.readouterr().out)
    assert names["run"].manifest.status == "finished"
    assert (tmp_path / "runs/digits/run.json").exists()


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::distsampler.errors.NotConvergedWarning")
def test_the_ten_lines_of_the_readme_read_one_head_on_two_texts(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    code = block_of("README", "from transformers")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    # The cluster of the tests has GPUs by name only: the default would ask for them.
    code = code.replace('restrict_to="l0h1"', 'restrict_to="l0h1", device="cpu"')
    texts = {"prose": topics["assignment"][:2_100], "source": inspect.getsource(re)[:1_000]}
    names = run("README", code, ds=ds, **texts)
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"LLC \S+ \+- \S+ \| 4 of 4 chains, ", lines[0])
    assert re.match(r"data-refined LLC \S+ \+- \S+ on code, ", lines[-1])
    losses = names["run"].losses_of("code")
    excess = (losses - losses.losses_at_anchor).mean("example")
    expected = 30.0 * float(excess.mean())
    assert names["run"].llc("ignore", probe="code").mean == pytest.approx(expected, rel=1e-3)
    assert dict(losses.sizes) == {"chain": 4, "draw": 100, "example": len(names["code"])}


def test_the_readme_shows_a_line_as_it_is_printed() -> None:
    (line,) = re.findall(r"^(LLC .*)$", README.read_text(), re.MULTILINE)
    assert re.match(README_LINE, line)
    assert re.search(r"\| n \d+, nbeta [\d.]+, gamma \d+, sgld lr [\de.-]+$", line)


@pytest.mark.ray
def test_the_sampler_of_the_guide_runs_and_its_bits_are_those_of_one_process(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_samplers.py").write_text(block_of("samplers", SAMPLER))
    monkeypatch.syspath_prepend(str(tmp_path))
    text = (ROOT / "distsampler/guide/samplers.md").read_text()
    (name,) = re.findall(r'SamplerConfig\((name="my_samplers.*?)\)`', text)
    sampler = eval(f"ds.SamplerConfig({name})", {"ds": ds})
    there = {"env_vars": {"PYTHONPATH": f"{tmp_path}:{ROOT}"}}
    placement = ds.PlacementConfig(cpus_per_chain=0.5, runtime_env=there)
    model, data = regression()
    serial, ray = (
        ds.sample(
            model, data, squared_error, config(sampler=sampler, placement=placement),
            store=tmp_path / name, pool=pool, quiet=True,
        )
        for name, pool in (("serial", ds.SerialPool()), ("ray", None))
    )  # fmt: skip
    assert_same(ray, serial)
    steps = ray.inference_data["sample_stats"]["steps"].values
    assert steps.tolist() == [list(range(33, 153, 3))] * 2


@pytest.mark.ray
def test_the_sweep_of_the_guide_runs(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = block_of("sweeps", "# one LLC")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for step in (10, 20):
        torch.save(classifier()[0].state_dict(), tmp_path / f"checkpoints/step{step}.pt")
    code = code.replace(
        '.run("step20--head--hot").llc()', '.run("step20--head--hot").llc("ignore")'
    )
    names = run("sweeps", code, ds=ds, config=config(draws=20, burn_in=5))
    assert dict(names["table"].sizes) == {
        "checkpoint": 2, "restriction": 2, "setting": 2, "data": 1,
    }  # fmt: skip
    assert names["sweep"].counts() == {"finished": 8}
    assert (tmp_path / "training.csv").read_text().count("\n") == 9


def test_the_sweep_file_of_the_guide_is_one() -> None:
    block = dict(blocks("yaml"))["sweeps"]
    sweep = sweep_recipe.SweepConfig(**yaml.safe_load(block)["sweep"])
    assert sweep.settings == {"cold": {}, "hot": {"sampler.nbeta": 10.0}}
    assert sweep.restrictions == {"all": None, "head": ["head[.].*"]}


def test_the_loggers_of_the_guide_get_each_number() -> None:
    code = block_of("watching", "# Weights & Biases")
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

    one = dict.fromkeys(("ds", "wandb", "mlflow", "writer"), Heard())
    run("watching", code, data=None, config=None, **one)
    assert said == [(7, {"provisional/llc": 3.0})] * 3


def test_the_calibration_of_the_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    code = block_of("calibration", "chosen").replace("batch_size=500", "batch_size=50, draws=200")
    names = run("calibration", code)
    assert "sampler.lr" in capsys.readouterr().out
    assert names["run"].manifest.config.sampler == names["chosen"].config.sampler


def test_the_config_of_the_verdict_page_runs_until_it_is_enough(tmp_path: Path) -> None:
    wanted = run("verdict", block_of("verdict", "config"))["config"]
    assert (wanted.draws, wanted.burn_in, wanted.gate.every) == ("auto", "auto", 400)


def test_the_preset_of_the_guide_gets_the_verdict_that_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    verdict = run("presets", block_of("presets", "config = "))["run"].verdict
    assert "NOT_CONVERGED" in capsys.readouterr().out
    text = (ROOT / "distsampler/guide/presets.md").read_text()
    (r_hat, ess), (factor,) = (
        re.findall(r"R-hat ([\d.]+) and ESS (\d+)", text)[0],
        re.findall(r"asks for (\d+) times the draws", text),
    )
    assert verdict.r_hat == pytest.approx(float(r_hat), abs=0.05)
    assert verdict.ess == pytest.approx(int(ess), rel=0.3)
    assert verdict.ess * int(factor) > 400
    assert "".join(f"    {line}\n" for line in ds.presets.table().splitlines()) in text


class Tokens(nn.Module):
    """Logits of the next of five tokens, (batch, position, token)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(5, 4), nn.Linear(4, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layer(self.embed(tokens))
        return logits


def test_the_components_of_the_guide_are_some(capsys: Any) -> None:
    gpt2, own = ROWS[0].model(), Toy()
    names = run("components", block_of("components", "parts = "), model=gpt2)
    assert "l0h0 .. l0h3" in capsys.readouterr().out
    assert names["mask"].shape == (32, 96)
    prepare(gpt2.float(), tokens(40), token_losses, names["config"].replaced(batch_size=8))
    names = run("components", block_of("components", "patterns = "), own=own)
    assert selected(own, names["config"])["stages.0.result.weight"].count == 32


@pytest.mark.filterwarnings("ignore::distsampler.errors.NotConvergedWarning")
def test_the_probes_of_the_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokens = torch.randint(5, (100, 7), generator=torch.Generator().manual_seed(0))
    names = run(
        "probes",
        block_of("probes", "config = ds.RunConfig("),
        model=Tokens(), train_set=tokens, code=tokens[:30].flip(1), prose=tokens[:20],
    )  # fmt: skip
    assert names["losses"].sizes == {"chain": 4, "draw": 20, "example": 30, "token": 6}
    assert names["excess"].shape == (4, 20, 30, 6)
    assert names["run"].losses_of("prose").shape == (4, 200, 20)


@pytest.mark.filterwarnings("ignore::distsampler.errors.NotConvergedWarning")
def test_the_language_model_of_the_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = {word: number for number, word in enumerate(["end", "a", "b", "c", "d"])}
    short = in_this_process()
    short.RunConfig = lambda **fields: ds.RunConfig(**fields, draws=20, burn_in=5, thin=1)
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "end"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = run(
        "language-models",
        block_of("language-models", "rows = ds.lm.blocks("),
        ds=short,
        model=Tokens(),
        texts=["a b c d " * 100, "d c b a " * 100],
        tokenizer=transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="end"),
    )
    assert f"n {25 * 31} tokens, nbeta" in capsys.readouterr().out
    assert names["run"].facts["n"] == 25 * 31


def test_the_probes_of_a_file_of_the_guide_are_some() -> None:
    fields = yaml.safe_load(dict(blocks("yaml"))["probes"])
    (made,) = fields["probes"].values()
    assert [made.pop(part) for part in recipe.PROBE_PARTS] == ["own.py:code", {"rows": 256}]
    assert ds.RunConfig(**fields).probes["code"].every == 10


def test_the_observables_of_the_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    tokens = torch.randint(5, (100, 7), generator=torch.Generator().manual_seed(0))
    names = run(
        "observables",
        block_of("observables", "def token_losses"),
        model=Tokens(),
        data=(tokens[:, :-1], tokens[:, 1:]),
        loss=lambda model, batch: names_loss(model, batch).mean(1),
    )
    assert names["run"].losses.sizes == {"chain": 4, "draw": 200, "example": 100}
    assert names["run"].wide["token_losses"].shape == (4, 200, 100, 6)


def names_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs).transpose(1, 2), targets, reduction="none")


def test_the_shards_of_the_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    model, (x, y) = regression(n=6400)
    for index in range(32):
        torch.save((x[index::32], y[index::32]), f"shards/{index:04d}-of-32.pt")
    names = run("shards", block_of("shards", "def make_shard"), model=model, loss=squared_error)
    assert names["run"].manifest.status == "finished"
    assert abs(names["run"].facts["hop_bias"]) < 0.02


def test_the_command_lines_are_understood(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_exists_and_its_lines_fit(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"(?:scripts|cluster|distsampler/guide)/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    prose = [line for line in text.splitlines() if not line.startswith("|")]
    assert max(map(len, prose)) <= 120


def test_the_readme_is_short() -> None:
    assert len(README.read_text().split()) <= 1200


def test_the_config_of_the_demo_is_one() -> None:
    demo = recipe.load(
        ROOT / "scripts/examples/mnist.yaml",
        ["model=tests.user_code:model", "data=tests.user_code:data", "loss=tests.user_code:loss"],
    ).config
    assert demo.chains == 4

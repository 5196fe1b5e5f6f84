"""Checkpoints on the Hub: a real client, and a server on loopback that speaks as the Hub does."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, GPTNeoXConfig, GPTNeoXForCausalLM

import distsampler as ds
from distsampler.errors import ConfigError
from distsampler.sweeps import checkpoints, hub
from distsampler.sweeps.keys import fitted
from tests.problems import config

SIZES = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 13, "n_positions": 8}
Files = dict[str, dict[str, bytes]]  # revision -> file -> bytes


def gpt2(seed: int = 0, kind: type[Any] = GPT2LMHeadModel, **changes: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(GPT2Config(**{**SIZES, **changes})).eval()  # type: ignore[no-any-return]


def as_saved(model: nn.Module, folder: Path, **options: Any) -> dict[str, bytes]:
    """The files that transformers writes."""
    model.save_pretrained(folder, **options)  # type: ignore[operator]
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class Hub:
    """A server of one repository, ``owner/tiny``, that counts what it is asked."""

    def __init__(self, revisions: Files) -> None:
        self.revisions, self.asked, self.tokens = revisions, Counter[str](), set[str | None]()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        repo, _, rest = request.path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        by_commit = {commit(each): each for each in self.revisions}
        files = self.revisions.get(by_commit.get(revision, revision))
        self.asked[f"{request.command} {revision} {name}"] += 1
        if revision:  # the client asks of itself too
            self.tokens.add(request.headers.get("authorization"))
        body, status, headers = b"", 200, {}
        if repo != "owner/tiny":
            status, headers["X-Error-Code"] = 404, "RepoNotFound"
        elif files is None:
            status, headers["X-Error-Code"] = 404, "RevisionNotFound"
        elif name not in files:
            status, headers["X-Error-Code"] = 404, "EntryNotFound"
        else:
            body = files[name]
            headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
            headers["X-Repo-Commit"] = commit(by_commit.get(revision, revision))
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)


def commit(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


MODELS = {f"step{step}": gpt2(step) for step in (1000, 2000)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("saved")
    return {
        **{name: as_saved(model, folder / name) for name, model in MODELS.items()},
        "sharded": as_saved(MODELS["step1000"], folder / "sharded", max_shard_size="1KB"),
        "base": as_saved(gpt2(1000, GPT2Model), folder / "base"),
        "wide": as_saved(gpt2(0, n_embd=16), folder / "wide"),
        "empty": {"config.json": b"{}"},
    }


@pytest.fixture
def server(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    served = Hub(files)
    at(served.url, tmp_path / "cache", monkeypatch)
    yield served
    served.close()


def at(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT and HF_HOME say to a process that starts."""
    files = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    hub._downloaded.cache_clear()


def load(name: str, model: nn.Module | None = None) -> nn.Module:
    (found,) = checkpoints.find([f"owner/tiny@{name}"])
    model = gpt2() if model is None else model
    checkpoints.check(model, found)
    return checkpoints.loaded(model, found)


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_weights_of_two_revisions_are_those_that_were_saved_and_loaded_once(server: Hub) -> None:
    for _ in range(2):  # of processes, or so it is to the client
        for name, model in MODELS.items():
            assert same(load(name), model)
        hub._downloaded.cache_clear()
    assert not same(*MODELS.values())
    bytes_of = [f"GET {name} model.safetensors" for name in MODELS]
    assert [server.asked[each] for each in bytes_of] == [1, 1]
    before = sum(server.asked.values())
    load("step1000")
    mid = sum(server.asked.values())
    load("step1000")  # another cell of the same process
    assert (mid > before, sum(server.asked.values()) == mid) == (True, True)


def test_a_label_can_name_a_folder_and_ends_in_the_step() -> None:
    found = checkpoints.find(["EleutherAI/pythia-70m@step1000", "gpt2/x@refs/pr/1"])
    assert [each.name for each in found] == ["pythia-70m@step1000", "x@refs-pr-1"]
    assert found[0].step == 1000
    (named,) = checkpoints.find({"late": "owner/tiny@step2000"})
    assert (named.name, str(named.source)) == ("late", "owner/tiny@step2000")


def test_a_file_here_is_preferred_to_a_revision_there(tmp_path: Path) -> None:
    local = tmp_path / "owner/tiny@step1"
    local.mkdir(parents=True)
    torch.save({}, local / "model.pt")
    (found,) = checkpoints.find(["owner/tiny@step1"], folder=tmp_path)
    assert found.source == local / "model.pt"
    with pytest.raises(ConfigError, match=r"or owner/repo@revision on the Hugging Face Hub: got o"):
        checkpoints.find(["owner/tiny"], folder=tmp_path)


def test_weights_in_pieces_are_put_together_there_and_here(server: Hub, tmp_path: Path) -> None:
    assert len([name for name in server.revisions["sharded"] if "-of-" in name]) > 2
    assert same(load("sharded"), MODELS["step1000"])
    folder = tmp_path / "runs/step5"
    MODELS["step2000"].save_pretrained(folder, max_shard_size="1KB")  # type: ignore[operator]
    (found,) = checkpoints.find(tmp_path / "runs")
    assert (found.name, found.step) == ("step5", 5)
    assert same(checkpoints.loaded(gpt2(), found), MODELS["step2000"])


def test_several_at_once_load_the_bytes_once(server: Hub) -> None:
    locate = hub._downloaded.__wrapped__
    with ThreadPoolExecutor(3) as threads:
        places = list(threads.map(lambda _: locate("owner/tiny", "step1000"), range(3)))
    assert len(set(places)) == 1
    assert server.asked["GET step1000 model.safetensors"] == 1


def test_a_body_fits_a_model_with_a_head_and_the_other_way_round(server: Hub) -> None:
    body = gpt2(1000, GPT2Model)
    assert same(load("base").transformer, body)  # type: ignore[arg-type, union-attr]
    assert same(load("step1000", gpt2(0, GPT2Model)), MODELS["step1000"].transformer)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"missing keys: lm_head\.weight$"):
        load("base", gpt2(0, tie_word_embeddings=False))


def test_buffers_of_older_files_are_no_mismatch() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 13}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, intermediate_size=16))
    old = {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(1),
    }
    weights: dict[str, Tensor] = model.state_dict()
    assert fitted(model, {**weights, **old}, "a") == weights
    with pytest.raises(ConfigError, match="unexpected keys: other"):
        fitted(model, {**weights, "other": torch.ones(1)}, "a")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("owner/tiny@step3", "the repository has no revision 'step3'; see its branches and tags"),
        ("owner/other@step1", "the Hub shows no repository 'owner/other'.*set HF_TOKEN"),
        ("owner/tiny@empty", "must hold one of model.safetensors, .*has none: give load"),
        ("owner/tiny@wide", r"'tiny@wide' must have the architecture.*other shapes: transformer\."),
    ],
)
def test_what_is_not_there_or_does_not_fit_is_said(server: Hub, name: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        ds.sweep(
            gpt2(), torch.zeros(20, 4, dtype=torch.long), ds.lm.sequence_losses, config(),
            checkpoints=[name], store="nowhere", pool=ds.SerialPool(), quiet=True,
        )  # fmt: skip
    assert not Path("nowhere").exists()


def test_without_a_network_it_says_so_within_seconds_and_uses_what_is_cached(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    load("step1000")
    load("sharded")
    server.close()
    at(server.url, cache, monkeypatch)
    assert same(load("step1000"), MODELS["step1000"])
    assert same(load("sharded"), MODELS["step1000"])
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load("step2000")
    assert time.monotonic() - began < 10  # the client's own tries take more than 20
    for part in (
        "checkpoint owner/tiny@step2000 is neither a local path nor in the cache",
        f"the Hub at {server.url} cannot be reached",
        "give a local folder with one of model.safetensors",
        "or set HF_HOME",
    ):
        assert part in str(caught.value)
    part = next(file for file in cache.rglob("model-00002-of-*"))
    part.unlink()
    hub._downloaded.cache_clear()
    with pytest.raises(ConfigError, match="owner/tiny@sharded is neither"):
        load("sharded")  # in part is not there


def test_a_sweep_over_revisions_runs_in_a_process_that_reads_the_environment(
    server: Hub, tmp_path: Path
) -> None:
    """From YAML, with HF_ENDPOINT, HF_HOME and a token, none of which is in any file of it."""
    (tmp_path / "parts.py").write_text(PARTS)
    sweep = {"checkpoints": [f"owner/tiny@{name}" for name in MODELS]}
    run = config(draws=8, burn_in=2).model_dump(mode="json", exclude_unset=True)
    parts = {"model": "parts.py:model", "data": "parts.py:data", "loss": "parts.py:loss"}
    (tmp_path / "sweep.yaml").write_text(json.dumps({**parts, **run, "sweep": sweep}))
    token = "hf_" + "abcdefgh" * 4
    there = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": token}
    code = (
        "import sys; from pathlib import Path; from distsampler.sweeps import recipe\n"
        "from distsampler.sweeps.plan import make_plan\n"
        "plan = make_plan(recipe.load(Path(sys.argv[1])))\n"
        "print(*(float(plan.model(cell).lm_head.weight.sum()) for cell in plan.cells))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "sweep.yaml")],
        capture_output=True, text=True, check=False, env={**os.environ, **there},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sums = [float(model.state_dict()["lm_head.weight"].sum()) for model in MODELS.values()]
    assert list(map(float, done.stdout.split())) == pytest.approx(sums, abs=1e-4)
    assert server.tokens == {f"Bearer {token}"}


PARTS = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from distsampler.lm import sequence_losses as loss


def model():
    sizes = dict(n_embd=8, n_layer=1, n_head=2, vocab_size=13, n_positions=8)
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def data():
    return torch.randint(13, (40, 6), generator=torch.Generator().manual_seed(0))
"""

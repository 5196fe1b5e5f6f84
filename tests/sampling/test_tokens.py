"""Runs whose n counts tokens: every token weighs the same, however long its sequence is."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typer.testing import CliRunner

import distsampler as ds
from distsampler.chains.worker import Inspect, Worker
from distsampler.cli import app
from distsampler.data.tokens import count, counted
from distsampler.errors import ConfigError, RunFailed, StoreError
from distsampler.lm import sequence_losses, token_losses
from distsampler.models.loss import ByToken
from distsampler.models.replica import Replica
from distsampler.report import run_report
from distsampler.sampling.prepare import draft, prepare
from tests.assertions import digest
from tests.problems import config

GENERATOR = torch.Generator().manual_seed(0)
CPU = torch.device("cpu")
ROWS, LENGTH = 48, 8
LENGTHS = torch.randint(2, LENGTH + 1, (ROWS,), generator=GENERATOR)
DATA = {
    "input_ids": torch.randint(7, (ROWS, LENGTH), generator=GENERATOR),
    "attention_mask": (torch.arange(LENGTH) < LENGTHS[:, None]).long(),
}
TOKENS = int((LENGTHS - 1).sum())


class Pairs(nn.Module):
    """A language model that sees one token back."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7)
        source = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=source))

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(input_ids))
        return logits


def settings(**fields: Any) -> ds.RunConfig:
    return config(**{"n": "tokens", "batch_size": 8, **fields})


def run(
    store: Path | None = None, data: Any = DATA, loss: Any = token_losses, **fields: Any
) -> Any:
    pool, resume = fields.pop("pool", None) or ds.SerialPool(), fields.pop("resume", "never")
    model, probes = fields.pop("model", None) or Pairs(), fields.pop("data_of_probes", None)
    return ds.sample(
        model, data, loss, settings(**fields), store=store, pool=pool, resume=resume, quiet=True,
        probes=probes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ds.Run:
    """A run in double precision, which keeps what can be kept."""
    made: ds.Run = run(
        tmp_path_factory.mktemp("tokens") / "run",
        model=Pairs().double(),
        save_losses=True,
        data_of_probes={"same": DATA},
    )
    return made


def test_the_loss_at_the_anchor_is_the_mean_over_tokens(whole: ds.Run) -> None:
    losses = token_losses(Pairs().double(), DATA).detach()
    assert whole.facts["init_loss"] == pytest.approx(float(losses.nanmean()), rel=1e-14)
    of_sequences = float(sequence_losses(Pairs().double(), DATA).detach().mean())
    assert abs(whole.facts["init_loss"] - of_sequences) > 1e-3


def test_n_and_nbeta_are_those_of_the_tokens_that_count(whole: ds.Run) -> None:
    assert TOKENS == int(counted(DATA).sum()) < ROWS * (LENGTH - 1)
    assert whole.facts["n"] == TOKENS
    assert whole.facts["nbeta"] == pytest.approx(TOKENS / math.log(TOKENS), rel=1e-15)


def test_the_mean_over_all_batches_of_one_is_the_mean_over_tokens() -> None:
    replica = Replica(prepare(Pairs().double(), DATA, token_losses, settings()), CPU)
    each = [replica.losses_of_rows(np.array([row])).mean() for row in range(ROWS)]
    expected = token_losses(Pairs().double(), DATA).nanmean()
    torch.testing.assert_close(torch.stack(each).mean(), expected, rtol=1e-14, atol=0)


def test_the_gradient_of_all_data_is_that_of_the_mean_over_tokens() -> None:
    model = Pairs().double()
    replica = Replica(prepare(model, DATA, token_losses, settings(microbatch=5)), CPU)
    replica.losses_and_gradient(np.arange(ROWS), 0, 0)
    token_losses(model, DATA).nanmean().backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(replica.flats[0].grad, expected)


def test_what_is_printed_says_that_n_counts_tokens(whole: ds.Run) -> None:
    llc = whole.llc("ignore")
    assert f"n {TOKENS} tokens, nbeta" in str(llc)
    assert llc.as_dict()["unit"] == "tokens"
    assert f"n {TOKENS} tokens of the training data" in str(whole.llc("ignore", probe="same"))
    assert f"n {TOKENS} tokens" in str(whole.wbic("ignore"))
    note = "n counts tokens as if they were independent"
    assert any(note in each for each in whole.verdict.notes)
    assert note in str(whole.verdict)
    page = Path(run_report.write(whole, Path(str(whole.store)) / "page.html")).read_text()
    assert "tokens, n" in page
    assert note in page
    done = CliRunner().invoke(app, ["diagnose", str(whole.store)])
    assert "n counts tokens" in " ".join(done.output.split())
    assert json.loads((Path(str(whole.store)) / "run.json").read_text())["config"]["n"] == "tokens"


def test_a_run_of_examples_says_nothing_of_tokens(tmp_path: Path) -> None:
    made = run(tmp_path / "run", loss=sequence_losses, n="examples")
    assert f"n {ROWS}, nbeta" in str(made.llc("ignore"))
    assert not made.verdict.notes
    assert "examples" not in made.facts


def test_losses_that_are_kept_are_of_examples_and_those_of_a_probe_of_tokens(
    whole: ds.Run,
) -> None:
    kept = whole.losses
    assert kept.dims == ("chain", "draw", "example")
    assert kept.sizes["example"] == 32
    losses = token_losses(Pairs().double(), DATA)
    at_anchor = losses.nansum(1) / (TOKENS / ROWS)
    torch.testing.assert_close(
        torch.from_numpy(whole.inference_data.constant_data["probe_losses"].values.copy()),
        at_anchor[kept["example"].values.tolist()].detach(),
    )
    of_probe = whole.losses_of("same")
    assert of_probe.dims == ("chain", "draw", "example", "token")
    torch.testing.assert_close(
        torch.as_tensor(of_probe.losses_at_anchor.values), losses.detach(), equal_nan=True
    )
    # Read on all data, the same chains lose as much by the probe.
    assert whole.llc("ignore", probe="same").init_loss == whole.facts["init_loss"]


@pytest.mark.parametrize(
    "fields", [{"pack": 2}, {"microbatch": 3, "precision": "bf16", "init": "dispersed"}]
)
def test_a_run_that_was_continued_has_the_same_bits(tmp_path: Path, fields: dict[str, Any]) -> None:
    fields = {"draws": 12, "watch": False, **fields}
    whole = run(tmp_path / "whole", **fields)
    run(tmp_path / "short", **fields | {"draws": 5})
    longer = ds.resume(
        tmp_path / "short", Pairs(), DATA, token_losses, draws=12, pool=ds.SerialPool(), quiet=True
    )
    assert digest(longer) == digest(whole)


def test_a_run_is_not_continued_with_another_number_of_tokens(tmp_path: Path) -> None:
    """The digest of a Dataset reads 64 of its examples: an example between them is another."""

    def data(changed: int) -> list[dict[str, Tensor]]:
        ids, masks = DATA["input_ids"].repeat(4, 1), DATA["attention_mask"].repeat(4, 1)
        masks[1:2] = (torch.arange(LENGTH) < changed).long()
        return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, masks, strict=True)]

    run(tmp_path / "run", data=data(3), draws=5)
    with pytest.raises(StoreError, match=r"tokens: stored '[0-9]+', now '[0-9]+'$"):
        run(tmp_path / "run", data=data(4), draws=8, resume="must")


def test_a_pack_computes_what_its_chains_do_alone() -> None:
    alone, packed = (run(pack=lanes, draws=5).posterior["excess_loss"] for lanes in (1, 2))
    np.testing.assert_allclose(packed, alone, rtol=1e-3, atol=1e-4)


def test_pads_of_a_collate_fn_do_not_matter() -> None:
    rows = [{k: v[i, : LENGTHS[i]] for k, v in DATA.items()} for i in range(ROWS)]

    def padded(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {
            k: nn.utils.rnn.pad_sequence([each[k] for each in examples], batch_first=True)
            for k in DATA
        }

    loader = DataLoader(rows, batch_size=8, collate_fn=padded)  # type: ignore[arg-type]
    one, other = run(data=loader), run()
    assert one.facts["n"] == other.facts["n"] == TOKENS
    assert one.facts["init_loss"] == pytest.approx(other.facts["init_loss"], rel=1e-6)


def test_a_model_that_breaks_is_not_taken_for_one_without_loss() -> None:
    class Broken(Pairs):
        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids) * torch.nan

    loss = ByToken(token_losses, TOKENS, ROWS)
    assert loss(Broken(), DATA).isnan().all()


@pytest.mark.parametrize(
    ("loss", "fields", "said"),
    [
        (token_losses, {"n": "examples"}, "ds.lm.sequence_losses does, or set n='tokens'"),
        (sequence_losses, {}, r"one value per token .* give ds.lm.token_losses"),
        (lambda m, b: token_losses(m, b).nan_to_num(), {}, "does not count, it is 0: give ds.lm"),
        (lambda m, b: token_losses(m, b["input_ids"]), {}, "which does not count, it is"),
        (lambda m, b: token_losses(m, b)[:, 1:], {}, r"here \(2, 7\), got \(2, 6\)"),
    ],
)
def test_a_loss_of_another_form_is_a_sentence(loss: Any, fields: Any, said: str) -> None:
    spec = draft(Pairs(), DATA, loss, settings(**fields))
    with pytest.raises(ConfigError, match=said):
        Worker(spec, CPU).perform(Inspect())


def test_data_of_which_no_token_counts_are_refused() -> None:
    empty = {**DATA, "attention_mask": torch.zeros_like(DATA["attention_mask"])}
    with pytest.raises(ConfigError, match="a token of the data must count, and none does"):
        draft(Pairs(), empty, token_losses, settings())
    with pytest.raises(ConfigError, match="a batch of a language model must be"):
        draft(Pairs(), (torch.rand(9, 3),), token_losses, settings())


@pytest.mark.filterwarnings("ignore::distsampler.errors.NotConvergedWarning")
def test_a_sequence_of_which_nothing_counts_ends_a_run_that_names_its_row() -> None:
    hollow = {**DATA, "attention_mask": DATA["attention_mask"].clone()}
    hollow["attention_mask"][[0, 29]] = 0
    said = r"2 of 48 examples give nan \(rows 0, 29\): .*a sequence of which no token counts"
    with pytest.raises(RunFailed, match=said):
        run(data=hollow, loss=sequence_losses, n="examples")


def test_counting_reads_no_more_than_it_must() -> None:
    from distsampler.data.kinds import as_rows

    class Watched(type(as_rows(DATA["input_ids"]))):  # type: ignore[misc]
        read = 0

        def take(self, rows: Any) -> object:
            Watched.read += len(rows)
            return super().take(rows)

    ids = torch.randint(7, (1000, 4))
    assert count(Watched({"input_ids": ids})) == 3000
    assert Watched.read == 256

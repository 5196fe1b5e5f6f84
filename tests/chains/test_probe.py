"""Named probes: a user's own examples, measured along the chains, that decide nothing."""

import json
import math
import shutil
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typer.testing import CliRunner

import distsampler as ds
from distsampler import recipe
from distsampler.chains.probe import NamedLosses
from distsampler.cli import app
from distsampler.errors import StoreError
from distsampler.lm.losses import sequence_losses, token_losses
from distsampler.models.replica import Replica
from distsampler.report import run_report
from distsampler.sampling.directory import stored_recipe
from distsampler.sampling.prepare import draft, prepare
from distsampler.sampling.sample import sample_recipe
from tests.assertions import digest
from tests.fakes import FlakyPool
from tests.problems import Net, config, mean_squared_error, regression, squared_error

SEQUENCES = torch.randint(7, (64, 6), generator=torch.Generator().manual_seed(0))
CODE = {"input_ids": SEQUENCES[:20].flip(1), "attention_mask": torch.ones(20, 6).long()}
CODE["attention_mask"][3, 4:] = 0
CODE["attention_mask"][7] = 0  # a row of which nothing counts
CPU = torch.device("cpu")


class Pairs(nn.Module):
    """A language model that sees one token back."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(1)
        self.embed, self.drop, self.head = nn.Embedding(7, 5), nn.Dropout(dropout), nn.Linear(5, 7)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=source))

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.drop(self.embed(input_ids)))
        return logits


def per_token(model: nn.Module, batch: Any) -> Tensor:
    """What chance gives to a token that does not count must not matter."""
    return token_losses(model, batch)


PROBES: dict[str, Any] = {
    "code": {"loss": per_token, "every": 3, "batch_size": 7},
    "half": {"loss": per_token, "dtype": "float16"},
    "train": {},
}
DATA = {"code": CODE, "half": CODE, "train": {"input_ids": SEQUENCES}}


def language(store: Path | None, pool: Any = None, **fields: Any) -> ds.Run:
    """A run on sequences, with three probes."""
    probes, resume = fields.pop("data", DATA), fields.pop("resume", "never")
    model = Pairs(fields.pop("dropout", 0.0))
    placement = ds.PlacementConfig(block=fields.pop("block", 7))
    settings = config(**{"probes": PROBES, "placement": placement, "batch_size": 8, **fields})
    return ds.sample(
        model, {"input_ids": SEQUENCES}, sequence_losses, settings, store=store, probes=probes,
        pool=pool or ds.SerialPool(), resume=resume, quiet=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ds.Run:
    return language(tmp_path_factory.mktemp("probes") / "run", save_weights_every=1)


def at(run: ds.Run, chain: int, draw: int) -> nn.Module:
    """The model with saved weights."""
    model = Pairs()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(run.weights[name].sel(chain=chain, draw=draw).values))
    return model


def by_hand(model: nn.Module, loss: Any = token_losses, data: Any = CODE) -> Any:
    with torch.no_grad():
        return loss(model, data).numpy()


def test_losses_of_tokens_are_those_at_the_saved_weights(run: ds.Run) -> None:
    losses = run.losses_of("code")
    assert losses.dims == ("chain", "draw", "example", "token")
    assert losses.draw.values.tolist() == list(range(1, 40, 3))  # counted from the chain's start
    for chain, draw in ((0, 1), (1, 22), (0, 37)):
        expected = by_hand(at(run, chain, draw))
        got = losses.sel(chain=chain, draw=draw).values
        assert np.isnan(got[7]).all()
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
        half = run.losses_of("half").sel(chain=chain, draw=draw)
        assert half.dtype == np.float16
        np.testing.assert_allclose(half.values, expected, rtol=1e-3)
        whole = by_hand(at(run, chain, draw), sequence_losses, DATA["train"])
        got = run.losses_of("train").sel(chain=chain, draw=draw).values
        np.testing.assert_allclose(got, whole, rtol=1e-6)


def test_ids_are_those_that_are_predicted_where_labels_are_others() -> None:
    labels = (CODE["input_ids"] + 1) % 7
    labels[3] = -100
    made = language(
        None, data={"code": {**CODE, "labels": labels}}, probes={"code": PROBES["code"]}
    )
    expected = torch.where(labels == -100, CODE["input_ids"], labels)[:, 1:]
    assert np.array_equal(made.losses_of("code").token_ids.values, expected)


def test_they_know_their_rows_their_tokens_and_their_losses_at_the_anchor(run: ds.Run) -> None:
    losses = run.losses_of("code")
    assert losses.example.values.tolist() == list(range(20))
    assert losses.token.values.tolist() == [1, 2, 3, 4, 5]
    assert np.array_equal(losses.token_ids.values, CODE["input_ids"][:, 1:])
    np.testing.assert_allclose(losses.losses_at_anchor.values, by_hand(Pairs()), rtol=1e-6)
    one = losses.sel(token=3).isel(example=slice(2, 5))
    assert np.array_equal(one.token_ids.values, CODE["input_ids"][2:5, 3])
    assert "token_ids" not in run.losses_of("train").coords


def test_a_reading_is_nbeta_times_the_mean_excess_of_what_counts(run: ds.Run) -> None:
    reading, losses = run.llc("ignore", probe="code"), run.losses_of("code").astype(float)
    excess = (losses - losses.losses_at_anchor).mean(("example", "token"))
    per_chain = run.facts["nbeta"] * excess.mean("draw").values
    np.testing.assert_allclose(reading.per_chain, per_chain, atol=1e-6)
    assert reading.mean == pytest.approx(float(per_chain.mean()), abs=1e-6)
    assert 0 < reading.se < 10 * abs(np.diff(per_chain).item()) + 1
    assert (reading.draws, reading.examples, reading.tokens) == (13, 20, 93)
    assert reading.init_loss == pytest.approx(float(np.nanmean(by_hand(Pairs()))), rel=1e-6)
    assert reading.verdict is run.verdict
    assert "on code, 20 examples, 93 tokens" in str(reading)
    assert "of the training data" in str(reading)
    assert reading.as_dict()["data_refined_llc"] == reading.mean
    assert run.llc("ignore", probe="train").tokens is None
    # It is taken before the losses are rounded.
    half, code = (run.wide[f"probe_excess/{name}"] for name in ("half", "code"))
    assert half.dtype == np.float64
    assert np.array_equal(half.sel(draw=code.draw).values, code.values) or np.allclose(
        half.sel(draw=code.draw).values, code.values, atol=1e-7
    )


def test_probes_change_no_other_draw(run: ds.Run, tmp_path: Path) -> None:
    bare = language(tmp_path / "bare", probes={}, data=None)
    for name in bare.posterior:
        assert np.array_equal(bare.posterior[name], run.posterior[name]), name
    with pytest.raises(ds.ConfigError, match="measured no probe 'code', it has none"):
        bare.losses_of("code")
    with pytest.raises(ds.ConfigError, match="'code', 'half', 'train'"):
        run.llc(probe="prose")


def test_a_pack_measures_them_in_each_lane(tmp_path: Path) -> None:
    run = language(tmp_path / "run", pack=2, save_weights_every=1)
    assert run.manifest.config.pack == 2
    for chain in (0, 1):
        got = run.losses_of("code").sel(chain=chain, draw=34).values
        np.testing.assert_allclose(got, by_hand(at(run, chain, 34)), rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "rtol"),
    [
        ({"data_mode": "hop", "shards": 4, "hop_every": 5}, 1e-5),
        ({"microbatch": 3, "probes": {"code": {"loss": per_token}}}, 1e-5),
        ({"precision": "bf16"}, 0.1),
    ],
)
def test_they_are_the_same_however_the_run_takes_its_steps(
    tmp_path: Path, fields: dict[str, Any], rtol: float
) -> None:
    data = {name: DATA[name] for name in fields.get("probes", PROBES)}
    run = language(tmp_path / "run", draws=6, burn_in=0, save_weights_every=1, **fields, data=data)
    got = run.losses_of("code").sel(chain=1, draw=5).values
    np.testing.assert_allclose(got, by_hand(at(run, 1, 5)), rtol=rtol, atol=rtol / 10)


def test_a_run_whose_loss_gives_means_has_probes_with_a_loss_of_their_own(tmp_path: Path) -> None:
    model, data = regression()
    settings = config(draws=6, burn_in=0, probes={"own": {"loss": squared_error}})
    parts: Any = model, data, mean_squared_error, settings
    run = ds.sample(
        *parts, store=tmp_path / "run", probes={"own": data}, pool=ds.SerialPool(), quiet=True
    )
    assert run.losses_of("own").sizes == {"chain": 2, "draw": 6, "example": 300}
    with pytest.raises(ds.ConfigError, match=r"probes\.own: .*got their mean"):
        prepare(*parts[:3], config(), probes={"own": data})


def test_killed_resumed_and_extended_the_bits_are_the_same(
    run: ds.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distsampler.execution.driver.random.uniform", lambda a, b: 0.0)
    fields: dict[str, Any] = {"save_weights_every": 1}
    died = language(tmp_path / "died", FlakyPool(2, deaths=(1, 4, 8, 9)), block=4, **fields)
    language(tmp_path / "longer", draws=14, **fields)
    longer = ds.resume(
        tmp_path / "longer", Pairs(), {"input_ids": SEQUENCES}, sequence_losses, draws=40,
        probes=DATA, pool=ds.SerialPool(), quiet=True,
    )  # fmt: skip
    for other in (died, longer):
        assert digest(other) == digest(run)
        assert other.losses_of("code").identical(run.losses_of("code"))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "probes must give the data of 'code'"),
        (SEQUENCES, "probes must be data by name, got Tensor: give"),
        ([SEQUENCES], "probes must be data by name, got list: give"),
        ({**DATA, "code": SEQUENCES[:20]}, "probes.code.data: stored"),
        ({**DATA, "prose": SEQUENCES}, "config.probes: stored"),
    ],
)
def test_a_run_is_continued_with_the_probes_that_it_began_with(
    run: ds.Run, tmp_path: Path, data: Any, said: str
) -> None:
    store = shutil.copytree(run.store, tmp_path / "run")
    with pytest.raises((ds.ConfigError, StoreError), match=said):
        ds.resume(
            store, Pairs(), {"input_ids": SEQUENCES}, sequence_losses, draws=50, probes=data,
            pool=ds.SerialPool(), quiet=True,
        )  # fmt: skip


def test_only_what_is_asked_for_is_read(run: ds.Run, tmp_path: Path) -> None:
    store = Path(shutil.copytree(run.store, tmp_path / "run"))
    shutil.rmtree(store / "trace.zarr/constant_data/token_ids_of_code/c")
    shutil.rmtree(store / "wide.zarr/probes/code/c/1")
    damaged = ds.open(store)
    damaged.llc("ignore", probe="code")
    losses = damaged.losses_of("code")
    assert np.isfinite(losses.sel(chain=0, example=0).values).all()
    with pytest.raises(StoreError, match="probes/code of chain 1 at draw"):
        _ = losses.sel(chain=1).values
    with pytest.raises(StoreError, match="token_ids_of_code"):
        _ = losses.token_ids.values


@pytest.mark.filterwarnings("ignore:in mode")
def test_what_a_model_drops_out_is_the_same_at_every_draw_and_at_the_anchor() -> None:
    model = Pairs(dropout=0.5)
    spec = prepare(
        model, {"input_ids": SEQUENCES}, sequence_losses,
        config(mode="train", probes=PROBES, batch_size=8), probes=DATA,
    )  # fmt: skip
    assert all(probe.kind.stochastic for probe in spec.probes)
    replica = Replica(spec, CPU)
    code = NamedLosses(replica, spec.probes[0])
    first = code.measure()
    replica.losses_of_rows(np.arange(8), step=5)
    torch.manual_seed(7)
    assert np.array_equal(code.measure(), first, equal_nan=True)
    assert not np.allclose(first, by_hand(model.eval()), equal_nan=True)


def chance(model: nn.Module, batch: Any) -> Tensor:
    return torch.rand(len(batch))


def test_chance_gives_a_batch_the_same_at_every_draw_of_every_chain(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"probes": {"own": {"loss": chance}}, "data": {"own": SEQUENCES}}
    run = language(tmp_path / "run", draws=5, burn_in=0, **fields)
    losses = run.losses_of("own")
    assert (losses == losses.losses_at_anchor).all()
    assert len(np.unique(losses.values)) == len(SEQUENCES)


def test_batch_norm_keeps_its_statistics_where_only_a_probe_moves_them() -> None:
    def trains(model: nn.Module, batch: Any) -> Tensor:
        model.train()
        losses = squared_error(model, batch)
        model.eval()
        return losses

    data = regression()[1]
    spec = prepare(Net(), data, squared_error, config(probes={"own": {"loss": trains}}), None,
                   {"own": data})  # fmt: skip
    replica = Replica(spec, CPU)
    before = {name: b.clone() for name, b in replica.model.named_buffers()}
    first = NamedLosses(replica, spec.probes[0])
    assert np.array_equal(first.measure(), first.measure())
    assert all(torch.equal(before[name], b) for name, b in replica.model.named_buffers())


class Words(Dataset[Any]):
    """Sequences of several lengths."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return SEQUENCES[index, : 3 + index % 4]


def padded(examples: list[Tensor]) -> dict[str, Tensor]:
    """A batch, padded to its own longest sequence."""
    mask = [torch.ones_like(each) for each in examples]
    return {
        "input_ids": nn.utils.rnn.pad_sequence(examples, batch_first=True),
        "attention_mask": nn.utils.rnn.pad_sequence(mask, batch_first=True),
    }


def test_batches_of_their_own_lengths_are_one_array(tmp_path: Path) -> None:
    loader = DataLoader(Words(), batch_size=2, collate_fn=padded)
    run = language(
        tmp_path / "run", draws=4, burn_in=0, probes={"words": {"loss": token_losses}},
        data={"words": loader},
    )  # fmt: skip
    losses = run.losses_of("words")
    assert losses.sizes["token"] == 5
    counts = np.isfinite(losses.values).sum(-1)
    assert (counts == [2, 3, 4, 5, 2, 3]).all()
    assert losses.token_ids.values[1].tolist()[:3] == SEQUENCES[1, 1:4].tolist()


def test_some_rows_are_the_same_for_every_seed(tmp_path: Path) -> None:
    specs = [
        prepare(Pairs(), SEQUENCES, sequence_losses, config(probes={"few": {"rows": 9}}, seed=seed),
                probes={"few": SEQUENCES})
        for seed in (0, 1)
    ]  # fmt: skip
    one, other = (spec.probes[0] for spec in specs)
    assert len(one.rows) == 9
    assert np.array_equal(one.numbers, other.numbers)
    assert torch.equal(one.rows.take(np.arange(9)), SEQUENCES[one.numbers])  # type: ignore[arg-type]


def summed(model: nn.Module, batch: Any) -> Tensor:
    return sequence_losses(model, batch) / len(batch["input_ids"])


def flat(model: nn.Module, batch: Any) -> Tensor:
    return token_losses(model, batch).flatten()


def explodes(model: nn.Module, batch: Any) -> Tensor:
    losses = sequence_losses(model, batch)
    return losses.index_fill(0, torch.tensor(1), math.inf) if len(losses) > 2 else losses


def large(model: nn.Module, batch: Any) -> Tensor:
    return 1e5 + sequence_losses(model, batch)


def raises(model: nn.Module, batch: Any) -> Tensor:
    raise RuntimeError("no luck")


class Varying(Words):
    def __getitem__(self, index: int) -> Tensor:
        return torch.randint(7, (5,))


@pytest.mark.parametrize(
    ("settings", "data", "said"),
    [
        ({"loss": mean_squared_error}, regression()[1], "its loss must work on its examples"),
        ({"loss": lambda m, b: sequence_losses(m, b).mean()}, CODE, "got their mean, shape ()"),
        (
            {"loss": flat},
            CODE,
            "or one per token, shape (7, tokens), NaN where a token does not count; got (35,)",
        ),
        ({"loss": summed}, CODE, "it is divided by the number of examples"),
        ({"loss": explodes}, {"input_ids": SEQUENCES}, "must be finite, but it is inf at row 1"),
        ({"loss": large, "dtype": "float16"}, SEQUENCES, "must be at most 65504 to be stored"),
        ({"loss": raises}, CODE, "its loss must work on its examples: RuntimeError: no luck"),
        ({"loss": lambda m, b: token_losses(m, b) * torch.nan}, CODE, "it is NaN for all"),
        ({"rows": 21}, CODE, "rows must be at most 20"),
        ({}, torch.zeros(20_000, 3).long(), "its data hold 20000 examples, and every draw would"),
        ({}, Varying(), "its data must be the same at each reading"),
        ({}, iter([1]), "data must be a map-style Dataset"),
    ],
)
def test_a_mistake_in_a_probe_names_it(settings: Any, data: Any, said: str) -> None:
    with pytest.raises(ds.ConfigError, match=r"probes\.own: ") as error:
        prepare(
            Pairs(), {"input_ids": SEQUENCES}, sequence_losses,
            config(probes={"own": settings}, batch_size=8), probes={"own": data},
        )  # fmt: skip
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("probes", "said"),
    [
        ({"a/b": {}}, "the name of a probe must be letters"),
        ({"own": {"evry": 3}}, "every"),
        ({"own": {"data": "x"}}, "data belongs to sample"),
        ({"own": {"every": 0}}, "probes.own"),
    ],
)
def test_a_mistake_in_their_settings_is_a_sentence(probes: Any, said: str) -> None:
    with pytest.raises(ds.ConfigError, match=said):
        ds.RunConfig(probes=probes)


def test_losses_beyond_float16_are_stored_as_its_largest_number(tmp_path: Path) -> None:
    def climbs(model: Any, batch: Any) -> Tensor:
        moved = (model.head.bias - Pairs().head.bias).abs().max()
        return sequence_losses(model, batch) + 1e9 * moved

    run = language(
        tmp_path / "run", draws=4, burn_in=0, probes={"own": {"loss": climbs, "dtype": "float16"}},
        data={"own": SEQUENCES},
    )  # fmt: skip
    assert (run.losses_of("own").values == 65504).all()
    assert run.llc("ignore", probe="own").mean > 1e6


FILE = """
import torch
from tests.chains.test_probe import CODE, SEQUENCES, Pairs, per_token
from distsampler.lm.losses import sequence_losses
def data(): return SEQUENCES
def code(rows): return {name: value[:rows] for name, value in CODE.items()}
"""
YAML = """
model: own.py:Pairs
data: own.py:data
loss: own.py:sequence_losses
sampler: {lr: 1.0e-3, localization: 10.0}
probes:
  code: {data: "own.py:code", data_kwargs: {rows: 12}, every: 10, loss: "own.py:per_token"}
  train: {data: "own.py:data"}
"""


def test_a_file_names_them_and_a_run_remembers_their_names(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(FILE)
    (tmp_path / "run.yaml").write_text(YAML)
    small = ["probes.code.every=5", "draws=20", "chains=1", "burn_in=0", "thin=1", "device=cpu"]
    asked = recipe.load(tmp_path / "run.yaml", small)
    assert len(asked.probes["code"]["input_ids"]) == 12  # type: ignore[index]
    run = sample_recipe(asked, tmp_path / "run", ds.SerialPool(), quiet=True)
    assert run.losses_of("code").sizes == {"chain": 1, "draw": 4, "example": 12, "token": 5}
    said = list[str]()
    again = stored_recipe(run, ["draws=30"], trust=False, say=said.append)
    assert "data own.py:code" in said[0]
    assert "loss own.py:per_token of the probe code" in said[0]
    longer = sample_recipe(again, run.store, ds.SerialPool(), "must", quiet=True)
    assert longer.losses_of("code").sizes["draw"] == 6
    (tmp_path / "elsewhere").mkdir()
    recipe.write(again, tmp_path / "elsewhere/run.yaml")
    moved = recipe.load(tmp_path / "elsewhere/run.yaml")
    assert moved.config.probes["code"].every == 5
    assert moved.probes.keys() == {"code", "train"}
    for change, said_of in {
        "probes.prose.every=2": "probes.prose.data: must be 'module:callable'",
        "probes.code=3": "probes.code must hold options",
    }.items():
        with pytest.raises(ds.ConfigError, match=said_of):
            recipe.load(tmp_path / "run.yaml", [change])


def test_the_command_line_reads_them(run: ds.Run, capsys: pytest.CaptureFixture[str]) -> None:
    def out(*words: str) -> str:
        result = CliRunner().invoke(app, list(words))
        assert result.exit_code == 3  # not converged
        return result.output

    reading = run.llc("ignore", probe="code")
    assert out("llc", run.store, "--probe", "code") == f"{reading}\n"
    printed = json.loads(out("llc", run.store, "--probe", "code", "--json"))
    assert printed["data_refined_llc"] == reading.mean
    assert (printed["probe"], printed["tokens"], printed["n"]) == ("code", 93, 64)
    assert json.loads(out("llc", run.store, "--json"))["probes"]["code"] == printed
    for command in ("llc", "diagnose"):
        assert out(command, run.store).count("data-refined LLC") == 3
    assert json.loads(out("diagnose", run.store, "--json"))["probes"]["code"] == printed
    assert escape(str(reading)) in run_report.render(run)


def test_every_cell_of_a_sweep_measures_the_same(tmp_path: Path) -> None:
    settings = config(probes={"few": {"rows": 5}}, draws=8, burn_in=0, batch_size=8)
    done = ds.sweep(
        Pairs(), SEQUENCES, sequence_losses, settings, store=tmp_path / "sweep",
        settings={"cold": {}, "hot": {"sampler.nbeta": 3.0}}, probes={"few": SEQUENCES},
        pool=ds.SerialPool(), quiet=True,
    )  # fmt: skip
    cold, hot = (done.run(name).losses_of("few") for name in ("model--cold", "model--hot"))
    assert np.array_equal(cold.example, hot.example)
    assert np.array_equal(cold.losses_at_anchor, hot.losses_at_anchor)
    assert not np.array_equal(cold, hot)

    table, of_all = (done.collect(probe=probe).squeeze(drop=True) for probe in ("few", None))
    reading = done.run("model--hot").llc("ignore", probe="few")
    hot_cell = table.sel(setting="hot")
    assert (hot_cell.llc, hot_cell.se, hot_cell.init_loss) == (
        reading.mean, reading.se, reading.init_loss,
    )  # fmt: skip
    assert (table.verdict == of_all.verdict).all()
    assert (table.llc != of_all.llc).all()
    assert table.interval_low.isnull().all()
    with pytest.raises(ds.ConfigError, match="other"):
        done.collect(probe="other")


def test_calibration_measures_none() -> None:
    spec = draft(Pairs(), SEQUENCES, sequence_losses, config(probes=PROBES))
    assert spec.probes == ()


class Breaking:
    """A loss that is not finite once the weights have moved."""

    def __call__(self, model: Any, batch: Any) -> Tensor:
        moved = not torch.equal(model.head.bias, Pairs().head.bias)
        return sequence_losses(model, batch) + (math.inf if moved else 0.0)


def test_a_chain_on_which_a_probe_is_not_finite_is_retired(tmp_path: Path) -> None:
    with pytest.raises(ds.RunFailed, match="probe_excess/own is not finite"):
        language(tmp_path / "run", probes={"own": {"loss": Breaking()}}, data={"own": SEQUENCES})


@pytest.mark.ray
def test_actors_give_the_same_bits(ray_cluster: None, run: ds.Run, tmp_path: Path) -> None:
    placed = language(tmp_path / "ray", ds.RayPool(cpus_per_chain=0.5), save_weights_every=1)
    assert digest(placed) == digest(run)

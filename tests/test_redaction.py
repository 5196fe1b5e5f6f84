"""No secret of a user's is in what is written, printed or raised; without it nothing breaks."""

import os
import pickle
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

import distsampler as ds
from distsampler import recipe
from distsampler.cli import main
from distsampler.config import PlacementConfig
from distsampler.errors import ConfigError, DistsamplerError, PlacementError, RunFailed, StoreError
from distsampler.execution.ray_cluster import RayCluster
from distsampler.redaction import REDACTED, missing, redacted
from distsampler.report import run_report
from distsampler.sampling.sample import sample_recipe
from distsampler.sweeps import recipe as sweep_recipe
from distsampler.sweeps.plan import make_plan
from distsampler.sweeps.sweep import run_plan
from tests.problems import config, regression, squared_error

TOKEN, PASSWORD, SIGNED = "hf_" + "Zq3" * 11, "correct horse", "https://h.org/x?sig=Zm9vYmFy&v=2"
AT = "s3://reader:letmein42@bucket/weights"
SECRETS = (TOKEN, PASSWORD, "Zm9vYmFy", "letmein42", "wandb-0815")
LOGIN = {"source": AT, "login": {"password": PASSWORD}}
ENVIRONMENT = {"env_vars": {"HF_TOKEN": TOKEN, "WANDB_API_KEY": "wandb-0815", "MODE": "fast"}}
PARTS = """
import torch
from tests.problems import regression, squared_error


def model(token, url, wrong="", **rest):
    if wrong:
        raise RuntimeError(f"cannot log in with {rest} and {token} at {url}")
    assert token.startswith("hf_"), token
    return regression()[0]


def data(source, login):
    assert login["password"] == "correct horse", login
    return regression()[1]


def loss(model, batch, api_key=""):
    if api_key == "no":
        raise RuntimeError("Authorization: Bearer abcdefghijklmnopqrstuvwxyz")
    return squared_error(model, batch)
"""


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"login with {TOKEN}, please", f"login with {REDACTED}, please"),
        (AT, f"s3://{REDACTED}@bucket/weights"),
        ("https://h/x?a=1&token=abc&b=2", f"https://h/x?a=1&token={REDACTED}&b=2"),
        ("https://h/x?X-Amz-Signature=00ff&e=3", f"https://h/x?X-Amz-Signature={REDACTED}&e=3"),
        ("Authorization: Bearer abc.def-0123456", f"Authorization: Bearer {REDACTED}"),
        ("ghp_" + "a1B2" * 9, REDACTED),
        ("sk-proj-" + "a1-B2" * 9, REDACTED),
        *(
            (text, text)
            for text in (
                "s3://bucket/run@2", "EleutherAI/pythia-70m@step1000", "ray://host:10001",
                "https://h/x?design=abc&step=2", "hf_transformer_of_mine", "a token, a password",
                "runs/sk-learn-digits-with-a-long-name/one", "git+ssh://git@github.com/a/b",
                "n='tokens', l0h3+l1.mlp",
            )
        ),
    ],
)  # fmt: skip
def test_what_looks_like_a_secret_is_taken_out_of_a_text_and_nothing_else(
    text: str, clean: str
) -> None:
    assert redacted(text) == clean
    assert redacted(redacted(text)) == clean


def test_names_decide_about_what_a_user_named_and_about_nothing_else() -> None:
    secret = ("token", "HF_TOKEN", "api_key", "apiKey", "AWS_ACCESS_KEY_ID", "PGPASSWORD", "secret")
    plain = ("eos_token", "pad_token", "max_tokens", "tokenizer", "key", "url", "monkey")
    kwargs = dict.fromkeys((*secret, *plain), "some value")
    clean = redacted({"model_kwargs": kwargs, "n": 3})["model_kwargs"]
    assert {name for name, value in clean.items() if value == REDACTED} == {*secret}
    flags = {"token": True, "password": None, "secrets": {"a": ["b", 7]}}
    assert redacted(flags, named=True) == {**flags, "secrets": {"a": [REDACTED, REDACTED]}}
    labels = {"restrict_to": {"embed.token": "a mask"}, "restrictions": {"token": ["a"]}}
    assert redacted(labels) == labels
    assert list(missing({"model_kwargs": clean})) == [f"model_kwargs.{name}" for name in secret]


def test_errors_hold_no_secret_and_still_pickle() -> None:
    for error in (ConfigError(TOKEN), StoreError(f"at {AT}"), RunFailed(TOKEN, {0: "lost"})):
        for each in (error, pickle.loads(pickle.dumps(error))):
            assert REDACTED in str(each)
            assert not any(secret in repr(each) for secret in SECRETS)


def parts(folder: Path, **changes: Any) -> Path:
    (folder / "parts.py").write_text(PARTS)
    (folder / "run.yaml").write_text(
        yaml.safe_dump(
            {
                "model": "parts.py:model",
                "model_kwargs": {"token": TOKEN, "url": SIGNED},
                "data": "parts.py:data",
                "data_kwargs": LOGIN,
                "probes": {"side": {"data": "parts.py:data", "data_kwargs": LOGIN}},
                "loss": "parts.py:loss",
                "placement": {"runtime_env": ENVIRONMENT},
                **config(draws=12, burn_in=2).model_dump(mode="json", exclude_unset=True),
                **changes,
            }
        )
    )
    return folder / "run.yaml"


def all_text(folder: Path) -> str:
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    return "\n".join(file.read_bytes().decode(errors="replace") for file in files)


def clean(text: str) -> bool:
    return not [secret for secret in SECRETS if secret in text]


def cli(monkeypatch: pytest.MonkeyPatch, capsys: Any, *words: object) -> str:
    """All that a command prints."""
    monkeypatch.setattr(sys, "argv", ["distsampler", *map(str, words)])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main sets its own
    with warnings.catch_warnings(), pytest.raises(SystemExit):
        main()
    out = capsys.readouterr()
    return str(out.out + out.err)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secrets")
    asked = recipe.load(parts(folder))
    sample_recipe(asked, folder / "run", ds.SerialPool(), quiet=True)
    return folder


@pytest.mark.filterwarnings("ignore::distsampler.errors.NotConvergedWarning")
def test_no_file_of_a_run_or_report_holds_a_secret(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    store = stored / "run"
    text = all_text(store)
    assert clean(text)
    record = ds.open(store).manifest.recipe
    assert record is not None
    url = SIGNED.replace("Zm9vYmFy", REDACTED)
    assert record["model_kwargs"] == {"token": REDACTED, "url": url}
    assert '"MODE": "fast"' in text
    run = ds.open(store)
    run_report.write(run, tmp_path / "run.html")
    assert "again.yaml" in (tmp_path / "run.html").read_text()
    run.inference_data.to_netcdf(str(tmp_path / "run.nc"))
    assert clean(all_text(tmp_path))
    printed = [
        cli(monkeypatch, capsys, *words)
        for words in (
            ("llc", store), ("diagnose", store, "--json"), ("ls", stored),
            ("watch", store, "--once"), ("resume", store, "--quiet"),
        )
    ]  # fmt: skip
    assert all(printed)
    assert clean("".join(printed))
    assert clean(repr(run) + repr(ds.open(store).manifest.recipe))


def test_a_run_is_continued_with_its_file_or_with_the_secrets_given_again(stored: Path) -> None:
    store, asked = stored / "run", recipe.load(stored / "run.yaml")
    run = sample_recipe(asked, store, ds.SerialPool(), "must", quiet=True)
    assert run.manifest.status == "finished"
    manifest = run.manifest
    assert manifest.recipe is not None
    with pytest.raises(ConfigError) as caught:
        recipe.reload(manifest.recipe, manifest.config)
    for part in (
        "data_kwargs.login.password, data_kwargs.source, model_kwargs.token, model_kwargs.url, "
        "probes.side.data_kwargs.login.password, probes.side.data_kwargs.source must",
        "--set data_kwargs.login.password=... --set data_kwargs.source=...",
        "distsampler run FILE.yaml --resume must",
    ):
        assert part in str(caught.value)
    again = [
        f"model_kwargs.token={TOKEN}",
        f"model_kwargs.url={SIGNED}",
        f"data_kwargs.source={AT}",
        f"data_kwargs.login.password={PASSWORD}",
        f"probes.side.data_kwargs.source={AT}",
        f"probes.side.data_kwargs.login.password={PASSWORD}",
    ]
    longer = recipe.reload(manifest.recipe, manifest.config, [*again, "draws=14"])
    run = sample_recipe(longer, store, ds.SerialPool(), "must", quiet=True)
    assert run.manifest.config.draws == 14
    assert clean(all_text(store))
    with pytest.raises(ConfigError, match="unknown option 'loss_kwargs'"):  # it was no secret
        recipe.reload(manifest.recipe, manifest.config, [*again, "loss_kwargs.api_key=x"])


def test_a_file_that_is_written_lacks_the_secrets_and_says_so_when_it_is_read(stored: Path) -> None:
    recipe.write(recipe.load(stored / "run.yaml"), stored / "chosen.yaml")
    assert clean((stored / "chosen.yaml").read_text())
    with pytest.raises(ConfigError, match=r"model_kwargs\.token, .*must be given again"):
        recipe.load(stored / "chosen.yaml")


def test_actors_get_the_secrets_that_a_store_lacks_from_this_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    placement = PlacementConfig(runtime_env=ENVIRONMENT)
    assert RayCluster(placement).task_options()["runtime_env"] == ENVIRONMENT
    kept = PlacementConfig(**placement.model_dump())
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(PlacementError, match=r"WANDB_API_KEY must be given again.*set an environ"):
        RayCluster(kept).task_options()
    monkeypatch.setenv("WANDB_API_KEY", "wandb-0815")
    assert RayCluster(kept).task_options()["runtime_env"] == ENVIRONMENT
    assert os.environ.keys().isdisjoint({"MODE"})


def test_no_error_of_a_users_mistake_holds_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    wrong = {"model_kwargs": {"token": TOKEN, "url": SIGNED, "password": PASSWORD, "wrong": "yes"}}
    misplaced = {"runtime_env": ENVIRONMENT, "autoscale": True}
    for changes, sentence in (
        (wrong, "cannot log in with"),
        ({"placement": misplaced}, "autoscale needs gpus_per_chain"),
        ({"placement": {"runtime_env": [TOKEN]}}, "runtime_env: input should be"),
        ({"model_kwargs": [{"token": PASSWORD}]}, "model_kwargs must hold options"),
    ):
        text = cli(
            monkeypatch, capsys, "run", parts(tmp_path, **changes), "--store", tmp_path / "run"
        )
        assert sentence in text
        assert clean(re.sub(r"\s+", " ", text)), text
    loss = recipe.load(parts(tmp_path, loss_kwargs={"api_key": "no"}))
    with pytest.raises(DistsamplerError, match="Authorization: Bearer <redacted>"):
        sample_recipe(loss, tmp_path / "run", ds.SerialPool(), quiet=True)


@pytest.mark.filterwarnings("ignore::distsampler.errors.NotConvergedWarning")
def test_no_file_of_a_sweep_holds_a_secret_and_it_is_resumed(stored: Path, tmp_path: Path) -> None:
    file = parts(
        tmp_path,
        sweep={
            "settings": {"cold": {"sampler.nbeta": 5.0}},
            "datasets": {"a": LOGIN},
        },
    )
    for resume in ("never", "auto"):
        swept = run_plan(
            make_plan(sweep_recipe.load(file)), tmp_path / "sweep", ds.SerialPool(), resume, True
        )
        assert swept.counts() == {"finished": 1}
    swept.to_csv(tmp_path / "sweep/table.csv")
    assert clean(all_text(tmp_path / "sweep"))


def test_a_cell_that_fails_keeps_its_reason_without_the_secret(tmp_path: Path) -> None:
    model, data = regression()

    def load(name: str) -> dict[str, Any]:
        raise OSError(f"{name} cannot be had with {TOKEN} from {AT}")

    swept = ds.sweep(
        model, data, squared_error, config(draws=8), checkpoints=["step1"], load=load,
        store=tmp_path / "s", pool=ds.SerialPool(), quiet=True,
    )  # fmt: skip
    assert swept.counts() == {"failed": 1}
    text = all_text(tmp_path / "s")
    assert clean(text)
    assert f"cannot be had with {REDACTED} from s3://{REDACTED}@bucket/weights" in text

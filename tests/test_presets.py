"""Published settings: values, what they mean, and the verdict that they get."""

import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import distsampler as ds
from distsampler.errors import ConfigError
from distsampler.models.sampler import signature_options
from distsampler.presets import PRESETS, Preset
from tests.problems import regression, squared_error


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_config_that_it_says(name: str) -> None:
    preset, config = PRESETS[name], ds.RunConfig.from_preset(name)
    options = signature_options(config.sampler)
    wanted = {"lr": preset.lr, "nbeta": preset.nbeta, "localization": preset.localization}
    assert {key: options[key] for key in wanted} == wanted
    assert (config.chains, config.draws, config.thin) == (preset.chains, preset.draws, preset.thin)
    assert (config.batch_size, config.burn_in) == (preset.batch_size, preset.burn_in)
    assert {name: options[name] for name in preset.options} == dict(preset.options)
    assert set(preset.assumed) <= {*preset.values, *preset.options}


def test_the_published_values_are_those_under_which_they_are_cited() -> None:
    pythia = {p.model.split()[-1]: p for p in PRESETS.values() if "2510.12077" in p.source}
    steps = {"14M": 1e-3, "31M": 3e-4, "70M": 3e-4, "160M": 1e-4, "410M": 1e-4}
    steps |= {"1B": 3e-5, "1.4B": 3e-5, "2.8B": 1e-5, "6.9B": 3e-6}
    assert {size: preset.lr for size, preset in pythia.items()} == steps
    for each in pythia.values():
        assert (each.nbeta, each.localization, each.batch_size) == (30, 300, 32)
        assert (each.chains, each.draws) == (4, 100)
    relaxed = {size: round(preset.relaxation) for size, preset in pythia.items()}
    assert (relaxed["14M"], relaxed["1.4B"], relaxed["6.9B"]) == (7, 222, 2222)


def test_what_a_chain_sees_of_a_flat_direction_is_what_the_text_says() -> None:
    preset = PRESETS["pythia-1.4b-2510.12077"]
    w, variances = np.zeros(20_000), []
    source = np.random.default_rng(0)
    for _ in range(preset.draws):
        variances.append(w.var() * preset.localization)
        pull = preset.lr / 2 * preset.localization * w
        w = w - pull + math.sqrt(preset.lr) * source.standard_normal(len(w))
    assert np.mean(variances) == pytest.approx(preset.reached, abs=0.01)
    assert f"100 see {preset.reached:.0%} of their variance" in str(preset)
    assert preset.reached == pytest.approx(0.34, abs=0.005)


def test_changes_are_merged_into_a_preset_and_checked() -> None:
    name = "pythia-70m-2510.12077"
    changed = ds.RunConfig.from_preset(name, seed=7, sampler={"lr": 1e-5}, gate={"ess": 50.0})
    assert changed.sampler.options == {"lr": 1e-5, "nbeta": 30.0, "localization": 300.0}
    whole = ds.RunConfig.from_preset(name, sampler=ds.SamplerConfig(lr=1e-5))
    assert whole.sampler == changed.sampler
    other = ds.RunConfig.from_preset(name, sampler=ds.SamplerConfig(name="sgnht")).sampler
    assert (other.name, other.options["nbeta"]) == ("sgnht", 30.0)
    assert (changed.seed, changed.gate.ess, changed.gate.rhat) == (7, 50.0, 1.01)
    assert ds.RunConfig.from_preset(name, **{"sampler.lr": 1e-5}).sampler == changed.sampler
    for fields, sentence in (
        ({"num_draws": 3}, "did you mean 'draws'"),
        ({"draws": 0}, "greater than or equal to 1"),
        ({"draws.many": 3}, "draws holds no options"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            ds.RunConfig.from_preset(name, **fields)


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'pythia-70m-2510\.12077'\? known are lan"):
        ds.RunConfig.from_preset("pythia-70m")


def test_the_table_has_a_line_for_each_preset_and_says_which_adapts() -> None:
    lines = ds.presets.table().splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(PRESETS)
    adaptive = [line.split()[0] for line in lines if line.endswith("adaptive")]
    assert adaptive == [name for name, preset in PRESETS.items() if preset.adaptive]
    assert adaptive == ["rmsprop-2507.21449"]
    assert "not in the source as cited: thin, burn_in" in str(PRESETS["pythia-14m-2510.12077"])


def test_presets_are_plain_frozen_values_that_load_nothing() -> None:
    assert all(isinstance(preset, Preset) for preset in PRESETS.values())
    with pytest.raises(AttributeError):
        PRESETS["pythia-14m-2510.12077"].lr = 1.0  # type: ignore[misc]
    values = PRESETS["rmsprop-2507.21449"].values
    assert pickle.loads(pickle.dumps(values)) == values
    code = "import distsampler as ds, sys; ds.presets.table(); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "ray", "arviz", "pydantic", "transformers"} & set(loaded)


@pytest.mark.filterwarnings("ignore::distsampler.errors.NotConvergedWarning")
@pytest.mark.parametrize("name", ["pythia-14m-2510.12077", "rmsprop-2507.21449"])
def test_a_published_setting_gets_the_verdict_that_it_deserves(name: str, tmp_path: Path) -> None:
    """400 draws in all cannot hold 400 independent ones, however fast they relax."""
    model, data = regression()
    few = {"draws": 100, "thin": 5} if name.startswith("rmsprop") else {}  # of 160
    config = ds.RunConfig.from_preset(name, device="cpu", **few)
    run = ds.sample(
        model, data, squared_error, config,
        store=tmp_path / "run", pool=ds.SerialPool(), quiet=True,
    )  # fmt: skip
    with pytest.warns(ds.NotConvergedWarning):
        line = str(run.llc())
    assert run.verdict.status == "NOT_CONVERGED"
    assert "NOT_CONVERGED" in line
    assert ds.open(tmp_path / "run").manifest.config == config  # the values are what is kept

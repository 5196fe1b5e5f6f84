"""Names of other tools and options in the wrong place are answered with ours, everywhere."""

import inspect
from pathlib import Path
from typing import Any

import pytest

import distsampler as ds
from distsampler import option_names, recipe
from distsampler.config import unknown_option
from distsampler.errors import ConfigError
from distsampler.models.sampler import GIVEN, signature_options
from distsampler.optim import SAMPLERS
from distsampler.sweeps.plan import altered
from tests.problems import config, regression, squared_error

FIELDS = {
    "": set(ds.RunConfig.model_fields),
    "sampler": {*ds.SamplerConfig.model_fields, *option_names.SAMPLER_OPTIONS},
    "gate": set(ds.GateConfig.model_fields),
    "placement": set(ds.PlacementConfig.model_fields),
}


def run(**fields: Any) -> None:
    ds.RunConfig(**fields)


def sampler(**options: Any) -> None:
    signature_options(ds.SamplerConfig(**options))


def gate(**fields: Any) -> None:
    ds.GateConfig(**fields)


def placement(**fields: Any) -> None:
    ds.PlacementConfig(**fields)


@pytest.mark.parametrize(
    ("make", "name", "answer"),
    [
        (run, "num_draws", "did you mean 'draws'?"),
        (run, "num_samples", "did you mean 'draws'?"),
        (run, "num-chains", "did you mean 'chains'?"),
        (run, "num_burnin_steps", "did you mean 'burn_in'? (counted in draws, of thin steps each)"),
        (run, "tune", "did you mean 'burn_in'? (counted in draws"),
        (run, "num_steps_bw_draws", "did you mean 'thin'?"),
        (run, "bs", "did you mean 'batch_size'?"),
        (run, "elasticity", "did you mean SamplerConfig(localization=...), in YAML sampler.local"),
        (
            run,
            "temperature",
            "did you mean SamplerConfig(nbeta=...), in YAML sampler.nbeta? (n / T",
        ),
        (run, "learning_rate", "did you mean SamplerConfig(lr=...), in YAML sampler.lr?"),
        (run, "optimizer_kwargs", "did you mean 'sampler'?"),
        (
            run,
            "device_ids",
            "PlacementConfig(gpus_per_chain=...), in YAML placement.gpus_per_chain",
        ),
        (run, "init_loss", "leave it out: the loss at w* is measured"),
        (run, "store", "an argument of sample() itself; for a YAML, --store"),
        (run, "lr", "did you mean SamplerConfig(lr=...), in YAML sampler.lr?"),
        (run, "rhat", "did you mean GateConfig(rhat=...), in YAML gate.rhat?"),
        (run, "gpus_per_chain", "did you mean PlacementConfig(gpus_per_chain=...)"),
        (run, "drawz", "did you mean 'draws'? known are batch_size, batches,"),
        (sampler, "gamma", "did you mean 'localization'? (the gamma of gamma/2 |w - w*|^2)"),
        (sampler, "beta", "did you mean 'nbeta'? (n times beta for n examples"),
        (sampler, "epsilon", "did you mean 'lr'? (the variance of a step's noise"),
        (sampler, "num_samples", "leave it out: n is the number of examples of the data"),
        (sampler, "draws", "did you mean RunConfig(draws=...), in YAML draws?"),
        (sampler, "every", "did you mean GateConfig(every=...), in YAML gate.every?"),
        (sampler, "friction", "friction is an option of sghmc"),
        (sampler, "lrr", "unknown option of sampler 'sgld' 'lrr': did you mean 'lr'? known are"),
        (gate, "r_hat", "did you mean 'rhat'?"),
        (gate, "chains", "did you mean RunConfig(chains=...), in YAML chains?"),
        (placement, "num_gpus", "did you mean 'gpus_per_chain'?"),
        (placement, "threads", "did you mean RunConfig(threads=...), in YAML threads?"),
    ],
)
def test_an_option_of_another_name_or_place_is_answered_with_ours(
    make: Any, name: str, answer: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**{name: 3})
    assert f"unknown option{' of' * (make is sampler)}" in str(caught.value)
    assert answer in str(caught.value)


def test_every_answer_is_an_option_and_no_option_is_answered_with_another() -> None:
    for name, (ours, _) in option_names.OTHER_NAMES.items():
        part, _, option = ours.rpartition(".")
        assert option in FIELDS[part], ours
        assert name not in set().union(*FIELDS.values()), name
    assert not option_names.NEEDLESS.keys() & FIELDS[""]


def test_the_samplers_options_are_those_of_their_signatures() -> None:
    signatures = [inspect.signature(kind).parameters for kind in SAMPLERS.values()]
    declared = {name for parameters in signatures for name in parameters} - {*GIVEN}
    assert declared - {"batch_size"} == {*option_names.SAMPLER_OPTIONS}  # it is the run's
    assert len(option_names.SAMPLER_OPTIONS) == len({*option_names.SAMPLER_OPTIONS})


def test_a_yaml_file_a_sweep_and_a_dict_answer_alike(tmp_path: Path) -> None:
    answer = unknown_option("", "temperature")
    file = tmp_path / "run.yaml"
    file.write_text("model: a:b\ndata: a:b\nloss: a:b\n")
    calls = (
        lambda: recipe.load(file, ["temperature=2"]),
        lambda: altered(ds.RunConfig(), {"temperature": 2}),
        lambda: ds.RunConfig.of({"temperature": 2}),
    )
    for call in calls:
        with pytest.raises(ConfigError) as caught:
            call()
        assert answer in str(caught.value)


def test_a_batch_size_that_only_the_sampler_has_is_refused() -> None:
    model, data = regression()
    asked = config(sampler=ds.SamplerConfig(lr=1e-4, batch_size=7))
    with pytest.raises(ConfigError, match=r"got 7 and .*: set RunConfig\(batch_size=...\)"):
        ds.sample(model, data, squared_error, asked, pool=ds.SerialPool(), quiet=True)

import functools
import pickle
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import distsampler as ds
from distsampler.errors import ConfigError
from tests.problems import regression, squared_error


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"drawz": 5}, "did you mean 'draws'"),
        ({"gate": {"rhatt": 1.1}}, "gate: unknown option 'rhatt': did you mean 'rhat'"),
        ({"placement": {"gpus": 1}}, "gpus_per_chain"),
        ({"draws": "many"}, "draws: input should be a valid integer"),
        ({"chains": 0}, "chains: input should be greater than or equal to 1, got 0"),
        ({"gate": {"ess": float("nan")}}, "gate: ess: input should be a finite number, got nan"),
        ({"mode": "test"}, "'eval' or 'train'"),
        ({"chains": 2, "min_chains": 3}, "min_chains must be at most chains=2: 3"),
        ({"sampler": "sgld"}, "sampler: must be a SamplerConfig, or a dict of its fields, got 'sg"),
        ({"placement": {"gpus": 1}}, "placement: unknown option 'gpus': did you mean 'gpus_per_"),
    ],
)
def test_a_wrong_config_says_what_was_got(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ds.RunConfig(**fields)
    assert sentence in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_config_is_frozen() -> None:
    with pytest.raises(ConfigError, match=r"frozen: replaced\(draws=3\) returns a copy"):
        ds.RunConfig().draws = 3


def test_a_copy_is_validated_as_the_config_was() -> None:
    config = ds.RunConfig(draws=10)
    assert config.model_copy(update={"chains": 3}) == ds.RunConfig(draws=10, chains=3)
    assert config.model_copy() == config
    with pytest.raises(ConfigError, match=r"did you mean SamplerConfig\(lr=...\)"):
        config.model_copy(update={"lr": 1e-4})


def test_a_config_may_be_a_dict() -> None:
    fields = {"chains": 2, "sampler": {"lr": 1e-4}, "gate": MappingProxyType({"rhat": 1.1})}
    config = ds.RunConfig(chains=2, sampler=ds.SamplerConfig(lr=1e-4), gate=ds.GateConfig(rhat=1.1))
    assert ds.RunConfig.of(fields) == ds.RunConfig.of(UserDict(fields)) == config
    assert ds.RunConfig.of(config) is config
    assert ds.RunConfig.of(None) == ds.RunConfig()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (ds.SamplerConfig(lr=1e-4), r"got SamplerConfig: write RunConfig\(sampler=...\)"),
        ("run.yaml", "got str: a calibration has one, its .config; a YAML file is run by"),
        ({1: 2}, "a dict of its fields, got dict"),
        ({"chains": "x"}, "chains: input should be a valid integer, .* got 'x'"),
    ],
)
def test_what_is_no_config_is_one_sentence(config: object, sentence: str) -> None:
    model, data = regression()
    calls: list[Callable[..., object]] = [
        ds.sample,
        ds.start,
        ds.calibrate,
        functools.partial(ds.sweep, store="never-made"),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=sentence):
            call(model, data, squared_error, config, pool=ds.SerialPool())
    assert not Path("never-made").exists()


def test_replaced_validates_and_leaves_unset_what_was_not_set() -> None:
    config = ds.RunConfig(draws=10).replaced(chains=3)
    assert (config.draws, config.chains) == (10, 3)
    assert config.model_fields_set == {"draws", "chains"}
    with pytest.raises(ConfigError, match="min_chains must be at most chains=3: 4"):
        config.replaced(min_chains=4)
    sampler = ds.SamplerConfig(lr=1e-4).replaced(nbeta=2.0, name="sgnht")
    assert sampler == ds.SamplerConfig(name="sgnht", lr=1e-4, nbeta=2.0)
    assert ds.GateConfig(every=5).replaced(every=None) == ds.GateConfig()


configs = st.builds(
    ds.RunConfig,
    sampler=st.builds(
        ds.SamplerConfig,
        name=st.sampled_from(["sgld", "sgnht"]),
        lr=st.floats(1e-12, 1.0),
        nbeta=st.none() | st.floats(0.1, 1e6),
    ),
    chains=st.integers(2, 1000),
    draws=st.integers(1, 10**6),
    seed=st.integers(0, 2**63 - 1),
    restrict_to=st.none() | st.lists(st.text("abc.*", min_size=1), max_size=3).map(tuple),
    gate=st.builds(
        ds.GateConfig, rhat=st.floats(1.001, 2), every=st.none() | st.integers(1, 10**6)
    ),
    placement=st.builds(ds.PlacementConfig, gpus_per_chain=st.none() | st.floats(0, 8)),
)


@given(configs)
def test_any_config_survives_yaml_and_json(config: ds.RunConfig) -> None:
    text = yaml.safe_dump(config.model_dump(mode="json"))
    assert ds.RunConfig(**yaml.safe_load(text)) == config
    assert ds.RunConfig.model_validate_json(config.model_dump_json()) == config


def test_optimal_nbeta_is_n_over_log_n() -> None:
    assert ds.optimal_nbeta(1000) == pytest.approx(144.7648, rel=1e-6)
    assert ds.optimal_nbeta(np.int64(1000)) == ds.optimal_nbeta(1000)
    with pytest.raises(ConfigError, match="at least 2 examples"):
        ds.optimal_nbeta(1)
    for wrong in (1e5, "1000", None):
        with pytest.raises(ConfigError, match=r"an integer, or a DataLoader .*: got "):
            ds.optimal_nbeta(wrong)  # type: ignore[arg-type]


def test_optimal_nbeta_of_a_loader_shows_both_numbers() -> None:
    from torch.utils.data import DataLoader

    loader = DataLoader(list(range(1000)), batch_size=100)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"21\.7147.*1000 examples it would be 144\.765"):
        assert ds.optimal_nbeta(loader) == pytest.approx(21.7147, rel=1e-5)


def test_one_chain_is_allowed() -> None:
    assert ds.RunConfig(chains=1).min_chains == 1

"""What is asked of a cluster, and what its nodes must have."""

from typing import Any

import pytest

import distsampler as ds
from distsampler.errors import ConfigError, PlacementError
from distsampler.execution.placement import (
    check_versions,
    fit,
    local_folders,
    start_failure,
    versions_here,
)

HEAD = {"Alive": True, "Resources": {"CPU": 0.0}, "Labels": {}}
WORKER = {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}, "Labels": {}}
ONE_GPU = ds.PlacementConfig(gpus_per_chain=1)
GROWING = ds.PlacementConfig(gpus_per_chain=1, autoscale=True)


@pytest.mark.parametrize("nodes", [[HEAD], [HEAD, WORKER]])
def test_a_cluster_that_grows_is_asked_for_every_chain(nodes: list[Any]) -> None:
    options, slots = fit(GROWING, ds.RunConfig(chains=6), nodes)
    assert (options["num_gpus"], slots) == (1, 6)


def test_one_that_does_not_grow_holds_what_it_holds() -> None:
    assert fit(ONE_GPU, ds.RunConfig(chains=6), [HEAD, WORKER, WORKER])[1] == 2
    with pytest.raises(PlacementError, match=r"or set placement\.autoscale if this one grows"):
        fit(ONE_GPU, ds.RunConfig(chains=6), [HEAD])


def test_what_nodes_will_have_is_not_guessed() -> None:
    with pytest.raises(ConfigError, match="autoscale needs gpus_per_chain, for example 1"):
        ds.PlacementConfig(autoscale=True)


@pytest.mark.parametrize(
    ("environment", "local"),
    [
        ({}, []),
        ({"env_vars": {"A": "b"}, "pip": ["c"]}, []),
        ({"working_dir": ".", "py_modules": ["net", "s3://bucket/loss.zip"]}, [".", "net"]),
        ({"working_dir": "gcs://_ray_pkg_1.zip"}, []),
    ],
)
def test_local_folders_are_told_from_what_all_nodes_reach(
    environment: dict[str, Any], local: list[str]
) -> None:
    assert local_folders(environment) == local


def test_the_same_versions_are_accepted() -> None:
    assert versions_here().keys() == {"python", "distsampler", "torch", "numpy"}
    check_versions(versions_here(), "10.0.0.3")


@pytest.mark.parametrize("name", ["python", "distsampler", "torch", "numpy"])
def test_another_version_is_named_with_the_drivers(name: str) -> None:
    driver = {**versions_here(), name: "0.0.1"}
    said = rf"node 10\.0\.0\.3 must .* and it has {name} {versions_here()[name]}, not 0\.0\.1: "
    with pytest.raises(PlacementError, match=said):
        check_versions(driver, "10.0.0.3")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\x1b[36mActor\x1b[39m died (pid=1, ip=10.0.0.3)\nModuleNotFoundError: No module named "
         "'nets.small'", "node 10.0.0.3 must have the module 'nets.small', and does not: install"),
        ("Traceback\ndistsampler.errors.ConfigError: no GPU\nhere", "no GPU\nhere"),
        (" who knows\n", "who knows"),
    ],
)  # fmt: skip
def test_why_an_actor_could_not_start_is_said_in_a_sentence(text: str, said: str) -> None:
    assert start_failure(text).startswith(said)

"""The cluster file against Ray's own schema and our rules: pinned, token, nothing exposed."""

import copy
import json
import re
import tomllib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[1]
Config = dict[str, Any]


def pins() -> dict[str, str]:
    lines = (ROOT / "scripts/constraints.txt").read_text().split()
    return {name.lower(): version for name, version in (line.split("==") for line in lines)}


def ray_schema() -> Config:
    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    return json.loads((Path(spec.origin).parent / "autoscaler/ray-schema.json").read_text())


def check_ray_accepts(config: Config) -> None:
    """Ray's schema, then what `ray up` does to a file before it calls the cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    jsonschema.validate(config, ray_schema())
    validate_config(prepare_config(copy.deepcopy(config)))


def check_images_pinned(config: Config) -> None:
    wanted = f"rayproject/ray:{pins()['ray']}-py311-gpu"
    images = [value for key, value in config["docker"].items() if key.endswith("image")]
    images += [
        node["docker"]["worker_image"]
        for node in config["available_node_types"].values()
        if "docker" in node
    ]
    assert images
    assert set(images) == {wanted}


def check_installs_pinned(config: Config) -> None:
    """Every direct dependency at the version of constraints.txt, and this distsampler."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    words = " ".join(config["setup_commands"] + config["head_setup_commands"]).split()
    installed = dict(word.split("==") for word in words if "==" in word)
    installed = {name.split("[")[0]: version for name, version in installed.items()}
    direct = [re.split(r"[><=]", line)[0] for line in project["dependencies"]]
    assert {name: installed.get(name) for name in direct} == {name: pins()[name] for name in direct}
    assert f"/home/ray/dist/distsampler-{project['version']}-py3-none-any.whl" in words
    for word in words:
        assert word in {"pip", "install"} or re.search(r"==|^-|\.whl$", word), f"unpinned: {word}"


def check_private_and_authenticated(config: Config) -> None:
    assert config["provider"]["use_internal_ips"] is True
    assert "security_group" not in config["provider"]  # it could only open more than Ray's own
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    start = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "--ray-client-server-port" not in start


def check_spot_workers_and_a_lasting_head(config: Config) -> None:
    head = config["head_node_type"]
    for name, node in config["available_node_types"].items():
        market = node["node_config"].get("InstanceMarketOptions", {}).get("MarketType")
        assert market == (None if name == head else "spot")
    workers = [n for name, n in config["available_node_types"].items() if name != head]
    assert all(0 < node["min_workers"] <= node["max_workers"] for node in workers)
    assert len({node["node_config"]["InstanceType"] for node in workers}) == 1


CHECKS = [
    check_ray_accepts,
    check_images_pinned,
    check_installs_pinned,
    check_private_and_authenticated,
    check_spot_workers_and_a_lasting_head,
]


def cluster_config() -> Config:
    return yaml.safe_load((ROOT / "cluster/ray-cluster.yaml").read_text())


@pytest.mark.parametrize("check", CHECKS)
def test_the_cluster_file_passes(check: Callable[[Config], None]) -> None:
    check(cluster_config())


def put(*path: str, value: object) -> Callable[[Config], None]:
    """A mutation: the value at a path of keys; a key that is not there yet is added."""

    def mutate(config: Config) -> None:
        place: Any = config
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return mutate


def without(key: str) -> Callable[[Config], None]:
    def mutate(config: Config) -> None:
        del config[key]

    return mutate


def reworded(key: str, old: str, new: str) -> Callable[[Config], None]:
    def mutate(config: Config) -> None:
        assert any(old in command for command in config[key])
        config[key] = [command.replace(old, new) for command in config[key]]

    return mutate


WORKER = ("available_node_types", "gpu-spot")


@pytest.mark.parametrize(
    ("check", "mutate"),
    [
        (check_ray_accepts, put("max_worker", value=8)),
        (check_ray_accepts, put(*WORKER, "min_worker", value=0)),
        (check_ray_accepts, put("docker", "imagee", value="x")),
        (check_ray_accepts, put("idle_timeout_minutes", value="ten")),
        (check_ray_accepts, without("cluster_name")),
        (check_ray_accepts, put("head_node_type", value="haed")),
        (check_ray_accepts, put(*WORKER, "min_workers", value=9)),
        (check_images_pinned, put("docker", "image", value="rayproject/ray:latest-py311-gpu")),
        (check_images_pinned, put("docker", "image", value="rayproject/ray:2.59.0-py311-gpu")),
        (check_images_pinned, put("docker", "worker_image", value="rayproject/ray:nightly")),
        (check_images_pinned, put(*WORKER, "docker", value={"worker_image": "rayproject/ray"})),
        (check_installs_pinned, reworded("setup_commands", "torch==2.13.0", "torch")),
        (check_installs_pinned, reworded("setup_commands", "zarr==3.1.6", "zarr==3.1.5")),
        (check_installs_pinned, reworded("setup_commands", "arviz==0.23.4", "")),
        (check_installs_pinned, reworded("setup_commands", "distsampler-0.1.0", "distsampler-0")),
        (check_installs_pinned, reworded("head_setup_commands", "boto3==", "boto3>=")),
        (check_private_and_authenticated, put("provider", "use_internal_ips", value=False)),
        (check_private_and_authenticated, put("provider", "security_group", value={})),
        (check_private_and_authenticated, put("docker", "run_options", value=[])),
        (check_private_and_authenticated, put("file_mounts", value={"/home/ray/work": "work"})),
        (
            check_private_and_authenticated,
            reworded("head_start_ray_commands", "127.0.0.1", "0.0.0.0"),
        ),
        (
            check_spot_workers_and_a_lasting_head,
            put(*WORKER, "node_config", "InstanceMarketOptions", value={}),
        ),
        (
            check_spot_workers_and_a_lasting_head,
            put(
                "available_node_types",
                "head",
                "node_config",
                "InstanceMarketOptions",
                value={"MarketType": "spot"},
            ),
        ),
    ],
)
def test_a_broken_cluster_file_fails_the_same_check(
    check: Callable[[Config], None], mutate: Callable[[Config], None]
) -> None:
    config = cluster_config()
    mutate(config)
    with pytest.raises((AssertionError, KeyError, ValueError, jsonschema.ValidationError)):
        check(config)

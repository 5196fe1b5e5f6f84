"""What an actor asks of a cluster, how many it has room for, and what its nodes must have."""

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from distsampler.config import PlacementConfig, RunConfig
from distsampler.errors import PlacementError

CUBLAS = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses deterministic products
Node = dict[str, Any]  # as Ray describes it: Alive, Resources, Labels


def fit(
    placement: PlacementConfig, config: RunConfig, nodes: Sequence[Node]
) -> tuple[dict[str, Any], int]:
    """Return an actor's options, as Ray takes them, and how many actors there is room for.

    A cluster that grows has room for as many as there are chains.

    Raises:
        PlacementError: if there will never be room; names the request and the largest node.
    """
    nodes = [node for node in nodes if node["Alive"]]
    gpus = placement.gpus_per_chain
    if gpus is None:
        has_gpus = any(node["Resources"].get("GPU", 0) for node in nodes)
        gpus = 1.0 if has_gpus and config.device != "cpu" else 0.0
    request = {"CPU": placement.cpus_per_chain, "GPU": gpus}
    labels = placement.label_selector or {}
    fitting = [_holds(node, request, labels) for node in nodes]
    if not any(fitting) and not placement.autoscale:
        raise PlacementError(
            f"one node must hold an actor of {_shown(request)}"
            + (f" with labels {labels}" if labels else "")
            + f", but the cluster has {len(nodes)} nodes, the largest with "
            + f"{_shown(max((n['Resources'] for n in nodes), key=_size))}: lower "
            "placement.gpus_per_chain or cpus_per_chain, join a larger cluster, or set "
            "placement.autoscale if this one grows"
        )
    options: dict[str, Any] = {"num_cpus": request["CPU"], "num_gpus": gpus}
    options |= {"max_restarts": 0, "max_task_retries": 0}  # see ray_actor
    if labels:
        options["label_selector"] = labels
    environment = dict(placement.runtime_env or {})
    if gpus and config.deterministic:
        environment["env_vars"] = dict([CUBLAS]) | environment.get("env_vars", {})
    if environment:
        options["runtime_env"] = environment
    return options, config.chains if placement.autoscale else sum(fitting)


def choose_device(config: RunConfig, gpus: float) -> str:
    """Return "cpu" or "cuda", by the config and the GPUs of an actor, not by what a machine sees.

    Raises:
        PlacementError: if a GPU is wanted and none was asked for.
    """
    if config.device == "auto":
        return "cuda" if gpus else "cpu"
    if config.device == "cuda" and not gpus:
        raise PlacementError(
            "device 'cuda' needs gpus_per_chain > 0 and a cluster with GPUs; it has none"
        )
    return config.device


def local_folders(environment: Mapping[str, Any]) -> list[str]:
    """Return what a runtime environment names that is on this machine only."""
    names = [environment.get("working_dir"), *environment.get("py_modules", ())]
    return [str(name) for name in names if name is not None and "://" not in str(name)]


def versions_here() -> dict[str, str]:
    """Return the versions that a chain's numbers and its pickling depend on."""
    return {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "distsampler": sys.modules["distsampler"].__version__,  # importing it would be upwards
        "torch": torch.__version__.partition("+")[0],  # builds for CPU and GPU may meet
        "numpy": np.__version__,
    }


def check_versions(driver: Mapping[str, str], node: str) -> None:
    """Check that this process, on a node, has the driver's versions.

    Raises:
        PlacementError: names both versions of each package that differs.
    """
    here = versions_here()
    others = [name for name in here if here[name] != driver[name]]
    if others:
        differences = ", ".join(f"{name} {here[name]}, not {driver[name]}" for name in others)
        raise PlacementError(
            f"node {node} must have the driver's versions, or its numbers would be others, and it "
            f"has {differences}: start all nodes from one image or environment"
        )


def start_failure(text: str) -> str:
    """Return why an actor could not start: Ray's text, or a sentence where the cause is known."""
    text = re.sub(r"\x1b\[\d*m", "", text).strip()
    ours = re.search(r"^distsampler\.errors\.\w+: (.*)", text, re.MULTILINE | re.DOTALL)
    if ours:
        return ours[1]
    missing = re.search(r"No module named '([\w.]+)'", text)
    if missing is None:
        return text
    node = re.search(r"\bip=([\w.:]+)", text)
    return (
        f"node {node[1] if node else 'of an actor'} must have the module {missing[1]!r}, and does "
        "not: install it on all nodes, put it into a folder of sys.path that they have, or send "
        "it with placement.runtime_env, as "
        f"{{'py_modules': ['path/to/{missing[1].partition('.')[0]}']}} or {{'working_dir': '.'}}"
    )


def _holds(node: Node, request: dict[str, float], labels: dict[str, str]) -> int:
    """How many actors of a request fit on a node."""
    if any(node.get("Labels", {}).get(key) != value for key, value in labels.items()):
        return 0
    have = node["Resources"]
    counts = [have.get(key, 0.0) / amount for key, amount in request.items() if amount]
    return int(min(counts, default=1024) + 1e-9)  # 0.3 / 0.1 is a little less than 3


def _shown(resources: dict[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPU and {resources.get('GPU', 0):g} GPU"


def _size(resources: dict[str, float]) -> tuple[float, float]:
    return resources.get("GPU", 0), resources.get("CPU", 0)

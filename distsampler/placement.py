"""What an actor asks of a cluster, and how many of them it can hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distsampler.config import PlacementConfig, RunConfig
from distsampler.errors import PlacementError

CUBLAS = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses deterministic products
Node = dict[str, Any]  # as Ray describes it: Alive, Resources, Labels


def fit(
    placement: PlacementConfig, config: RunConfig, nodes: Sequence[Node]
) -> tuple[dict[str, Any], int]:
    """Options of an actor, as Ray takes them, and how many of them the cluster holds.

    Raises:
        PlacementError: if none ever will; names the request and the largest node.
    """
    nodes = [node for node in nodes if node["Alive"]]
    gpus = placement.gpus_per_chain
    if gpus is None:
        has_gpus = any(node["Resources"].get("GPU", 0) for node in nodes)
        gpus = 1.0 if has_gpus and config.device != "cpu" else 0.0
    request = {"CPU": placement.cpus_per_chain, "GPU": gpus}
    labels = placement.label_selector or {}
    fitting = [_holds(node, request, labels) for node in nodes]
    if not any(fitting):
        raise PlacementError(
            f"one node must hold an actor of {_told(request)}"
            + (f" with labels {labels}" if labels else "")
            + f", but the cluster has {len(nodes)} nodes, the largest with "
            + f"{_told(max((n['Resources'] for n in nodes), key=_size))}: lower "
            "placement.gpus_per_chain or cpus_per_chain, or join a larger cluster"
        )
    options: dict[str, Any] = {
        "num_cpus": request["CPU"],
        "num_gpus": gpus,
        "max_restarts": 0,
        "max_task_retries": 0,
    }
    if labels:
        options["label_selector"] = labels
    environment = dict(placement.runtime_env or {})
    if gpus and config.deterministic:
        environment["env_vars"] = dict([CUBLAS]) | environment.get("env_vars", {})
    if environment:
        options["runtime_env"] = environment
    return options, sum(fitting)


def choose_device(config: RunConfig, gpus: float) -> str:
    """From the config and the GPUs of an actor, never from what a machine happens to see.

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


def _holds(node: Node, request: dict[str, float], labels: dict[str, str]) -> int:
    """How many actors of a request fit on a node."""
    if any(node.get("Labels", {}).get(key) != value for key, value in labels.items()):
        return 0
    have = node["Resources"]
    counts = [have.get(key, 0.0) / amount for key, amount in request.items() if amount]
    return int(min(counts, default=1024) + 1e-9)


def _told(resources: dict[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPU and {resources.get('GPU', 0):g} GPU"


def _size(resources: dict[str, float]) -> tuple[float, float]:
    return resources.get("GPU", 0), resources.get("CPU", 0)

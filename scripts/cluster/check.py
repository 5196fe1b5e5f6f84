"""The rules for the files of cluster/: each takes the folder and yields the mistakes it finds."""

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from scripts.cluster import command_lines
from scripts.cluster.command_lines import commands

ROOT = Path(__file__).parents[2]
RAY_UP, RAYJOB, SLURM = "ray-cluster.yaml", "kuberay-rayjob.yaml", "slurm.sbatch"
DOCKERFILE, README = "Dockerfile", "README.md"
FILES = (DOCKERFILE, README, RAYJOB, RAY_UP, SLURM)
OPENS = r"0\.0\.0\.0|ray-client-server-port|host(Port|Network)|NodePort|LoadBalancer|\bEXPOSE"
STARTS = (README, RAYJOB, SLURM)  # the files that say how a run is started
SBATCH = {
    "job-name", "nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "exclusive", "time",
    "signal", "requeue", "no-kill", "open-mode", "output", "partition", "account", "mem",
}  # fmt: skip
SLURM_NEEDS = {
    "--signal=B:TERM@": "the driver must be told of the end, to commit",
    "--requeue": "a job that was cut off must come back",
    "--exclusive": "`ray stop` ends every Ray of a user on a node",
    "scontrol requeue": "an interrupted run must come back",
    'kill -TERM "$(cat "$driver")"': "only the driver may have the signal",
    "RAY_AUTH_MODE=token": "every call must carry a token",
    "export RAY_AUTH_TOKEN": "every call must carry a token",
}
Mistakes = Iterator[str]
Config = dict[str, Any]


def check(folder: Path) -> list[str]:
    """All mistakes in a folder of cluster files; a file of another shape is not read further."""
    mistakes: list[str] = []
    for rules in ((files_can_be_read,), SHAPES, RULES):
        mistakes = mistakes or [mistake for rule in rules for mistake in rule(folder)]
    return mistakes


def files_can_be_read(folder: Path) -> Mistakes:
    """All are there, and YAML is YAML."""
    for name in FILES:
        try:
            text = (folder / name).read_text()
            if name.endswith(".yaml"):
                list(yaml.safe_load_all(text))
        except (OSError, yaml.YAMLError) as error:
            yield f"{name}: cannot be read: {error}"


def ray_up_is_accepted(folder: Path) -> Mistakes:
    """Ray's schema, then what `ray up` does to a file before it calls the cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    spec = find_spec("ray.autoscaler")
    schema = Path((spec and spec.origin) or "").parent / "ray-schema.json"
    for config in _ray_up_configs(folder):
        try:
            jsonschema.validate(config, json.loads(schema.read_text()))
            validate_config(prepare_config(copy.deepcopy(config)))
        except (ValueError, KeyError, jsonschema.ValidationError) as error:
            reason = getattr(error, "message", None) or error
            yield f"{RAY_UP}: Ray refuses it: {reason}"


def ray_up_keeps_head_and_token(folder: Path) -> Mistakes:
    """A head that lasts, workers on spot of one type, private addresses, a token."""
    for config in _ray_up_configs(folder):
        head = config["head_node_type"]
        nodes = config["available_node_types"]
        workers = [node for name, node in nodes.items() if name != head]
        if _is_spot(nodes[head]):
            yield f"{RAY_UP}: the head holds the run directory and must not be on spot"
        if not all(_is_spot(node) for node in workers):
            yield f"{RAY_UP}: every worker must be on spot"
        if len({str(_type(node)) for node in workers}) != 1:
            yield f"{RAY_UP}: workers must be of one type: another GPU gives other bits"
        if config["provider"].get("use_internal_ips") is not True:
            yield f"{RAY_UP}: nodes must have private addresses only: use_internal_ips"
        if "security_group" in config["provider"]:
            yield f"{RAY_UP}: a security_group could only open more than Ray's own"
        mounts = config.get("file_mounts", {})
        token = mounts.get("/home/ray/.ray/auth_token") == "~/.ray/auth_token"
        if not token or "-e RAY_AUTH_MODE=token" not in config["docker"].get("run_options", []):
            yield f"{RAY_UP}: every call must carry a token: RAY_AUTH_MODE and its file"


def rayjob_fits_schema(folder: Path) -> Mistakes:
    """Only known fields, the apiVersion, a token, autoscaling from nothing, retries."""
    schemas = yaml.safe_load(Path(__file__).with_name("kuberay-schema.yaml").read_text())
    documents = _documents(folder / RAYJOB)
    kinds = [str(document.get("kind")) for document in documents]
    if sorted(kinds) != ["PersistentVolumeClaim", "RayJob"]:
        yield f"{RAYJOB}: must hold a PersistentVolumeClaim and a RayJob, got {kinds}"
    for kind, document in zip(kinds, documents, strict=True):
        for error in jsonschema.Draft202012Validator(schemas.get(kind, {})).iter_errors(document):
            yield f"{RAYJOB}: {kind} {error.json_path}: {error.message}"


def rayjob_holds_together(folder: Path) -> Mistakes:
    """What is mounted exists, the store is the shared volume, each worker has a GPU."""
    claims = {d["metadata"]["name"] for d in _documents(folder / RAYJOB) if d["kind"] != "RayJob"}
    for where, pod in _pods(folder):
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        shared = [v.get("persistentVolumeClaim", {}).get("claimName") for v in volumes.values()]
        if not claims & set(shared):
            yield f"{RAYJOB}: {where} must mount the claim {claims}"
        for container in pod["containers"]:
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in volumes:
                    yield f"{RAYJOB}: {where} mounts {mount['name']!r}, which is no volume"
            gpus = container["resources"]["limits"].get("nvidia.com/gpu", 0)
            if (gpus > 0) != (where != "headGroupSpec"):
                yield f"{RAYJOB}: {where} has {gpus} GPUs: each worker needs one, the head none"


def slurm_script_is_sound(folder: Path) -> Mistakes:
    """`bash -n`, shellcheck, known #SBATCH options, and what an interruption needs."""
    path = folder / SLURM
    for program in ("bash -n", "shellcheck --norc"):
        yield from _complaints(program.split(), path)
    text = path.read_text()
    for option in re.findall(r"^#SBATCH\s+(.*)$", text, re.MULTILINE):
        name = option.removeprefix("--").split("=")[0].strip()
        if name not in SBATCH:
            yield f"{SLURM}: unknown option #SBATCH {option}"
    active = "\n".join(line for line in text.splitlines() if not re.match(r"\s*#(?!SBATCH)", line))
    for words, reason in SLURM_NEEDS.items():
        if words not in active:
            yield f"{SLURM}: needs {words!r}: {reason}"
    waits = re.search(r"RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=(\d+)", active)
    if waits is None or int(waits[1]) < 300:
        yield f"{SLURM}: RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT must be raised: nodes come up late"


def commands_are_understood(folder: Path) -> Mistakes:
    """Every command line of distsampler and of Ray, parsed by the program itself."""
    for name in FILES:
        for line, reason in command_lines.check(folder / name):
            if reason:
                yield f"{name}: {line}: {reason}"


def runs_resume(folder: Path) -> Mistakes:
    """Whatever starts a run starts the same, with known fields, and goes on with one cut off."""
    from distsampler import recipe
    from distsampler.config import RunConfig
    from distsampler.errors import ConfigError

    for name in STARTS:
        runs = [c for c in commands(folder / name, ("distsampler",)) if c[1] == "run"]
        if not runs:
            yield f"{name}: must say how a run is started"
        for run in runs:
            line = shlex.join(run)
            if not run[2].endswith("config.yaml") or "--store" not in run:
                yield f"{name}: {line}: must be of config.yaml, with a --store"
            if "--resume auto" not in line:
                yield f"{name}: {line}: must go on with what is there: --resume auto"
            fields: Config = {}
            try:
                for option, change in pairwise(run):
                    if option == "--set":
                        recipe.set_field(fields, change)
                RunConfig(**fields)
            except ConfigError as error:
                yield f"{name}: {line}: {error}"


def versions_are_pinned(folder: Path) -> Mistakes:
    """Every package at the version of constraints.txt, and this distsampler."""
    project, pins = _project(), _pins()
    wheel = f"distsampler-{project['version']}-py3-none-any.whl"
    direct = {re.split(r"[><=]", line)[0] for line in project["dependencies"]}
    for name in FILES:
        for _, _, *words in commands(folder / name, ("pip",), "install"):
            pinned = dict(word.split("==") for word in words if "==" in word)
            pinned = {package.split("[")[0]: version for package, version in pinned.items()}
            for package, version in pinned.items():
                if version != pins.get(package, version):
                    yield f"{name}: {package} must be {pins[package]}, got {version}"
            for word in words:
                if not re.search(r"==|^-|\.whl$|\.txt$", word):
                    yield f"{name}: unpinned: {word}"
            wheels = [Path(word).name for word in words if word.endswith(".whl")]
            if any(found != wheel for found in wheels):
                yield f"{name}: must install {wheel}, got {wheels}"
            missing = direct - pinned.keys()
            if wheels and missing and not any(word.endswith("constraints.txt") for word in words):
                yield f"{name}: installs without a version: {sorted(missing)}"


def images_are_pinned(folder: Path) -> Mistakes:
    """Ray's image of our Ray and Python, and the image of this distsampler."""
    ray, version = _pins()["ray"], _project()["version"]
    base = f"rayproject/ray:{ray}-py311-gpu"
    (first,) = re.findall(r"^FROM (.*)$", (folder / DOCKERFILE).read_text(), re.MULTILINE)
    images = [(DOCKERFILE, first, base)]
    for config in _ray_up_configs(folder):
        nodes = config["available_node_types"].values()
        for options in [config["docker"], *[node.get("docker", {}) for node in nodes]]:
            images += [(RAY_UP, v, base) for k, v in options.items() if k.endswith("image")]
    for _, pod in _pods(folder):
        for container in pod["containers"]:
            images.append((RAYJOB, container["image"], f"/distsampler:{version}"))
    for name, image, wanted in images:
        if not image.endswith(wanted):
            yield f"{name}: the image must be {wanted}, got {image}"
    for document in _documents(folder / RAYJOB):
        stated = document.get("spec", {}).get("rayClusterSpec", {}).get("rayVersion", ray)
        if stated != ray:
            yield f"{RAYJOB}: rayVersion must be {ray}, got {stated}"


def nothing_is_exposed(folder: Path) -> Mistakes:
    """No port listens where others can reach it, and no token lies in a file."""
    for name in FILES:
        for line in (folder / name).read_text().splitlines():
            if re.search(OPENS, line):
                yield f"{name}: opens a port: {line.strip()}"
            if re.search(r"auth_token: *[\"']?\w{8}|RAY_AUTH_TOKEN=\w{8}", line):
                yield f"{name}: holds a token: {line.strip()}"
        for _, _, *words in commands(folder / name, ("ray",), "start"):
            if "--head" in words and "--dashboard-host=127.0.0.1" not in words:
                yield f"{name}: the dashboard must listen on 127.0.0.1: {shlex.join(words)}"


Rules = tuple[Callable[[Path], Mistakes], ...]
SHAPES: Rules = (ray_up_is_accepted, rayjob_fits_schema)
RULES: Rules = (
    ray_up_keeps_head_and_token,
    rayjob_holds_together,
    slurm_script_is_sound,
    commands_are_understood,
    runs_resume,
    versions_are_pinned,
    images_are_pinned,
    nothing_is_exposed,
)


def _ray_up_configs(folder: Path) -> Iterator[Config]:
    """The file as it is, and with the commented sections for Google in place."""
    text = (folder / RAY_UP).read_text()
    config = yaml.safe_load(text)
    yield config
    lines = re.findall(r"^#gcp (.*)$", text, re.MULTILINE)
    yield {**config, **yaml.safe_load("\n".join(lines))}


def _is_spot(node: Config) -> bool:
    config = node["node_config"]
    amazon = config.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    return amazon or any(s.get("provisioningModel") == "SPOT" for s in config.get("scheduling", []))


def _type(node: Config) -> object:
    return node["node_config"].get("InstanceType") or node["node_config"].get("machineType")


def _pods(folder: Path) -> Iterator[tuple[str, Config]]:
    """The pods of the RayJob, and where they stand."""
    for document in _documents(folder / RAYJOB):
        if document["kind"] == "RayJob":
            cluster = document["spec"]["rayClusterSpec"]
            yield "headGroupSpec", cluster["headGroupSpec"]["template"]["spec"]
            for group in cluster["workerGroupSpecs"]:
                yield f"worker group {group['groupName']}", group["template"]["spec"]


def _documents(path: Path) -> list[Config]:
    return list(yaml.safe_load_all(path.read_text()))


def _complaints(command: list[str], path: Path) -> Mistakes:
    """What a program that reads scripts says of one."""
    own = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    program = shutil.which(command[0], path=own)
    if program is None:
        yield f"{path.name}: {command[0]} must be installed: scripts/env does it"
        return
    line = [program, *command[1:], path]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        yield f"{path.name}: {command[0]}: {(done.stdout + done.stderr).strip()}"


def _project() -> Config:
    found: Config = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def _pins() -> dict[str, str]:
    lines = (ROOT / "scripts/constraints.txt").read_text().split()
    return {name.lower(): version for name, version in (line.split("==") for line in lines)}


def main() -> int:
    """Prints the mistakes; the exit code."""
    mistakes = check(ROOT / "cluster")
    for mistake in mistakes:
        print(mistake, file=sys.stderr)
    return 1 if mistakes else 0


if __name__ == "__main__":
    sys.exit(main())

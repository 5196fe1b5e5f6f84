"""The files of cluster/: without a mistake as they are, and not with any that is put in."""

import shutil
from pathlib import Path

import pytest

from scripts.cluster.check import DOCKERFILE, FILES, RAY_UP, RAYJOB, README, SLURM, check, main

CLUSTER = Path(__file__).parents[2] / "cluster"
RUN = "distsampler run"

# file, what stands there, what is put in its place, what is said of it
MISTAKES = [
    (RAY_UP, "max_workers: 8\nup", "max_worker: 8\nup", "'max_worker' was unexpected"),
    (RAY_UP, "min_workers: 0 # none", "min_worker: 0 # none", "'min_worker' was unexpected"),
    (RAY_UP, "idle_timeout_minutes: 10", "idle_timeout_minutes: ten", "'ten' is not of type"),
    (RAY_UP, "cluster_name: distsampler\n", "", "'cluster_name' is a required property"),
    (RAY_UP, "head_node_type: head", "head_node_type: haed", "`head_node_type` must be one"),
    (RAY_UP, "min_workers: 0 # none", "min_workers: 9 # none", "global `max_workers` is smaller"),
    (RAY_UP, "#gcp     min_workers: 0", "#gcp     min_worker: 0", "'min_worker' was unexpected"),
    (RAY_UP, "ray:2.60.0-py311-gpu", "ray:latest-py311-gpu", "the image must be rayproject/ray:2."),
    (RAY_UP, "ray:2.60.0-py311-gpu", "ray:2.59.0-py311-gpu", "the image must be rayproject/ray:2."),
    (RAY_UP, "  container_name", "  worker_image: rayproject/ray\n  container_name", "the image"),
    (RAY_UP, "torch==2.13.0", "torch", "unpinned: torch"),
    (RAY_UP, "zarr==3.1.6", "zarr==3.1.5", "zarr must be 3.1.6, got 3.1.5"),
    (RAY_UP, "arviz==0.23.4", "", "installs without a version: ['arviz']"),
    (RAY_UP, "distsampler-0.1.0", "distsampler-0", "must install distsampler-0.1.0"),
    (RAY_UP, "boto3==1.44.5", "boto3>=1.44.5", "unpinned: boto3"),
    (RAY_UP, "client==2.202.0", "client", "unpinned: google-api-python-client"),
    (RAY_UP, "\n  use_internal_ips: true", "\n  use_internal_ips: false", "private addresses only"),
    (RAY_UP, "#gcp   use_internal_ips: true\n", "", "private addresses only"),
    (
        RAY_UP,
        "\n  cache_stopped",
        "\n  security_group: {}\n  cache_stopped",
        "a security_group could",
    ),
    (RAY_UP, "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled", "must carry a token"),
    (RAY_UP, "/home/ray/.ray/auth_token:", "/tmp/auth_token:", "must carry a token"),
    (RAY_UP, "--dashboard-host=127.0.0.1", "", "the dashboard must listen on 127.0.0.1"),
    (RAY_UP, "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "opens a port"),
    (RAY_UP, "start --head", "start --head --ray-client-server-port=10001", "opens a port"),
    (RAY_UP, "--object-manager-port=8076 --d", "--object-port=8076 --d", "No such option"),
    (RAY_UP, "{MarketType: spot}", "{}", "every worker must be on spot"),
    (RAY_UP, "{provisioningModel: SPOT, ", "{", "every worker must be on spot"),
    (
        RAY_UP,
        "InstanceType: m6i.xlarge",
        "InstanceMarketOptions: {MarketType: spot}\n      InstanceType: m6i.xlarge",
        "the head holds the run directory",
    ),
    (RAYJOB, "ray.io/v1\n", "ray.io/v1alpha1\n", "'ray.io/v1' was expected"),
    (RAYJOB, "kind: RayJob", "kind: RayJobs", "must hold a PersistentVolumeClaim and a RayJob"),
    (RAYJOB, "backoffLimit: 5", "backOffLimit: 5", "'backOffLimit' was unexpected"),
    (RAYJOB, "backoffLimit: 5", "backoffLimit: 0", "0 is less than the minimum"),
    (RAYJOB, "maxReplicas: 8", "maxReplica: 8", "'maxReplica' was unexpected"),
    (RAYJOB, "minReplicas: 0", "minReplicas: 4", "0 was expected"),
    (
        RAYJOB,
        "enableInTreeAutoscaling: true",
        "enableInTreeAutoscaling: false",
        "True was expected",
    ),
    (RAYJOB, "rayVersion: 2.60.0", "rayVersion: 2.59.0", "rayVersion must be 2.60.0, got 2.59.0"),
    (RAYJOB, "distsampler:0.1.0", "distsampler:latest", "must be /distsampler:0.1.0"),
    (RAYJOB, "serviceType: ClusterIP", "serviceType: LoadBalancer", "'ClusterIP' was expected"),
    (
        RAYJOB,
        "volumes: &volumes",
        "hostNetwork: true\n          volumes: &volumes",
        "unexpected",
    ),
    (RAYJOB, "env: &env", "ports: [{containerPort: 8265}]\n              env: &env", "unexpected"),
    (RAYJOB, "mode: token", "mode: disabled", "'token' was expected"),
    (RAYJOB, "secretName: distsampler-token", "auth_token: 0123456789abcdef", "unexpected"),
    (RAYJOB, "[ReadWriteMany]", "[ReadWriteOnce]", "['ReadWriteMany'] was expected"),
    (RAYJOB, "claimName: distsampler-store", "claimName: store", "must mount the claim"),
    (RAYJOB, "- {name: store, mountPath", "- {name: stores, mountPath", "which is no volume"),
    (RAYJOB, ", nvidia.com/gpu: 1}\n                volume", "}\n                volume", "0 GPUs"),
    (RAYJOB, "--resume auto", "", "must go on with what is there"),
    (RAYJOB, RUN, "distsampler rum", "no such command: rum"),
    (RAYJOB, "--resume auto", "--resume auto --stor x", "No such option"),
    (RAYJOB, "placement.autoscale", "placement.autoscaled", "did you mean 'autoscale'?"),
    (RAYJOB, "--set placement.gpus_per_chain=1", "", "autoscale needs gpus_per_chain"),
    (README, "placement.start_timeout", "placement.timeout", "unknown option"),
    (SLURM, "--resume auto", "", "must go on with what is there"),
    (SLURM, "--store", "--stores", "No such option"),
    (SLURM, "config.yaml --store", "--store", "must be of config.yaml"),
    (SLURM, "--address", "--adress", "Missing parameter: address"),
    (SLURM, "--num-gpus=", "--num-gpu=", "No such option"),
    (SLURM, '"$SLURM_GPUS_ON_NODE" --', '"$SLURM_GPUS_ON_NODE"', "no -- before the command"),
    (SLURM, "TIMEOUT=900", "TIMEOUT=30", "must be raised"),
    (SLURM, "#SBATCH --requeue\n", "", "a job that was cut off must come back"),
    (SLURM, "#SBATCH --requeue", "#SBATCH --requeu", "unknown option #SBATCH --requeu"),
    (SLURM, "B:TERM@120", "TERM@120", "the driver must be told of the end"),
    (SLURM, "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled", "must carry a token"),
    (SLURM, "RAY_AUTH_TOKEN=$(", "RAY_AUTH_TOKEN=0123456789abcdef$(", "holds a token"),
    (SLURM, "; fi\n", "\n", "bash: "),
    (SLURM, '"$store"', "$store", "shellcheck: "),
    (DOCKERFILE, "ray:2.60.0", "ray:2.60.1", "the image must be rayproject/ray:2.60.0-py311-gpu"),
    (DOCKERFILE, "ray[default]==2.60.0", "ray[default]", "unpinned: ray[default]"),
    (DOCKERFILE, "-c /tmp/constraints.txt ", "", "installs without a version"),
    (DOCKERFILE, "RUN", "EXPOSE 8265\nRUN", "opens a port"),
    (README, "--resume auto --set", "--set", "must go on with what is there"),
    (README, "distsampler llc runs/one", "distsampler lcl runs/one", "no such command: lcl"),
    (README, "ray exec --tmux", "ray exec --tmucks", "No such option"),
    (README, "boto3==1.44.5", "boto3", "unpinned: boto3"),
]


def test_the_files_are_without_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(CLUSTER) == []
    assert main() == 0


@pytest.mark.parametrize(("name", "old", "new", "said"), MISTAKES)
def test_a_mistake_is_found_in_its_file_and_told(
    tmp_path: Path, name: str, old: str, new: str, said: str
) -> None:
    folder = shutil.copytree(CLUSTER, tmp_path / "cluster")
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))
    mistakes = check(folder)
    assert any(said in mistake for mistake in mistakes), mistakes
    assert all(mistake.startswith(f"{name}: ") for mistake in mistakes), mistakes


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_gone_is_missed(tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(CLUSTER, tmp_path / "cluster")
    (folder / name).unlink()
    (mistake,) = check(folder)
    assert mistake.startswith(f"{name}: cannot be read: ")

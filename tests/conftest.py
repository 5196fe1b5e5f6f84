import os
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)

RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # loopback only
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for all tests: four CPUs by name, and two GPUs that are not there."""
    os.environ.update(RAY_ENVIRONMENT)
    import ray

    ray.init(
        num_cpus=4,
        num_gpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
    )
    yield
    ray.shutdown()

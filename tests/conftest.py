import os
from collections.abc import Iterator

import pytest
import torch

from tests.processes import RAY_ENVIRONMENT

torch.set_num_threads(1)


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

"""Joining a cluster: one that does not answer is named at once."""

import socket
from collections.abc import Iterator

import pytest

import distsampler as ds
from distsampler.errors import PlacementError
from distsampler.execution import ray_cluster
from distsampler.execution.ray_cluster import RayCluster, check_answers


@pytest.fixture
def listener() -> Iterator[tuple[socket.socket, str]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server, f"127.0.0.1:{server.getsockname()[1]}"


def test_an_address_where_nobody_listens_is_refused_with_what_to_do(
    listener: tuple[socket.socket, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, address = listener
    server.close()
    monkeypatch.setattr(ray_cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(
        ray_cluster.ray, "init", lambda **_: pytest.fail("it would try for minutes")
    )
    said = rf"must answer at '{address}'.*RAY_ADDRESS.*none does .*refused.*address='local'"
    with pytest.raises(PlacementError, match=said):
        RayCluster(ds.PlacementConfig(address=address)).join()
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(PlacementError, match=said):
        RayCluster(ds.PlacementConfig()).join()


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_somebody_who_listens_and_never_answers_is_no_cluster(
    listener: tuple[socket.socket, str], monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setattr(ray_cluster, "ANSWER_SECONDS", 0.05)
    with pytest.raises(PlacementError, match=r"none does \(timed out\)"):
        check_answers(scheme + listener[1])


@pytest.mark.ray
def test_a_cluster_answers(ray_cluster: None) -> None:
    import ray

    check_answers(ray.get_runtime_context().gcs_address)

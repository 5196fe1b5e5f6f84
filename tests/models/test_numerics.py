"""What the process that calls ``sample`` has set in torch holds wherever its chains run."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distsampler as ds
from distsampler.models.numerics import BACKENDS, ProcessSettings
from tests.assertions import assert_same
from tests.problems import config, regression, squared_error

CHANGED = ProcessSettings(
    torch.float64, "meta", "high",
    (("cudnn.conv.fp32_precision", "ieee"), ("cudnn.benchmark", True)), ("flash",),
)  # fmt: skip


def sample(model: nn.Module, data: Any, **how: Any) -> ds.Run:
    quick = config(draws=10, burn_in=2, thin=1)
    return ds.sample(model, data, squared_error, quick, pool=ds.SerialPool(), quiet=True, **how)


def test_torch_as_it_is_imported_has_the_default_settings_and_they_are_not_named() -> None:
    code = "from distsampler.models.numerics import ProcessSettings as P; assert P.here() == P()"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert str(ProcessSettings()) == ""


def test_settings_are_applied_and_those_of_the_process_restored() -> None:
    before = ProcessSettings.here()
    with contextlib.suppress(KeyError), CHANGED.applied():
        there = ProcessSettings.here()
        assert (there.dtype, there.device, there.matmul) == (torch.float64, "cpu", "high")
        assert there.no_attention == ("flash",)
        assert dict(CHANGED.backends).items() <= dict(there.backends).items()
        with ProcessSettings().applied():
            assert ProcessSettings.here() == ProcessSettings()
        raise KeyError
    assert ProcessSettings.here() == before
    assert all(name in str(CHANGED) for name in ("float64", "meta", "high", "flash attention off"))


def test_every_flag_is_one_that_torch_has() -> None:
    assert all(name in BACKENDS for name, _ in ProcessSettings.here().backends)
    assert torch.backends.cudnn.conv.fp32_precision == BACKENDS["cudnn.conv.fp32_precision"]


@contextlib.contextmanager
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def weighted(model: nn.Module, batch: Any) -> torch.Tensor:
    """Its factor is a third in the default dtype of the process that computes it."""
    inputs, targets = batch
    return (model(inputs) - targets).square().sum(1) * torch.tensor(1 / 3)


def test_a_run_has_the_dtype_of_the_process_that_asked_for_it_and_no_other_continues_it(
    tmp_path: Path,
) -> None:
    _, (x, y) = regression()
    quick = config(draws=10, burn_in=2, thin=1)
    how: dict[str, Any] = {"pool": ds.SerialPool(), "quiet": True}
    with double():
        model, data = nn.Linear(5, 1, bias=False), (x.double(), y.double())
        run = ds.sample(model, data, weighted, quick, store=tmp_path / "run", **how)
        running = ds.start(model, data, weighted, quick, pool=ds.SerialPool())
    assert_same(run, running.wait(60))  # made while this process has another dtype
    assert run.manifest.fingerprint["settings of torch"] == "default dtype torch.float64"
    with pytest.raises(ds.StoreError, match="settings of torch: stored 'default dtype"):
        ds.resume(tmp_path / "run", model, data, weighted, draws=20, **how)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_call_without_gradients_samples_all_the_same(mode: Any) -> None:
    problem = regression()
    usual = sample(*problem)
    with mode():
        run = sample(*problem)
        assert not torch.is_grad_enabled()
    assert_same(run, usual)
    assert "settings of torch" not in run.manifest.fingerprint


def only_on_meta(model: nn.Module, batch: Any) -> torch.Tensor:
    """A loss that works only where new tensors are made on the device "meta"."""
    assert torch.ones(3).device.type == "meta"
    return squared_error(model, batch)


def test_a_loss_has_the_default_device_of_the_process_that_asked_and_nothing_else_has() -> None:
    problem = regression()
    usual = sample(*problem)
    quick = config(draws=10, burn_in=2, thin=1)
    with torch.device("meta"):  # any other code would fail there
        running = ds.start(*problem, only_on_meta, quick, pool=ds.SerialPool())
    run = running.wait(60)
    assert_same(run, usual)
    assert run.manifest.fingerprint["settings of torch"] == "default device meta"


def test_autocast_around_a_call_changes_no_bit_and_is_said() -> None:
    problem = regression()
    usual = sample(*problem)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.warns(UserWarning, match=r"autocast around this call is not used.*precision="),
    ):
        run = sample(*problem)
    assert_same(run, usual)

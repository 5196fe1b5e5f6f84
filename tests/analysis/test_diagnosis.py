"""The verdict: what it refuses, and what it says. Synthetic traces, no torch."""

import json
import math
from typing import Any

import numpy as np
import pytest
import xarray as xr
from numpy.typing import NDArray

import distsampler as ds
from distsampler.analysis import convergence
from distsampler.analysis import diagnosis as diagnostics
from distsampler.analysis import verdict as verdicts
from distsampler.analysis.advice import Situation
from distsampler.analysis.verdict import Verdict

NBETA = 50.0


def dataset(excess: NDArray[np.float64], noise: float = 0.0) -> xr.Dataset:
    """A posterior whose probe sees the excess loss (chain, draw), under minibatch noise."""
    white = np.random.default_rng(5).standard_normal(excess.shape)
    dims = ("chain", "draw")
    return xr.Dataset(
        {
            "excess_loss": (dims, excess + noise * white),
            "probe_loss": (dims, 0.4 + excess),
            "projections": ((*dims, "projection"), np.stack([excess, -2 * excess], 2)),
            "distance": (dims, np.abs(excess)),
        },
        coords={"chain": np.arange(len(excess))},
    )


def white(chains: int = 4, draws: int = 1000, seed: int = 0) -> NDArray[np.float64]:
    return 0.2 + 0.02 * np.random.default_rng(seed).standard_normal((chains, draws))


def judge(data: xr.Dataset, dispersed: bool = False, **gate: Any) -> Verdict:
    config = ds.RunConfig(gate=ds.GateConfig(**gate), init="dispersed" if dispersed else "anchor")
    groups = {"posterior": data, "constant_data": xr.Dataset({"nbeta": NBETA})}
    return verdicts.judge(groups, Situation(config)).verdict


def quadratic(draws: int) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """SGLD from w* on a quadratic, d = 2000, curvature over five decades.

    Returns:
        nbeta (L - L*) and eight random functions of w, of each chain and step; the exact LLC.
    """
    rng = np.random.default_rng(0)
    d, chains = 2000, 4
    curvature = np.logspace(-5, 0, d)  # nbeta h
    gamma = 1.04e-4
    kappa = curvature + gamma
    lr = 1.0 / kappa.max()
    onto = rng.standard_normal((d, 8)) * curvature[:, None] / 2
    w = np.zeros((chains, d))
    loss, functions = np.empty((chains, draws)), np.empty((chains, draws, 8))
    for t in range(draws):
        loss[:, t], functions[:, t] = w**2 @ curvature / 2, w**2 @ onto
        w += -lr / 2 * kappa * w + math.sqrt(lr) * rng.standard_normal(w.shape)
    exact = float((curvature / kappa / (1 - lr * kappa / 4)).sum() / 2)
    return loss, functions, exact


def test_minibatch_noise_alone_would_pass_a_run_that_is_far_off_and_the_probe_does_not() -> None:
    loss, functions, exact = quadratic(1000)
    loss, functions = loss[:, 200:], functions[:, 200:]
    assert 0.7 < loss.mean() / exact < 0.85
    dims = ("chain", "draw")
    noisy = loss + 1500 * np.random.default_rng(1).standard_normal(loss.shape)
    blind = xr.Dataset({"excess_loss": (dims, noisy), "probe_loss": (dims, noisy)})
    seeing = xr.Dataset(
        {
            "excess_loss": (dims, noisy),
            "probe_loss": (dims, loss),
            "projections": ((*dims, "projection"), functions),
        }
    )
    assert judge(blind).converged
    refused = judge(seeing)
    assert refused.status == "NOT_CONVERGED"
    assert refused.r_hat > 1.1


def test_the_verdict_names_the_drift_its_direction_and_its_size_in_units_of_the_llc() -> None:
    still = white(draws=4000)
    assert judge(dataset(still)).converged
    moved = still + 0.004 * np.arange(4000) / 4000
    verdict = judge(dataset(moved))
    assert verdict.status == "NOT_CONVERGED"
    assert verdict.r_hat < 1.01  # R-hat does not see it
    assert "probe_loss is still rising: by 0.197 +- 0.029" in verdict.reason  # 50 times 0.004
    assert "in units of the LLC" in verdict.reason
    assert "times the draws" in verdict.advice
    assert "still falling" in judge(dataset(-moved)).reason


def test_the_advice_for_a_transient_is_a_longer_burn_in() -> None:
    transient = -0.1 * np.exp(-np.arange(4000) / 100)
    diagnosis = diagnostics.diagnose(dataset(white(draws=4000) + transient), nbeta=NBETA)
    verdict = verdicts.gate(diagnosis, Situation(ds.RunConfig()))
    assert verdict.status == "NOT_CONVERGED"
    assert 100 < diagnosis.settled < 1200
    assert f"burn_in={diagnosis.settled}, {diagnosis.settled} draws more" in verdict.advice
    rest = dataset((white(draws=4000) + transient)[:, diagnosis.settled :])
    assert judge(rest).converged


def test_a_chain_that_lies_apart_is_named_in_reason_and_remarks() -> None:
    values = white()
    values[2] += 0.02
    diagnosis = diagnostics.diagnose(dataset(values), nbeta=NBETA)
    assert [each.chain for each in diagnosis.outliers] == [2]
    verdict = verdicts.gate(diagnosis, Situation(ds.RunConfig()))
    assert "chain 2 lies apart in" in verdict.reason
    assert "whether chain 2 is stuck" in verdict.advice
    assert any("chain 2 lies apart" in line for line in diagnosis.remarks())
    assert diagnostics.diagnose(dataset(white())).outliers == ()


def test_a_bracket_that_has_not_closed_is_said_with_both_sides() -> None:
    values = white(draws=4000)
    closed = judge(dataset(values), dispersed=True)
    assert closed.converged
    assert "nested R-hat" in closed.reason
    values[1::2] += 0.006  # 0.3 sd between even and odd: R-hat 1.01, if none were dispersed
    verdict = judge(dataset(values), dispersed=True, rhat=1.02, ess=300)
    assert verdict.status == "NOT_CONVERGED"
    assert verdict.r_hat < 1.02
    assert "the bracket has not closed" in verdict.reason
    assert "even chains, from w*, give an LLC of 10" in verdict.reason
    assert "the odd ones, started dispersed, 10.3" in verdict.reason
    assert judge(dataset(values), rhat=1.02, ess=300).converged


def test_even_and_odd_chains_that_come_from_two_sides_do_not_cancel_in_the_drift() -> None:
    values, ramp = white(draws=4000), 0.006 * (np.arange(4000) / 4000 - 0.5)
    values[::2] += ramp
    values[1::2] -= ramp
    assert "still" in judge(dataset(values), dispersed=True).reason
    assert judge(dataset(values), dispersed=False).converged


def test_the_bracket_holds_the_mean_of_each_side_and_its_error() -> None:
    values = white(6, 2000)
    values[1::2] += 0.1
    diagnosis = diagnostics.diagnose(dataset(values), nbeta=NBETA, dispersed=True)
    assert diagnosis.bracket is not None
    for side, part in zip(diagnosis.bracket, (values[::2], values[1::2]), strict=True):
        assert side.mean == pytest.approx(NBETA * part.mean())
        assert side.se == pytest.approx(NBETA * 0.02 / math.sqrt(part.size), rel=0.5)
    only = dataset(values).isel(chain=[0, 2, 4])
    lost = judge(only, dispersed=True)
    assert lost.status == "UNDETERMINED"
    assert "one kind is lost" in lost.reason


def test_nested_r_hat_is_the_papers() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.standard_normal((2, 3, 5000))
    assert convergence.nested_r_hat([one, other]) == pytest.approx(1.0, abs=1e-3)
    apart = convergence.nested_r_hat([one, other + 1])  # B = 1/2, W = 1
    assert apart == pytest.approx(math.sqrt(1.5), rel=0.02)
    spread = one + np.array([[-1.0], [0.0], [1.0]])  # chains apart within a superchain: W = 2
    assert convergence.nested_r_hat([spread, other + np.array([[0.0], [1.0], [2.0]])]) == (
        pytest.approx(math.sqrt(1.25), rel=0.02)
    )
    assert math.isnan(convergence.nested_r_hat([one, other[:0]]))


def test_a_wanted_error_is_part_of_the_verdict() -> None:
    data = dataset(white(), noise=1.0)  # error 1/sqrt(4000) of 0.2: 8 %
    assert judge(data).converged
    verdict = judge(data, relative_error=0.05)
    assert verdict.status == "NOT_CONVERGED"
    assert "of the LLC, not below 5.0%" in verdict.reason
    assert "times the draws" in verdict.advice
    assert judge(data, relative_error=0.2).converged


def test_an_llc_below_zero_converges_as_any_other_and_is_remarked() -> None:
    data = dataset(white() - 0.4, noise=1.0)
    assert judge(data, relative_error=0.2).converged
    assert "of the LLC, not below 5.0%" in judge(data, relative_error=0.05).reason
    said = "reached lower loss than at w*"
    assert any(said in line for line in diagnostics.diagnose(data).remarks())
    assert not any(said in line for line in diagnostics.diagnose(dataset(white())).remarks())
    nothing = judge(dataset(np.zeros((4, 1000)) + [0.01, -0.01] * 500), relative_error=0.2)
    assert "the LLC is zero" in nothing.reason


def test_signal_to_noise_and_acceptance_are_reported() -> None:
    data = dataset(white(), noise=0.1)
    stats = xr.Dataset({"acceptance": (("chain", "draw"), np.full((4, 1000), 0.9))})
    diagnosis = diagnostics.diagnose(data, stats)
    assert diagnosis.signal_to_noise == pytest.approx(0.2, rel=0.1)
    assert diagnosis.acceptance == pytest.approx(0.9)
    assert math.isinf(diagnostics.diagnose(dataset(white())).signal_to_noise)
    assert any("0.9000" in line for line in diagnosis.remarks())
    found = diagnosis.as_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_long_traces_are_thinned_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "POOLED", 2000)
    diagnosis = diagnostics.diagnose(dataset(white(draws=1300)))
    assert (diagnosis.draws, diagnosis.stride) == (1300, 3)
    assert diagnosis.ess < 2200
    assert any("one draw in 3 " in line for line in diagnosis.remarks())


def test_the_error_of_a_thinned_trace_is_that_of_all_its_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """White noise of sd 1: whatever the stride, the error is 1 / sqrt(draws), on each side too."""
    still = np.broadcast_to(np.array([[0.2], [0.3], [0.2], [0.3]]), (4, 4000)) + 1e-3 * white(
        4, 4000
    )
    data = dataset(still, noise=1.0)
    found = {}
    for pooled in (diagnostics.POOLED, 4 * 4000 // 10):
        monkeypatch.setattr(diagnostics, "POOLED", pooled)
        diagnosis = diagnostics.diagnose(data, nbeta=1.0, dispersed=True)
        assert diagnosis.bracket is not None
        row = next(row for row in diagnosis.rows if row.name == "excess_loss")
        assert row.sd == pytest.approx(1.0, rel=0.05), "of single draws"
        found[diagnosis.stride] = [row.mcse, *(side.se for side in diagnosis.bracket)]
    assert list(found) == [1, 10]
    assert found[10] == pytest.approx(found[1], rel=0.25)
    assert found[1][0] == pytest.approx(1 / math.sqrt(16_000), rel=0.1)


def test_what_an_advisory_quantity_would_need_is_known() -> None:
    diagnosis = diagnostics.diagnose(dataset(white()))
    row = next(row for row in diagnosis.rows if row.name == "distance")
    assert not row.gated
    assert diagnosis.draws_for(row, 400) == pytest.approx(1000 * 400 / row.ess)

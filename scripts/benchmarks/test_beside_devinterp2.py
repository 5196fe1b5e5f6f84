"""The arithmetic of scripts/bench beside, on known numbers. Speeds are never asserted."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from distsampler.truth import discretised_laws
from scripts.benchmarks import beside_devinterp2, beside_models, beside_worker
from scripts.benchmarks.beside_devinterp2 import FAST, as_theirs, pull_variance, variance_ratios


def test_theirs_averages_burn_in_and_subtracts_the_loss_of_other_rows() -> None:
    excess = [[0.0, 0.2, 0.4, 0.4], [0.0, 0.4, 0.6, 0.6]]  # the first two draws are burn-in
    losses = 1.5 + np.array(excess)
    by_hand = 10.0 * (losses.mean() - 1.4)
    rebuilt = as_theirs(excess, 2, nbeta=10.0, init_loss=1.5, init_loss_of_their_rows=1.4)
    assert rebuilt.value == pytest.approx(by_hand)
    assert rebuilt.rows == pytest.approx(1.0)
    ours = 10.0 * np.mean([0.4, 0.4, 0.6, 0.6])
    assert ours + rebuilt.burn_in + rebuilt.rows == pytest.approx(by_hand)
    assert rebuilt.burn_in == pytest.approx(-1.75)
    assert rebuilt.se == pytest.approx(0.75)  # chains of 2.5 and 4: half their distance


def test_the_pull_begins_at_one_step_of_noise_and_ends_at_the_exact_law() -> None:
    lr, gamma = 1e-3, 300.0
    assert pull_variance(lr, gamma, 0) == 0.0
    assert pull_variance(lr, gamma, 1) == pytest.approx(lr)
    exact = discretised_laws.sgld(lr, gamma)
    assert pull_variance(lr, gamma, 10_000) == pytest.approx(exact)
    assert exact == pytest.approx(1 / (gamma * (1 - lr * gamma / 4)))


def test_a_ratio_of_variances_is_that_of_the_walk() -> None:
    """A walk that follows the recursion has ratio 1; one that loses the pull is too wide."""
    run, weights, steps = beside_devinterp2.PULL, 20_000, 300
    noise = torch.Generator().manual_seed(0)
    right, lost = torch.zeros(2, weights, dtype=torch.float64)
    for _ in range(steps):
        step = run.lr**0.5 * torch.randn(weights, generator=noise, dtype=torch.float64)
        right = (1 - run.lr * run.localization / 2) * right + step
        lost = lost + step
    distances = [right.norm().item(), lost.norm().item()]
    kept, wide = variance_ratios(distances, [steps, steps], weights)
    assert kept == pytest.approx(1.0, abs=4 * (2 / weights) ** 0.5)
    assert wide == pytest.approx(
        steps * run.lr / pull_variance(run.lr, run.localization, steps), rel=0.04
    )
    assert wide > 1.4


def test_the_rows_of_their_loss_are_the_first_batches_of_their_order() -> None:
    net, data = beside_models.untrained("gpt2"), beside_models.rows()
    assert data.shape == (beside_models.ROWS, beside_models.LENGTH)
    rows = [{"input_ids": row} for row in data]  # as a data set of Hugging Face gives them
    order = torch.Generator().manual_seed(FAST.seed)
    loader = iter(DataLoader(rows, FAST.batch_size, shuffle=True, generator=order, drop_last=True))  # type: ignore[arg-type]
    read = torch.cat([next(loader)["input_ids"] for _ in range(32)])
    with torch.no_grad():
        expected = beside_models.loss(net, read).mean().item()
        everywhere = beside_models.loss(net, data).mean().item()
    measured = beside_worker.loss_of_their_rows(net, data, FAST)
    assert measured == pytest.approx(expected, rel=1e-6)
    assert abs(everywhere - expected) > 1e-5


def test_bf16_rows_are_sampled_from_rounded_weights_in_float32(tmp_path: object) -> None:
    path = f"{tmp_path}/gpt2.pt"
    torch.save(beside_models.untrained("gpt2").state_dict(), path)
    exact = beside_models.trained("gpt2", "fp32", path).state_dict()
    for name, weight in beside_models.trained("gpt2", "bf16", path).state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, exact[name].bfloat16().float())


def test_another_loss_at_the_anchor_is_refused() -> None:
    beside_devinterp2.check_fair(2.0, 2.01)
    with pytest.raises(SystemExit, match="not fair"):
        beside_devinterp2.check_fair(2.0, 2.1)


def test_the_tables_say_what_was_not_measured() -> None:
    about = {"model": "gpt2", "dtype": "bf16", "parameters": 5, "init_loss": 2.0}
    rebuilt = {"value": 3.5, "se": 0.1, "burn_in": -0.25, "rows": 0.5}
    llc = about | {
        "settings": {"lr": 1e-3},
        "ours": {"llc": 3.25, "se": 0.1, "verdict": "CONVERGED"},
        "as_theirs": rebuilt,
    }
    theirs = {"llc": 7.5, "se": 0.0}
    pull = about | {"steps": [99], "ratios": {"ours": [1.0], "theirs": [12.7]}}
    speed = about | {"speeds": {"ours": 100.0}, "peak_mb": {"ours": 500.0}}
    rows = {"llc": [llc | {"theirs": theirs}], "pull": [pull], "speed": [speed]}
    text = beside_devinterp2.tables(rows, "no network")
    assert "| 3.25 ± 0.10 | CONVERGED | -0.25 | +0.50 | 3.50 ± 0.10 | 7.50 ± 0.00 | 4.00" in text
    assert "| gpt2 bf16 | 100 | 1.000 | 12.700 |" in text
    assert "a row with bf16 weights will be added" in text
    assert text.endswith("no network")
    assert beside_devinterp2.NOT_MEASURED in text

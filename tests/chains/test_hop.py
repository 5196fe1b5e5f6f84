"""The correction of a shard's gradient, and the prediction of what it leaves."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import distsampler as ds
from distsampler.chains import hop
from distsampler.chains.chain import Chain
from distsampler.facts import Posterior
from distsampler.models.replica import Replica
from distsampler.sampling.prepare import prepare
from tests import problems
from tests.assertions import assert_mean

CURVATURES = np.linspace(0.2, 1.8, 8)


@pytest.mark.parametrize(
    ("eps_kappa", "visit", "thin"),
    [(0.1, 1, 1), (0.1, 10, 3), (0.4, 3, 10), (0.4, 100, 1), (0.1, 10, 20), (0.1, 12, 8)],
)
def test_the_bias_of_one_direction_is_that_of_a_simulated_chain(
    eps_kappa: float, visit: int, thin: int
) -> None:
    """20,000 copies with schedules of their own, each at a step of a visit where draws fall."""
    nbeta, gamma, copies = 3.0, 0.7, 20_000
    q = np.arange(1.0, 9.0) / 36
    mean = float(q @ CURVATURES)
    lr = eps_kappa / (nbeta * mean + gamma)
    rng = np.random.default_rng(0)
    w = rng.standard_normal(copies) / np.sqrt(nbeta * mean + gamma)
    visits = int(np.ceil(12 / eps_kappa / visit)) + 2
    stop = (thin * (rng.integers(visit, size=copies) + 1) - 1) % visit  # of the last visit
    for number in range(visits):
        h = CURVATURES[rng.choice(8, size=copies, p=q)]
        last = number == visits - 1
        for step in range(visit):
            moved = w - lr / 2 * (nbeta * h + gamma) * w + lr**0.5 * rng.standard_normal(copies)
            w = np.where(last & (step >= stop), w, moved)
    plain = lr / (1 - (1 - lr * (nbeta * mean + gamma) / 2) ** 2)
    own, everywhere = hop.in_direction(CURVATURES, q, Posterior(nbeta, gamma), lr, visit, thin)
    for readout, predicted in (
        (h * w**2 / (mean * plain), own),
        (w**2 / plain, everywhere),
    ):
        assert_mean(readout.mean() - 1, predicted, readout.std() / copies**0.5)
    wrong = hop.in_direction(CURVATURES, q, Posterior(nbeta, gamma), lr, max(10 * visit, 50))[1]
    if visit < 100:
        error = (w**2 / plain).std() / copies**0.5
        assert abs((w**2 / plain).mean() - 1 - wrong) > 5 * error  # another visit: another bias


def test_the_bias_is_what_was_measured_on_eight_shards() -> None:
    """Curvatures .2 to 1.8: 11 and 41 % at hop_every 10 and 100 for lr kappa = .1."""
    q = np.full(8, 1 / 8)
    found = [hop.in_direction(CURVATURES, q, Posterior(1.0), 0.1, k)[1] for k in (1, 10, 100)]
    assert found == pytest.approx([0.007, 0.108, 0.417], abs=0.001)
    assert hop.in_direction(np.ones(8), q, Posterior(1.0), 0.1, 10) == pytest.approx((0.0, 0.0))
    assert hop.in_direction(CURVATURES, q, Posterior(1.0), 4.0, 10) == (np.inf, np.inf)


class Vector(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))


def bowl(model: Vector, batch: Any) -> Tensor:
    """``c/2 |w - x|^2``: curvature and centre of an example are in its row."""
    c, x = batch
    return c / 2 * (model.w - x).square().sum(1)


def bowls(curvatures: list[float], size: int = 6, each: int = 40) -> list[tuple[Tensor, Tensor]]:
    """Shards of such examples, with centres of their own; all together have their mean at 0."""
    generator = torch.Generator().manual_seed(0)
    shards = []
    for curvature in curvatures:
        centre = 3 * torch.randn(size, generator=generator)
        x = centre + torch.randn(each, size, generator=generator)
        shards.append((torch.full((each,), curvature), x))
    middle = sum((c[:, None] * x).sum(0) for c, x in shards) / sum(c.sum() for c, _ in shards)
    return [(c, x - middle) for c, x in shards]


def spec_of(shards: Any, **fields: Any) -> Any:
    sampler = {"name": "sgld", "lr": 1e-3, "nbeta": 50.0, "localization": 1.0}
    config = problems.config(
        data_mode="hop", sampler=ds.SamplerConfig(**sampler), hop_every=5, **fields
    )
    return prepare(Vector(6), shards, bowl, config)


def test_the_corrected_gradient_is_that_of_all_data_at_the_anchor() -> None:
    """And there alone the shard's own is far from it."""
    spec = spec_of(bowls([1.0, 1.0, 1.0]), batch_size=100)
    at_anchor = problems.anchored(spec)
    replica = Replica(spec, torch.device("cpu"))
    for shard, (start, stop) in enumerate(spec.rows.spans):
        own = hop.gradient(replica, spec, start, stop)
        assert np.allclose(own, at_anchor.shard_gradients[shard])
        assert np.linalg.norm(own) > 1
        assert own == pytest.approx(-spec.rows.take(np.arange(start, stop))[1].mean(0), abs=1e-5)
    chain = Chain(spec, 0, at_anchor)
    stream = chain._batches
    for step in (0, 5, 10):
        start, stop = stream.span(step)
        replica = chain.replica
        replica.backward(replica.losses(replica.batch(np.arange(start, stop))))
        chain._shift.apply(step)  # type: ignore[union-attr]
        assert float(replica.flats[0].grad.abs().max()) < 1e-4  # type: ignore[union-attr]


def test_equal_curvatures_predict_no_bias_however_far_the_centres_lie() -> None:
    at_anchor = problems.anchored(spec_of(bowls([1.0, 1.0, 1.0])))
    assert at_anchor.hop_bias == pytest.approx((0.0, 0.0), abs=1e-6)


def test_the_prediction_is_that_of_the_curvatures() -> None:
    curvatures = [0.5, 1.0, 1.5]
    spec = spec_of(bowls(curvatures))
    at_anchor = problems.anchored(spec)
    q = np.full(3, 1 / 3)
    expected = hop.in_direction(np.array(curvatures), q, Posterior(50.0, 1.0), 1e-3, 5, 3)
    assert at_anchor.hop_bias == pytest.approx(expected, rel=1e-3)


def test_chance_is_no_heterogeneity_of_large_shards() -> None:
    """Of 1,024 rows of shards of a million, the spread is nearly all chance."""
    rng = np.random.default_rng(0)
    halves = 1 + 0.1 * rng.standard_normal((200, 2))
    sizes = np.full(200, 1e6)
    found = hop._heterogeneous(halves, sizes)
    assert found.std() < 0.03  # 0.07 of the halves' means
    small = hop._heterogeneous(halves, np.full(200, 1024.0))
    assert small.std() == pytest.approx(halves.mean(1).std(), rel=0.15)


def test_shards_that_differ_too_much_are_refused_and_leave_no_run(tmp_path: Any) -> None:
    shards = bowls([0.2, 1.0, 1.8])
    sampler = ds.SamplerConfig(lr=4e-3, nbeta=50.0, localization=1.0)
    config = problems.config(data_mode="hop", sampler=sampler, hop_every=50)
    for resume in ("never", "auto"):
        with pytest.raises(ds.RunFailed, match=r"3 shards would make the LLC \+\d+.*hop_every=50"):
            ds.sample(
                Vector(6), shards, bowl, config, store=tmp_path, resume=resume,  # type: ignore[arg-type]
                pool=ds.SerialPool(), quiet=True,
            )  # fmt: skip
        assert list(tmp_path.iterdir()) == []
    slower = ds.SamplerConfig(lr=1e-3, nbeta=50.0, localization=1.0)
    gentle = config.replaced(hop_every=1, sampler=slower)
    run = ds.sample(Vector(6), shards, bowl, gentle, pool=ds.SerialPool(), quiet=True)
    assert 0 < run.facts["hop_bias_on_all_data"] < 0.02
    estimate = run.llc("ignore")
    assert estimate.budget.hop == pytest.approx(run.facts["hop_bias"] * estimate.mean)
    assert "hopping" in str(estimate.budget)


def test_a_shard_of_one_example_is_refused_before_a_store_is_made(tmp_path: Any) -> None:
    (whole,), (one,) = bowls([1.0], each=5), bowls([1.0], each=1)
    config = problems.config(data_mode="hop", batch_size=2)
    for data, shards, bad in (([whole, one], None, "1 of 2"), (whole, 5, "0 of 5")):
        with pytest.raises(ds.ConfigError, match=f"2 examples, .* shard {bad} holds 1: make fewer"):
            ds.sample(
                Vector(6), data, bowl, config.replaced(shards=shards),
                store=tmp_path / "run", pool=ds.SerialPool(), quiet=True,
            )  # fmt: skip
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampler": ds.SamplerConfig(name="sgnht", lr=0.01)}, "must be predicted, .* got 'sgnht'"),
        ({"watch": False}, "cannot be predicted"),
    ],
)
def test_given_shards_need_a_prediction(fields: Any, message: str) -> None:
    config = problems.config(data_mode="hop", **fields)
    with pytest.raises(ds.DistsamplerError, match=message):
        ds.sample(Vector(6), bowls([1.0, 1.0]), bowl, config, pool=ds.SerialPool(), quiet=True)

from itertools import pairwise

import numpy as np
import pytest
import torch

from distsampler.chains import anchor_pass
from distsampler.chains.anchor_pass import AnchorPart, Part
from distsampler.models.replica import Replica
from distsampler.sampling.prepare import prepare
from distsampler.seeding import probe_rows
from tests.problems import anchored, config, mean_squared_error, regression, squared_error

CPU = torch.device("cpu")


@pytest.mark.parametrize("loss", [squared_error, mean_squared_error])
def test_the_anchor_is_the_mean_over_all_data(loss: object) -> None:
    model, data = regression(n=3000)
    found = anchored(prepare(model, data, loss, config()))  # type: ignore[arg-type]
    exact = squared_error(model.double(), [d.double() for d in data]).mean().item()
    assert found.init_loss == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("loss", [squared_error, mean_squared_error])
def test_its_bits_do_not_depend_on_how_many_share_the_work(loss: object) -> None:
    spec = prepare(*regression(n=20_000), loss, config())  # type: ignore[arg-type, call-arg]
    replica = Replica(spec, CPU)
    found = []
    for places in (1, 3, 20):
        parts = [
            anchor_pass.measure(replica, spec, part) for part in anchor_pass.parts_of(spec, places)
        ]
        found.append(anchor_pass.reduce(reversed(parts), spec))
    assert found[0].init_loss == found[1].init_loss == found[2].init_loss
    assert all(np.array_equal(found[0].probe_losses, other.probe_losses) for other in found)
    if found[0].losses is not None:
        assert all(np.array_equal(found[0].losses, other.losses) for other in found)


def test_the_probes_anchor_is_that_of_its_own_examples() -> None:
    spec = prepare(*regression(), squared_error, config(probe=32))  # type: ignore[call-arg]
    found = anchored(spec)
    rows = probe_rows(0, 300, 32)
    assert found.losses is not None
    assert np.allclose(found.probe_losses, found.losses[rows], rtol=1e-5)
    assert found.probe_init_loss == pytest.approx(found.probe_losses.mean())
    assert found.probe_init_loss != pytest.approx(found.init_loss, rel=1e-3)


def test_its_progress_counts_rows_however_they_were_cut() -> None:
    parts = (Part(0, 0, "probe"), Part(0, 4096), Part(4096, 5000), Part(0, 12, "gradient noise"))
    zero = np.zeros(1)
    done = [AnchorPart(Part(0, 0, "probe"), zero), AnchorPart(Part(1024, 2048), zero)]
    assert anchor_pass.progress(parts, done) == {
        "rows": (1024, 5000),
        "batches for the gradient noise": (0, 12),
    }
    assert anchor_pass.progress(parts[:2], []) == {"rows": (0, 4096)}


@pytest.mark.parametrize("n", [1, 1024, 1025, 10_000])
@pytest.mark.parametrize("places", [1, 3, 100])
def test_blocks_cover_the_data_and_pieces_are_whole_blocks(n: int, places: int) -> None:
    cut = anchor_pass.blocks(0, n)
    pieces = anchor_pass._runs(cut, places)
    for parts in (cut, pieces):
        assert parts[0][0] == 0
        assert parts[-1][1] == n
        assert all(a[1] == b[0] for a, b in pairwise(parts))
    assert {stop for _, stop in pieces} <= {stop for _, stop in cut}

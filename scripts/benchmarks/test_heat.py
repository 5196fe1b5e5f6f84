"""The published table of minibatch heat, as a law and as sampled."""

import pytest

from distsampler.optim import LMSGLD, SGLD
from scripts.benchmarks import heat

pytestmark = [pytest.mark.statistical, pytest.mark.slow]

# Relative errors of the LLC in per cent at 0.3 and 1.0 of 1 / kappa_max.
PUBLISHED = {
    (SGLD, False): (25.1, 89.0),
    (LMSGLD, False): (22.9, 81.0),
    (SGLD, True): (2.0, 7.9),
    (LMSGLD, True): (0.3, 5.9),
}
CELLS = [
    (kind, corrected, share, error)
    for (kind, corrected), errors in PUBLISHED.items()
    for share, error in zip((0.3, 1.0), errors, strict=True)
]


@pytest.mark.parametrize(("kind", "corrected", "share", "published"), CELLS)
def test_the_law_is_the_published_table(
    kind: type, corrected: bool, share: float, published: float
) -> None:
    """The published numbers were sampled, with errors of some tenths of a per cent."""
    assert 100 * heat.law(kind, corrected, share) == pytest.approx(published, abs=0.6)


@pytest.mark.parametrize(("kind", "corrected", "share", "published"), CELLS)
def test_the_table_is_reproduced_within_its_errors(
    kind: type, corrected: bool, share: float, published: float
) -> None:
    error, se = heat.quadratic(kind, corrected, share, copies=32, draws=20)
    assert se < 0.008
    assert abs(error - heat.law(kind, corrected, share)) <= 5 * se
    for wrong in (
        heat.law(kind, not corrected, share),
        heat.law(kind, corrected, share, injected=1.2),
    ):
        assert abs(error - wrong) > 5 * se

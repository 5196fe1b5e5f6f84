"""The published table of minibatch heat, as a law and as sampled."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from distsampler.optim import LMSGLD, SGLD
from tests.assertions import assert_mean

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


@pytest.fixture(scope="module")
def heat_table() -> Iterator[ModuleType]:
    path = Path(__file__).parents[2] / "scripts/heat_table.py"
    spec = importlib.util.spec_from_file_location("heat_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["heat_table"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["heat_table"]


@pytest.mark.parametrize(("kind", "corrected", "share", "published"), CELLS)
def test_the_law_is_the_published_table(
    heat_table: ModuleType, kind: type, corrected: bool, share: float, published: float
) -> None:
    """The published numbers were sampled, with errors of some tenths of a per cent."""
    assert 100 * heat_table.law(kind, corrected, share) == pytest.approx(published, abs=0.6)


@pytest.mark.parametrize(("kind", "corrected", "share", "published"), CELLS)
def test_the_table_is_reproduced_within_its_errors(
    heat_table: ModuleType, kind: type, corrected: bool, share: float, published: float
) -> None:
    error, se = heat_table.quadratic(kind, corrected, share, copies=32, draws=20)
    assert se < 0.008
    assert_mean(error, heat_table.law(kind, corrected, share), se)
    for wrong in (
        heat_table.law(kind, not corrected, share),
        heat_table.law(kind, corrected, share, injected=1.2),
    ):
        with pytest.raises(AssertionError, match="standard errors off"):
            assert_mean(error, wrong, se)

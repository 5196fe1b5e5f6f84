"""The growth of time and memory: its exponents, its table and its figure."""

from pathlib import Path

import pytest

from scripts.benchmarks import scale


def test_growth_is_fitted_and_drawn(tmp_path: Path) -> None:
    rows = [
        {"size": n, "steps": n, "microseconds_per_step": 3.0, "commit": n**2, "above_mb": n}
        for n in (10, 100, 1000)
    ]
    assert scale.exponent(rows, "commit") == pytest.approx(2.0)
    assert scale.exponent(rows, "microseconds_per_step") == pytest.approx(0.0, abs=1e-12)
    growth = dict.fromkeys(("chains", "draws", "parameters"), rows)
    scale.draw(growth, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    assert "2.00" in scale.table({"growth": growth})
    for wanted in (10**4, 10**7):
        width = scale.width_of(wanted)
        assert 11 * width + (width + 1) * (width // 10) == pytest.approx(wanted, rel=0.03)

"""How many draws a chain makes and when the gate judges them: the one reading of "auto".

A run counts its draws in one of two ways:

- ``burn_in`` is a number: those draws come first, and budget and gate rounds count what follows;
- ``burn_in="auto"``: budget and gate rounds count every draw, and each gate round chooses how many
  of them are burn-in, at most half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from distsampler.config import RunConfig

SPACING = 1.5  # of gate rounds: each further one is another chance to stop on luck


@dataclass(frozen=True)
class Schedule:
    """The draws of each chain, as a config plans them.

    Example:
        >>> from distsampler.config import GateConfig
        >>> Schedule.of(RunConfig(burn_in=100, draws=1000, gate=GateConfig(every=400))).round_ends
        (500, 700, 1000, 1100)
    """

    # draws before the posterior; None: chosen from the draws at each gate round
    burn_in: int | None
    # counted draws at which the gate judges, in ascending order; the last is the budget
    gate_rounds: tuple[int, ...]

    @classmethod
    def of(cls, config: RunConfig) -> Schedule:
        """Work out the schedule of a run from its config."""
        budget = config.max_draws if config.draws == "auto" else config.draws
        assert budget is not None  # the config was validated
        rounds, end = list[int](), config.gate.every
        while end is not None and end < budget:
            rounds.append(end)
            end = math.ceil(end * SPACING)
        burn_in = None if config.burn_in == "auto" else config.burn_in
        return cls(burn_in, (*rounds, budget))

    @property
    def counted_from(self) -> int:
        """Draws that budget and gate rounds do not count: a burn-in given by number."""
        return self.burn_in or 0

    @property
    def budget(self) -> int:
        """Counted draws at most."""
        return self.gate_rounds[-1]

    @property
    def total(self) -> int:
        """Draws at most, burn-in included."""
        return self.counted_from + self.budget

    @property
    def round_ends(self) -> tuple[int, ...]:
        """Draws at which the gate judges, burn-in included."""
        return tuple(self.counted_from + draws for draws in self.gate_rounds)

    @property
    def provisional_burn_in(self) -> int:
        """Burn-in to assume until one is chosen: the most that the first gate round can choose."""
        return self.gate_rounds[0] // 2 if self.burn_in is None else self.burn_in

    @property
    def adapting(self) -> int:
        """Draws in which samplers adapt: the burn-in, or a quarter of the first gate round."""
        return self.gate_rounds[0] // 4 if self.burn_in is None else self.burn_in

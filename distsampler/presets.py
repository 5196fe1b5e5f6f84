"""Published settings of SGLD on language models, by name, to compare one's own numbers with.

    config = RunConfig.from_preset("pythia-70m-2510.12077", seed=1)
    print(presets.table())

They say how others sampled, not how to converge: nearly all are too short for the default gate, and
the larger models' chains end long before they have relaxed (``Preset.reached``). A run with one
gets the verdict that it deserves.

The values are those under which the papers are cited; ``Preset.assumed`` names what the citation
leaves open, filled in with the defaults of devinterp 2.0.1, with which such runs are made. Check a
paper's appendix before you quote it. A step is ``dw = -(lr/2) grad U + sqrt(lr) N(0, 1)`` there as
it is here, nbeta the factor of the mean loss of a batch, gamma the localization.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from distsampler.errors import ConfigError, unknown_name
from distsampler.table import Column, Table

SUSCEPTIBILITIES = "Baker, Wang, Hoogland & Murfet 2025, arXiv 2504.18274"
COMPRESSIBILITY = "Urdshals, Lau, Hoogland, van Wingerden & Murfet 2025, arXiv 2510.12077"
LOCAL_SAMPLING = "Hitchcock & Hoogland 2025, arXiv 2507.21449, algorithm 3"


@dataclass(frozen=True)
class Preset:
    """Settings that were published.

    Args:
        name: what it is called here.
        source: who published it, and where.
        model: what was sampled with it.
        lr, nbeta, localization: the sampler's; lr is a step's variance.
        chains, draws, thin, burn_in: the chains; a draw is ``thin`` steps, burn-in is in draws.
        batch_size: sequences of a minibatch.
        sampler: name of the sampler.
        options: what else the sampler is given.
        adaptive: whether the published chain adapts its steps while it is read, which biases it.
        assumed: fields that the source, as cited, leaves open.
        remark: what else differs, or was done besides.
    """

    name: str
    source: str
    model: str
    lr: float
    nbeta: float
    localization: float
    batch_size: int
    draws: int
    chains: int = 4
    thin: int = 1
    burn_in: int = 0
    sampler: str = "sgld"
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    adaptive: bool = False
    assumed: tuple[str, ...] = ("thin", "burn_in")
    remark: str = ""

    @property
    def values(self) -> dict[str, Any]:
        """The fields of a ``RunConfig``, as plain values."""
        posterior = {"lr": self.lr, "nbeta": self.nbeta, "localization": self.localization}
        shape = ("chains", "draws", "burn_in", "thin", "batch_size")
        return {
            "sampler": {"name": self.sampler, **posterior, **self.options},
            **{name: getattr(self, name) for name in shape},
        }

    @property
    def relaxation(self) -> float:
        """Steps in which a direction without curvature forgets its start: 2 / (lr gamma).

        A preconditioner P divides it, direction by direction.
        """
        return 2 / (self.lr * self.localization)

    @property
    def reached(self) -> float:
        """Share of a flat direction's variance 1 / gamma that the draws of a chain see.

        Started at w*, its variance after t steps is ``(1 - exp(-2 t / relaxation)) / gamma``; this
        is the mean over the draws after burn-in. What is missing was not explored. NaN where a
        preconditioner makes it another number in each direction.
        """
        if self.sampler != "sgld":
            return math.nan
        first, last = self.burn_in * self.thin, (self.burn_in + self.draws) * self.thin
        rate = 2 / self.relaxation
        left = (math.exp(-rate * first) - math.exp(-rate * last)) / (rate * (last - first))
        return 1 - left

    def __str__(self) -> str:
        """Return what it is and what its numbers mean, in a few lines."""
        chain = self.draws * self.thin
        lines = [
            f"{self.name}: {self.model}; {self.source}",
            f"  {self.sampler}, lr {self.lr:g}, nbeta {self.nbeta:g}, gamma {self.localization:g}, "
            f"batches of {self.batch_size}; {self.chains} chains of {self.draws} draws, a draw "
            f"being {self.thin} step{'s' * (self.thin != 1)}, after {self.burn_in} of burn-in",
            f"  flat directions relax in 2 / (lr gamma) = {self.relaxation:,.0f} steps"
            + (
                ", divided by P"
                if math.isnan(self.reached)
                else f", and {chain:,} see {self.reached:.0%} of their variance"
            ),
        ]
        if self.assumed:
            lines.append(f"  not in the source as cited: {', '.join(self.assumed)}")
        if self.remark:
            lines.append(f"  {self.remark}")
        return "\n".join(lines)


def named(name: str) -> Preset:
    """Return a preset by its name.

    Raises:
        ConfigError: there is none; names those that there are, the nearest first.
    """
    if name not in PRESETS:
        raise ConfigError(unknown_name("preset", name, PRESETS))
    return PRESETS[name]


def table() -> str:
    """Return all presets as text, one line each: settings, steps to relax, what is seen of that.

    Example:
        >>> print(table().splitlines()[1])  # doctest: +ELLIPSIS
        language-3m-2504.18274 ...
    """
    headings = ("lr", "nbeta", "gamma", "batch", "chains", "draws", "thin", "relaxation", "reached")
    columns = [Column("preset", "label"), *map(Column, headings)]
    return Table([*columns, Column("", "label")], [_row(each) for each in PRESETS.values()]).text()


def _row(preset: Preset) -> list[str]:
    sizes = (preset.batch_size, preset.chains, preset.draws, preset.thin)
    return [
        preset.name,
        *(f"{each:g}" for each in (preset.lr, preset.nbeta, preset.localization)),
        *map(str, sizes),
        f"{preset.relaxation:,.0f}" + " / P" * math.isnan(preset.reached),
        "" if math.isnan(preset.reached) else f"{preset.reached:.0%}",
        "adaptive" * preset.adaptive,
    ]


def _pythia(size: str, lr: float) -> Preset:
    return Preset(
        f"pythia-{size.lower()}-2510.12077", COMPRESSIBILITY, f"Pythia {size}", lr,
        nbeta=30.0, localization=300.0, batch_size=32, draws=100,
    )  # fmt: skip


_ALL = (
    Preset(
        "language-3m-2504.18274", SUSCEPTIBILITIES, "a language model of 3 million parameters",
        lr=1e-3, nbeta=30.0, localization=300.0, batch_size=64, draws=200,
        remark="losses of tokens were read from 100 draws",
    ),
    _pythia("14M", 1e-3),
    *(_pythia(size, 3e-4) for size in ("31M", "70M")),
    *(_pythia(size, 1e-4) for size in ("160M", "410M")),
    *(_pythia(size, 3e-5) for size in ("1B", "1.4B")),
    _pythia("2.8B", 1e-5),
    _pythia("6.9B", 3e-6),
    Preset(
        "rmsprop-2507.21449", LOCAL_SAMPLING, "language models",
        lr=1e-5, nbeta=10.0, localization=300.0, batch_size=16, draws=200, thin=160, burn_in=10,
        sampler="rmsprop_sgld",
        options=MappingProxyType(
            {"beta2": 0.99, "stability": 0.1, "initial_scale": 1.0, "bias_correction": False}
        ),
        adaptive=True,
        assumed=("chains", "draws", "burn_in", "beta2", "stability"),
        remark="published adaptive: the second moment never stops learning, which biases what is "
        "read ('distsampler guide samplers'). A run here fixes it when burn-in ends",
    ),
)  # fmt: skip
PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _ALL})
"""All presets, by name."""

"""Every sampler: is it right, what does a step cost, what memory does it take.

Laws are those of distsampler/truth/law_cases.py: the variance of 100,000 coordinates on a quadratic
against that of the discretised chain, as a z-score, and the same z-score of a sampler that is wrong
by a little. Times are medians over rounds in which all contestants take turns, on one
thread; on a shared machine they drift, their ratios hold.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from distsampler.optim import MALA, SAMPLERS, SGLD, Sampler
from distsampler.truth import law_cases
from scripts.benchmarks import adaptive, heat


@dataclass(frozen=True)
class Row:
    """A sampler in the table."""

    sampler: str
    law: str
    z: float
    control: str
    control_z: float
    microseconds: float = math.nan
    memory: float = math.nan


# Laws

LAWS = {
    "sgld": "1 / (kappa (1 - lr kappa / 4))",
    "lmsgld": "1 / kappa",
    "rmsprop_sgld": "1 / (kappa (1 - lr P kappa / 4)), P frozen",
    "rmsprop_sgld from 1": "the same, v from 1 and not corrected",
    "adam_sgld": "linear recursion of (w, m), P frozen",
    "sghmc": "linear recursion of (w, v)",
    "sgnht": "linear recursion, E u^2 = lr",
    "sgnht badodab": "linear recursion, E u^2 = lr",
}
LOUDER, HOTTER = 1.03, 1.1  # factors on the noise, and on nbeta where a thermostat takes noise out


def laws() -> Iterator[Row]:
    """Yield every sampler against its law, and its negative control."""
    for title, law in LAWS.items():
        case = law_cases.CASES[title]
        right = _z(case)
        if case.sampler == "sgnht":
            wrong = _z(case, nbeta=HOTTER * law_cases.POSTERIOR.nbeta)
            yield Row(title, law, right, f"nbeta x {HOTTER}", wrong)
        else:
            with _louder(case.sampler):
                yield Row(title, law, right, f"noise x {LOUDER}", _z(case))
    right, wrong = (_mala_z(kind) for kind in (MALA, SGLD))
    yield Row("mala", "E U = d / 2, correlated, d = 50", right, "every proposal accepted", wrong)


def _z(case: law_cases.LawCase, **changes: float) -> float:
    """Standard errors between the variance of all coordinates and the law's."""
    w, sampler = case.sample(**changes)
    ratio = (w.double().square() / case.variance(sampler)).mean()
    return float(ratio - 1) / math.sqrt(2 / w.numel())


@contextmanager
def _louder(name: str) -> Iterator[None]:
    draw = SAMPLERS[name]._draw
    louder = lambda self, at, std: draw(self, at, LOUDER * std)  # noqa: E731 (patched in)
    with mock.patch.object(SAMPLERS[name], "_draw", louder):
        yield


def _mala_z(kind: type[MALA] | type[SGLD]) -> float:
    """z-score of the mean of U against d / 2: 16 chains on a Gaussian of condition number 10."""
    source = torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(50, 50, generator=source).double())
    hessian = turn @ torch.diag(torch.logspace(-1, 0, 50, dtype=torch.float64)) @ turn.T
    means = []
    for seed in range(16):
        w = nn.Parameter(torch.zeros(50, dtype=torch.float64))
        chain = kind([w], 0.35, nbeta=2.0, generator=torch.Generator().manual_seed(seed))

        def closure(w: nn.Parameter = w) -> Tensor:
            w.grad = hessian @ w.detach()
            return w.detach() @ w.grad / 2

        energies = [2.0 * float(chain.step(closure)) for _ in range(1_000)]
        means.append(sum(energies[200:]) / 800)
    each = torch.tensor(means, dtype=torch.float64)
    return float((each.mean() - 25) / (each.std() / 4))


# Speed


class Race:
    """Functions that take turns; of each, seconds a call, one number a round."""

    def __init__(self, contestants: dict[str, Callable[[], object]], calls: int) -> None:
        self._contestants, self._calls = contestants, calls
        self.seconds: dict[str, list[float]] = {name: [] for name in contestants}

    def run(self, rounds: int) -> None:
        """Rounds, the first of which is not counted; the order rotates."""
        names = list(self._contestants)
        for turn in range(rounds + 1):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                function = self._contestants[name]
                began = time.perf_counter()
                for _ in range(self._calls):
                    function()
                if turn:
                    self.seconds[name].append((time.perf_counter() - began) / self._calls)

    def microseconds(self, name: str, less: str | None = None) -> float:
        """Median over the rounds, of the difference to another contestant of the same round."""
        base = self.seconds[less] if less else [0.0] * len(self.seconds[name])
        return 1e6 * median(a - b for a, b in zip(self.seconds[name], base, strict=True))

    def ratio(self, name: str, other: str) -> float:
        """Median over the rounds of one contestant's time over another's."""
        pairs = zip(self.seconds[name], self.seconds[other], strict=True)
        return median(a / b for a, b in pairs)


TIMED: dict[str, dict[str, Any]] = {
    **{name: {} for name in SAMPLERS},
    "rmsprop_sgld": {"freeze_after": 5},
    "rmsprop_sgld from 1": {"freeze_after": 5, "initial_scale": 1.0, "bias_correction": False},
    "adam_sgld": {"freeze_after": 5},
    "sgnht badodab": {"scheme": "badodab"},
}


def mlp() -> nn.Module:
    """784-128-10, 101,770 parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def make(name: str, params: list[nn.Parameter]) -> Sampler:
    """A sampler of the table with localisation, at a step that hardly moves."""
    kind = SAMPLERS[name.split()[0]]
    return kind(params, lr=1e-9, nbeta=10.0, localization=1.0, **TIMED[name])


def steps(rounds: int) -> dict[str, tuple[float, float]]:
    """Of every sampler: microseconds a step takes over forward and backward, and its memory."""
    source = torch.Generator().manual_seed(0)
    x, y = torch.randn(256, 784, generator=source), torch.randint(10, (256,), generator=source)

    def loop(name: str | None) -> tuple[Callable[[], object], Sampler | None]:
        model = mlp()
        sampler = make(name, list(model.parameters())) if name else None

        def backward() -> Tensor:
            model.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        def with_step() -> None:
            backward()
            sampler.step()

        if sampler is None:
            return backward, None
        if isinstance(sampler, MALA):
            return lambda: sampler.step(backward), sampler
        return with_step, sampler

    loops = {"bare": loop(None), **{name: loop(name) for name in TIMED}}
    race = Race({name: function for name, (function, _) in loops.items()}, calls=20)
    race.run(rounds)
    return {
        name: (race.microseconds(name, less="bare"), memory(sampler))
        for name, (_, sampler) in loops.items()
        if sampler is not None
    }


def memory(sampler: Sampler) -> float:
    """What a sampler keeps between steps, in units of the parameters."""
    params = [p for group in sampler.param_groups for p in group["params"]]
    columns = [c for layout in sampler._current_layouts() for c in layout.columns.values()]
    columns += [list(state.values()) for state in sampler.state.values()]
    tensors = [t for column in columns for t in column]
    kept = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
    return sum(kept.values()) / sum(p.numel() * p.element_size() for p in params)


@dataclass(frozen=True)
class StepAlone:
    """Microseconds of step() beside torch.optim.SGD's."""

    model: str
    sgd: float
    silent: float
    silent_ratio: float
    noisy: float
    fill: float
    excess: float
    """Time with noise over what it may be: that without, and 1.1 fills."""


def silent_step(sampler: Sampler) -> Callable[[], object]:
    """step() that leaves its buffer as it is instead of filling it with noise."""
    sampler._draw = lambda at, std: None  # type: ignore[method-assign]
    return sampler.step


def step_alone(title: str, shapes: list[tuple[int, ...]], prior: str, rounds: int) -> StepAlone:
    """Race SGLD without noise, SGLD, SGD with weight decay, and the fill of one flat tensor.

    Args:
        title: Of the model.
        shapes: Of its parameters.
        prior: "weight_decay" (SGD's work) or "localization" (one tensor more to read).
        rounds: Of the race.
    """
    source = torch.Generator().manual_seed(0)

    def params() -> list[nn.Parameter]:
        made = [nn.Parameter(torch.randn(s, generator=source)) for s in shapes]
        for p in made:
            p.grad = torch.randn(p.shape, generator=source)
        return made

    options = {"lr": 1e-9, "nbeta": 10.0, prior: 1.0}
    flat = torch.empty(sum(math.prod(s) for s in shapes))
    sgd = torch.optim.SGD(params(), lr=1e-9, weight_decay=1.0, foreach=True)
    race = Race(
        {
            "sgd": sgd.step,
            "silent": silent_step(SGLD(params(), **options)),
            "noisy": SGLD(params(), **options).step,
            "fill": lambda: flat.normal_(generator=source),
        },
        calls=20,
    )
    race.run(rounds)
    times = {name: race.microseconds(name) for name in race.seconds}
    rounds_of = (race.seconds[name] for name in ("noisy", "silent", "fill"))
    excess = median(
        noisy / (silent + 1.1 * fill) for noisy, silent, fill in zip(*rounds_of, strict=True)
    )
    return StepAlone(
        f"{title}, {prior}",
        times["sgd"],
        times["silent"],
        race.ratio("silent", "sgd"),
        times["noisy"],
        times["fill"],
        excess,
    )


MODELS = {
    "MLP, 4 tensors": [(128, 784), (128,), (10, 128), (10,)],
    "24 layers of 64, 48 tensors": [(64, 64), (64,)] * 24,
    "one flat tensor of 101,770": [(101_770,)],
}


# Memory


def peak_kilobytes() -> int:
    """The most memory that this process has held (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def memory_child() -> None:
    """Print the parameters' megabytes and what SGLD takes beyond parameters and gradients."""
    shapes = [(2048, 2048)] * 12
    params = [nn.Parameter(torch.ones(s)) for s in shapes]
    for p in params:
        p.grad = torch.ones_like(p)
    torch.optim.SGD([nn.Parameter(torch.ones(1))])  # the first loads some 70 MB of torch's code
    before = peak_kilobytes()
    sampler = SGLD(params, lr=1e-9, nbeta=10.0, localization=1.0)
    for _ in range(3):
        sampler.step()
    own = sum(p.numel() * p.element_size() for p in params)
    print(json.dumps({"parameters": own / 1e6, "extra": (peak_kilobytes() - before) * 1024 / 1e6}))


def memory_of_a_large_model() -> dict[str, float]:
    """As memory_child, in a process of its own."""
    command = [sys.executable, "-m", "scripts.benchmarks.samplers", "--memory-child"]
    megabytes: dict[str, float] = json.loads(subprocess.check_output(command, text=True))
    return megabytes


# Tables


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def print_tables(results: dict[str, Any]) -> None:
    """All tables, as they stand in the README."""
    rows = [
        [r.sampler, r.law, f"{r.z:+.1f}", r.control, f"{r.control_z:+.0f}",
         f"{r.microseconds:.0f}", f"{r.memory:.2g}"] for r in results["samplers"]
    ]  # fmt: skip
    head = ["sampler", "law tested", "z", "negative control", "its z", "µs a step", "state"]
    print(markdown(head, rows))
    print(
        "\nµs over forward and backward, MLP 784-128-10, batches of 256 (MALA: its second forward "
        "and backward included);\nstate in units of the parameters, w* included.\n"
    )
    rows = [
        [s.model, f"{s.sgd:.0f}", f"{s.silent:.0f}", f"{s.silent_ratio:.2f}",
         f"{s.noisy:.0f}", f"{s.fill:.0f}", f"{s.excess:.2f}"] for s in results["step_alone"]
    ]  # fmt: skip
    head = ["step() alone, µs", "SGD", "SGLD, no noise drawn", "ratio (goal 1.3)", "SGLD",
            "normal_", "SGLD / (no noise + 1.1 normal_) (goal 1)"]  # fmt: skip
    print(markdown(head, rows))
    size, extra = results["large_model"]["parameters"], results["large_model"]["extra"]
    print(
        f"\nSGLD on {size / 4:.0f} million parameters ({size:.0f} MB) takes {extra:.0f} MB beyond "
        f"parameters and gradients: {extra - size:+.0f} MB and a copy, w* (goal +64)\n"
    )
    print(heat.markdown(results["heat"]) + "\n")
    print(adaptive.markdown(results["adaptive"]))


def measure(quick: bool) -> dict[str, Any]:
    """Everything; ``quick`` takes fewer rounds and draws."""
    rounds = 5 if quick else 25
    timed = steps(rounds)
    alone = [
        step_alone(title, shapes, prior, 2 * rounds)
        for title, shapes in MODELS.items()
        for prior in ("weight_decay", "localization")
    ]
    rows = [
        Row(**{**asdict(row), "microseconds": us, "memory": size})
        for row in laws()
        for us, size in [timed[row.sampler]]
    ]
    return {
        "samplers": rows,
        "step_alone": alone,
        "large_model": memory_of_a_large_model(),
        "heat": heat.quadratic_cells(10 if quick else 40),
        "adaptive": adaptive.cells(15 if quick else 60),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--quick", action="store_true", help="a fifth of the rounds")
    parser.add_argument("--memory-child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_child:
        memory_child()
        return
    results = measure(options.quick)
    if options.json:
        for table in ("heat", "adaptive"):
            results[table] = [cell._asdict() for cell in results[table]]
        print(json.dumps(results, default=asdict))
    else:
        print_tables(results)


if __name__ == "__main__":
    main()

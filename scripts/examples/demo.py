"""The demo: a trained network, sampler and step chosen by pilots, a verdict, an LLC, a report."""

import argparse
import time
from pathlib import Path

import mnist

import distsampler as ds
from distsampler import recipe
from distsampler.report import run_report
from distsampler.sampling.calibration import calibrate_recipe, continued
from distsampler.sampling.directory import continues
from distsampler.store.files import as_files

BIAS = 0.02  # of the LLC, that a step and its minibatches may bring: less would need longer chains


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", default="runs/demo", help="the run directory")
    store = Path(parser.parse_args().store)
    began = time.monotonic()
    demo = recipe.load(Path(__file__).with_name("mnist.yaml"))
    model = demo.model
    print(f"network: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"trained in {time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
    begun = continues(as_files(store), "auto")
    demo = continued(demo, str(store)) if begun else calibrated(demo)
    run = ds.sample(model, demo.data, demo.loss, demo.config, store=store, resume="auto")
    estimate = run.llc("ignore")
    figure(run, store / "demo.png")
    print(f"sampled for {run.manifest.seconds:.0f} s: {run.manifest.reason}")
    print(f"accuracy on 1,000 held-out digits {mnist.accuracy(model):.1%}")
    print(run.verdict)
    print(estimate)
    print(estimate.budget)
    print(f"report {run_report.write(run)}")


def calibrated(demo: recipe.Recipe) -> recipe.Recipe:
    """With what pilots choose."""
    chosen, calibration = calibrate_recipe(demo, bias=BIAS)
    print(calibration, flush=True)
    return chosen


def figure(run: ds.Run, path: Path) -> None:
    """The README's picture: loss along the chains, running LLC, ranks."""
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(11, 3.2), layout="constrained")
    axes = sheet.subplots(1, 3)
    ds.plot_trace(run, axes[0])
    ds.plot_running_llc(run, axes[1])
    ds.plot_rank(run, axes[2])
    sheet.savefig(path, dpi=80)


if __name__ == "__main__":
    main()

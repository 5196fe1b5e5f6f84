"""What a driver does with 10 to 10,000 actors: its load, efficiency, lost work, first bottleneck.

A discrete-event simulation. Every decision is the library's own ``transition``, whose time counts
as it is; what the driver does about it costs what was measured on one machine (``--measure``).
Actors die as often as asked; a driver that is busy lets them wait. Not in it: the network, the
object store, and Ray's own head node.
"""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from scripts.benchmarks.machine import machine
from scripts.cluster.simulation import Cluster, Costs, simulate

COSTS = Costs(
    start=1.75,
    latency=0.0045,
    submit=0.00040,
    collect=0.00073,
    wait=4.5e-7,
    commit=0.0028,
    commit_block=0.00032,
    commit_chain=0.00064,
    snapshot=2.3e-5,
)
"""Of --measure on two quiet cores of an Intel Xeon, Ray 2.60, a local disk, states of 24 KB."""
REAL_SECONDS = 20.0
SECONDS = {10: 3_600.0, 100: 1_800.0, 1_000: 600.0, 10_000: 200.0}


def table(rows: list[dict[str, Any]]) -> str:
    """The simulated clusters as text."""
    lines = [
        f"{'actors':>7}{'deaths':>14}{'draws/s':>10}{'replies/s':>11}{'efficiency':>12}"
        f"{'driver load':>13}{'lost work':>11}{'starts':>8}{'waiting':>9}  first bottleneck"
    ]
    for row in rows:
        missing = row["missing"]
        rate = f"{row['deaths_per_hour']:g} an hour"
        lines.append(
            f"{row['actors']:7,}{rate:>14}{row['draws_per_second']:10,.0f}"
            f"{row['replies_per_second']:11.1f}{row['efficiency']:12.1%}{row['driver_load']:13.1%}"
            f"{missing['lost work']:11.2%}{missing['actors that start']:8.2%}"
            f"{missing['waiting for the driver']:9.2%}  {row['bottleneck']}"
        )
        parts = sorted(row["driver"].items(), key=lambda item: -item[1])
        shares = ", ".join(f"{name} {share:.1%}" for name, share in parts)
        lines.append(f"{'':23}driver: {shares}")
    return "\n".join(lines)


def checked(rows: list[dict[str, Any]]) -> str:
    """Simulated and real runs side by side."""
    lines = [
        f"{'actors':>7}{'draws/s, real':>15}{'simulated':>11}{'ratio':>8}"
        f"{'commits, real':>15}{'simulated':>11}"
    ]
    for row in rows:
        ratio = row["simulated"]["draws_per_second"] / row["real"]["draws_per_second"]
        lines.append(
            f"{row['actors']:7}{row['real']['draws_per_second']:15.1f}"
            f"{row['simulated']['draws_per_second']:11.1f}{ratio:8.3f}"
            f"{row['real']['commits']:15}{row['simulated']['commits']:11}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/simulate-cluster", description=__doc__)
    parser.add_argument("--actors", type=int, nargs="+", default=[*SECONDS])
    parser.add_argument("--deaths", type=float, nargs="+", default=[0.01, 1.0],
                        help="of an actor, an hour")  # fmt: skip
    parser.add_argument("--seconds", type=float, help="that are simulated; of a real run (20)")
    parser.add_argument("--draw", type=float, default=0.05, help="seconds of a draw")
    parser.add_argument("--measure", action="store_true", help="costs on this machine, as JSON")
    parser.add_argument("--costs", type=argparse.FileType(), help="use those that were measured")
    parser.add_argument("--check", type=int, nargs="*", metavar="ACTORS",
                        help="compare with real runs of so many actors (1 2 4 8)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    if options.measure:
        from scripts.cluster import costs as measured

        print(json.dumps({"machine": machine(), "costs": asdict(measured.measure())}))
        return
    costs = Costs(**json.load(options.costs)["costs"]) if options.costs else COSTS
    results: dict[str, Any] = {"machine": machine(), "costs": asdict(costs)}
    if options.check is not None:
        from scripts.cluster import costs as measured

        results["check"] = measured.check(
            options.check or [1, 2, 4, 8], costs, options.seconds or REAL_SECONDS
        )
    else:
        results["clusters"] = clusters(options, costs)
    if options.json:
        print(json.dumps(results))
    else:
        print(checked(results["check"]) if "check" in results else table(results["clusters"]))


def clusters(options: argparse.Namespace, costs: Costs) -> list[dict[str, Any]]:
    """Every size at every rate."""
    rows = list[dict[str, Any]]()
    for actors in options.actors:
        seconds = options.seconds or SECONDS.get(actors, 600.0)
        for deaths in options.deaths:
            rows.append(simulate(Cluster(actors, seconds, deaths, options.draw), costs))
            print(f"simulated {actors:,} actors, {deaths:g} deaths an hour", file=sys.stderr)
    return rows


if __name__ == "__main__":
    main()

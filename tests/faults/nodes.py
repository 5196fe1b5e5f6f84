"""A cluster of several nodes on this machine, that come and go.

It lives in a process and a folder of its own: Ray's Cluster writes down its address where every
``ray.init()`` of the machine would find it.
"""

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.processes import RAY_ENVIRONMENT

ROOT = Path(__file__).parents[2]
PREEMPTION = 2


class Nodes:
    """A head without CPUs, for the driver, and workers.

    Args:
        workers: how many.
        cpus: of each.
        dashboard: whether the head has one, which takes jobs at its ``url``.
    """

    def __init__(self, workers: int = 3, cpus: int = 2, dashboard: bool = False) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="ds-"))  # sockets need a short path
        self._log = (self._home / "log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.nodes", str(cpus), str(int(dashboard))],
            cwd=ROOT,
            env={**os.environ, **RAY_ENVIRONMENT, "RAY_TMPDIR": str(self._home),
                 "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )  # fmt: skip
        self.address = self._answer()
        self.url = self._answer()
        self._workers = workers
        self.ids: list[str] = []
        self.restore()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate()
        self._log.close()
        shutil.rmtree(self._home, ignore_errors=True)

    def restore(self) -> None:
        """As many workers as at the start."""
        while len(self.ids) < self._workers:
            self.ids.append(self._do("add"))

    def grow(self, workers: int) -> None:
        """So many workers from now on."""
        self._workers = workers
        self.restore()

    def kill(self, node: str) -> None:
        """Kills all processes of a node."""
        self.ids.remove(node)
        self._do(f"kill {node}")

    def drain(self, node: str, seconds: float) -> None:
        """Announces, as a cloud does, that a node goes away."""
        assert self._do(f"drain {node} {seconds}") == "True"

    def _do(self, command: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("="):
                return line[1:].strip()
        raise AssertionError((self._home / "log").read_text()[-4000:])


def main(cpus: int, dashboard: bool) -> None:
    """What the cluster's process does: commands come in by lines."""
    from ray._raylet import GcsClient
    from ray.cluster_utils import Cluster

    # Not 127.0.0.1, which ray.init() would take for another name of this machine.
    here = {"node_ip_address": "127.0.0.2"}
    head = {"num_cpus": 0, "include_dashboard": dashboard, **here}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes, numbers = {}, itertools.count()
    say(cluster.address)
    say(f"http://{cluster.head_node.webui_url}")
    for line in sys.stdin:
        match line.split():
            case ["add"]:
                # Each unpacks what jobs bring into a folder of its own, as on a machine of its own.
                own = {"runtime_env_dir_name": f"runtime_resources_{next(numbers)}", **here}
                node = cluster.add_node(num_cpus=cpus, include_dashboard=False, **own)
                nodes[node.node_id] = node
                say(node.node_id)
            case ["kill", name]:
                cluster.remove_node(nodes.pop(name), allow_graceful=False)
                say("killed")
            case ["drain", name, seconds]:
                deadline = int((time.time() + float(seconds)) * 1000)
                gcs = GcsClient(address=cluster.address)
                say(str(gcs.drain_node(name, PREEMPTION, "a test", deadline)[0]))
    cluster.shutdown()


def say(text: str) -> None:
    sys.stdout.write(f"={text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] == "1")

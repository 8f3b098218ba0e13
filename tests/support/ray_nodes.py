"""A Ray cluster of two nodes of two cores each, on this machine.

Ray is no part of `make setup`: tests on a cluster are skipped unless it was installed (`pip install ray`).
"""

import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}

import ray
from ray.cluster_utils import Cluster

AGENTS = "metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port"
"""Ports that a node waits to be told of, too shortly for a busy machine, unless they are given."""


class Nodes:
    """The cluster, to which this process is connected while it is open."""

    def __enter__(self) -> "Nodes":
        self.before = os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])  # of the nodes
        few = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
        self.cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=settings() | few))
        self.add_second()
        ray.init(address=self.address, log_to_driver=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.environ["PYTHONPATH"] = self.before
        ray.shutdown()
        self.cluster.shutdown()

    @property
    def address(self) -> str:
        return self.cluster.address

    def add_second(self) -> None:
        self.second = patiently(lambda: self.cluster.add_node(**settings()))
        self.cluster.wait_for_nodes()

    def kill_second(self) -> None:
        """Kill a node and its actors at once, as if its plug was pulled."""
        raylet = self.second.all_processes["raylet"][0].process.pid
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it has ended
                if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == raylet:
                    os.kill(int(stat.parent.name), signal.SIGKILL)
        self.cluster.remove_node(self.second, allow_graceful=False)


def patiently(start: Callable[[], Any]) -> Any:
    """Start a node; on a busy machine Ray may find it too slow, which leaves nothing that disturbs."""
    for _ in range(4):
        with suppress(Exception):
            return start()
    return start()


def settings() -> dict[str, Any]:
    return {"num_cpus": 2, "object_store_memory": 10**8} | {name: free_port() for name in AGENTS}


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("", 0))
        return found.getsockname()[1]

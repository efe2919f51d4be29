"""Starting Ray here or joining a running cluster, and ending it, with errors that say what to do."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from pipeline.executors.base import ExecutorError
from pipeline.executors.placement import Node

# Ray's minimum is about 75 MiB; no tensor ever passes through it.
_OBJECT_STORE_BYTES = 100 * 2**20
_CONNECT_S = 10.0


class Cluster:
    """A Ray this process is connected to: one that was running, or one it started and ends."""

    def __init__(self, workers: int, address: str | None) -> None:
        """
        Args:
            workers: a Ray started here counts at least as many CPUs.
            address: a running cluster such as 'auto' or 'host:6379'; None starts one here, unless there is a connection already.

        Raises:
            ExecutorError: it cannot be started or reached.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        self.ray: Any = ray
        self._connected_here = not ray.is_initialized()
        self._processes: list[psutil.Process] = []
        if not self._connected_here:
            return
        before = set(psutil.Process().children())
        with _explained(ray, address), _signals_kept():
            if address:
                _refuse_unreachable(address)
                ray.init(address=address, log_to_driver=False, logging_level="error")
            else:
                ray.init(
                    num_cpus=max(workers, available_cpus()),
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    logging_level="error",
                )
        self._processes = [process for process in psutil.Process().children() if process not in before]

    def nodes(self) -> list[Node]:
        """The machines that are there now."""
        return [
            Node(cpus=int(node["Resources"].get("CPU", 0)), gpus=int(node["Resources"].get("GPU", 0)))
            for node in self.ray.nodes()
            if node["Alive"]
        ]

    def close(self) -> None:
        """Disconnect, and end what was started here."""
        if self._connected_here:
            if self._processes:
                threading.Thread(target=_end_together, args=(self._processes,), daemon=True).start()
            self.ray.shutdown()


def passed_on() -> dict[str, str]:
    """The environment variables that say how to reach a bucket, for processes on other machines.

    To be given to them as an argument: Ray shows what it is told as a runtime environment to everyone on its dashboard.
    """
    return {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "GOOGLE_", "KVPIPE_"))}


def available_cpus() -> int:
    """CPUs this process may use: of its affinity, and of its container's share."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cpus = min(cpus, max(int(quota) // int(period), 1))
    return cpus


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Keep our SIGTERM handler, which Ray replaces, and hold SIGTERM back from all processes that Ray starts meanwhile.

    Slurm and others send it to every process of a job; workers must live until the driver has decided what to finish. Ray itself
    does the same with SIGINT.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    told = False
    try:
        yield
    except SystemExit as error:  # what Ray's handler raises when another thread took the signal
        told = error.code == signal.SIGTERM
        if not told:
            raise
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if told:
        signal.raise_signal(signal.SIGTERM)


def _end_together(processes: list[psutil.Process]) -> None:
    """Once Ray has ended the first of its processes, end the others: they hold SIGTERM back, and Ray would give each a second."""
    theirs = [*processes]
    for process in processes:
        with contextlib.suppress(psutil.Error):
            theirs += process.children(recursive=True)
    while all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        time.sleep(0.05)
    for process in theirs:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _refuse_unreachable(address: str) -> None:
    """Ray would try for minutes."""
    if "://" in address:
        raise ExecutorError(
            f"--ray-address: got {address}, expected 'auto' or host:port of a cluster this machine belongs to. Start the command on "
            "one of its nodes: with 'ray job submit', or in a shell there"
        )
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise ExecutorError(
            f"--ray-address: nothing answers at {address} ({error}); start Ray there with 'ray start --head', or see which address it "
            "printed"
        ) from error


@contextlib.contextmanager
def _explained(ray: Any, address: str | None) -> Iterator[None]:
    """What Ray says when it cannot start, and what to do about it."""
    what = f"Ray at {address} cannot be joined" if address else "Ray did not start here"
    try:
        yield
    except ray.exceptions.AuthenticationError as error:
        raise ExecutorError(
            f"{what}: {_first_sentence(error)}. Every node of a cluster needs the token of its head node: set RAY_AUTH_TOKEN, or "
            "RAY_AUTH_TOKEN_PATH to a file with it, or RAY_AUTH_MODE=disabled everywhere on a network you trust"
        ) from error
    except OSError as error:
        raise ExecutorError(f"{what}: {error}. {_advice(error, address)}; --workers 0 runs without Ray") from error
    except (RuntimeError, ValueError) as error:
        raise ExecutorError(f"{what} ({type(error).__name__}: {error}); --workers 0 runs without Ray") from error


def _advice(error: OSError, address: str | None) -> str:
    text = str(error)
    if "AF_UNIX path length" in text:
        return "Ray's sockets lie in its temporary folder, whose name is too long: set RAY_TMPDIR to a short one such as /tmp"
    if isinstance(error, ConnectionError) and address:
        return "Start a cluster with 'ray start --head' and join it on its other nodes, or leave --ray-address out"
    home, folder = Path("~").expanduser(), os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return (
        f"Ray keeps its token in {home}/.ray and its logs and sockets in {folder}/ray, both must be writable: set HOME (or "
        "RAY_AUTH_TOKEN_PATH to a file with a token) and RAY_TMPDIR to folders that are"
    )


def _first_sentence(error: Exception) -> str:
    return str(error).splitlines()[0].partition(". ")[0]

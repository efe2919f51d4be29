"""Being asked to stop by a signal: at once where nothing would be lost, else after the tasks in hand.

Slurm, Kubernetes and a spot machine's owner send SIGTERM and, some time later, SIGKILL; a person presses Ctrl-C. Knows signals;
not what they interrupt.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ECHO_S = 1.0
"""Signals so soon after the first are the same one: `timeout`, `srun` and others send to a process and to its group."""


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to stop; the message says how far it came and how to go on."""


class Stop:
    """Whether somebody asked this process to stop, and how long what is in hand may still take."""

    def __init__(self, grace_s: float = 0.0, say: Callable[[str], object] = lambda _: None) -> None:
        """
        Args:
            grace_s: seconds from the signal until what is in hand is dropped.
            say: told what will happen now.
        """
        self._grace_s, self._say = grace_s, say
        self._deferring = False
        self._asked_s: float | None = None
        self.signal = ""
        """Name of the signal."""

    @property
    def requested(self) -> bool:
        return self._asked_s is not None

    @property
    def is_over(self) -> bool:
        """Whether what is in hand must be dropped now."""
        return self._asked_s is not None and time.monotonic() >= self._asked_s + self._grace_s

    @contextlib.contextmanager
    def deferred(self, deferring: bool = True) -> Iterator[None]:
        """Inside, a signal only sets `requested`; with False, as outside, it raises `Interrupted` where it finds us."""
        before, self._deferring = self._deferring, deferring
        try:
            if not deferring and self.requested:
                raise self.interrupted()
            yield
        finally:
            self._deferring = before

    def interrupted(self, how_far: str = "") -> Interrupted:
        return Interrupted(f"stopped by {self.signal or 'request'}{how_far and ': '}{how_far}")

    def on_signal(self, number: int, _frame: FrameType | None = None) -> None:
        """Handler of the first signal and of those after it."""
        if self._asked_s is not None:
            if time.monotonic() - self._asked_s > _ECHO_S:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self._asked_s, self.signal = time.monotonic(), signal.Signals(number).name
        if not self._deferring:
            raise self.interrupted()
        self._say(
            f"{self.signal}: no further task is begun; those in hand get {self._grace_s:g} s to finish. The same signal again ends "
            "all at once"
        )


NEVER = Stop()
"""Nobody listens to signals."""


@contextlib.contextmanager
def stop_on_signals(grace_s: float, say: Callable[[str], object]) -> Iterator[Stop]:
    """Listen to SIGTERM and SIGINT while the block runs; to be used in the main thread."""
    stop = Stop(grace_s, say)
    before = {number: signal.signal(number, stop.on_signal) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

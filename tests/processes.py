"""Processes for tests to watch and to kill, forked from a server that has imported torch, transformers and kvpipe once.

Real processes with an environment, a folder and output of their own; only importing, seconds of work for each, is shared. Where a
fresh interpreter is what is tested (what a command imports, variables read at import), use subprocess.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

KVPIPE = "from pipeline.cli import main; main()"
_PRELOAD = ["pipeline.extract", "pipeline.repair", "training.trainer", "transformers.models.qwen2.modeling_qwen2"]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(_PRELOAD)


# The server's socket lies there: a test that points TMPDIR at a folder of its own must not be the first to ask.
multiprocessing.util.get_temp_dir()


@atexit.register
def _end_all() -> None:
    """What a failed test left running is ended, not waited for."""
    for process in multiprocessing.active_children():
        process.kill()


class Process:
    """One running Python program."""

    def __init__(
        self,
        code: str,
        *arguments: str | Path,
        cwd: Path | str | None = None,
        environment: Mapping[str, str | None] | None = None,
    ) -> None:
        """Start it.

        Args:
            code: what `python -c` would run.
            arguments: its `sys.argv` behind the first.
            cwd: folder it starts in; this process's if None.
            environment: variables on top of this process's own; None unsets one.
        """
        variables = {**os.environ, **(environment or {})}
        self._output = tempfile.TemporaryDirectory()
        for name in ("stdout", "stderr"):
            (Path(self._output.name) / name).touch()
        self._process = _CONTEXT.Process(
            target=_run,
            args=(
                code,
                [str(argument) for argument in arguments],
                str(cwd or Path.cwd()),
                {name: value for name, value in variables.items() if value is not None},
                self._output.name,
            ),
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float = 120) -> int:
        """Exit status, once it has ended; it is killed when it takes longer."""
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            self._process.kill()
            self._process.join()
            raise TimeoutError(f"process {self.pid} ran for more than {timeout:.0f} s; stderr: {self.stderr}")
        return status

    @property
    def stdout(self) -> str:
        return (Path(self._output.name) / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (Path(self._output.name) / "stderr").read_text()

    def finish(self, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        status = self.wait(timeout)
        done = subprocess.CompletedProcess(["kvpipe"], status, self.stdout, self.stderr)
        self._output.cleanup()
        return done

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.poll() is None:
            self._process.kill()
            self._process.join()
        self._output.cleanup()


def start(
    *arguments: str | Path, cwd: Path | str | None = None, environment: Mapping[str, str | None] | None = None
) -> Process:
    """Start `kvpipe` with these arguments."""
    return Process(KVPIPE, *arguments, cwd=cwd, environment=environment)


def kvpipe(
    *arguments: str | Path, cwd: Path | str | None = None, environment: Mapping[str, str | None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `kvpipe` with these arguments to its end."""
    return start(*arguments, cwd=cwd, environment=environment).finish()


def _run(code: str, arguments: list[str], cwd: str, environment: dict[str, str], output: str) -> None:
    """In the new process."""
    os.setsid()
    for name, stream in (("stdout", 1), ("stderr", 2)):
        file = os.open(Path(output) / name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})

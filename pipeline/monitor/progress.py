"""Showing how an extraction is doing while it runs, and logging the same numbers in its store.

On a terminal a bar, elsewhere a plain line now and then; at the end a sentence and, if there is something to see, a picture. Knows
results of tasks, not where tasks run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType

import tqdm

from kvstore.storage import Storage
from pipeline.monitor.meter import Meter
from pipeline.monitor.plot import LEAST_S, plot_readings
from pipeline.monitor.reading import Reading, duration, sentence, short
from pipeline.monitor.run_log import RunLog
from pipeline.tasks import Task
from pipeline.worker import TaskResult

Say = Callable[[str], object]

_LINE_S = 30.0
"""Between two lines where stderr is no terminal."""
_FIRST_LOG_S, _LAST_LOG_S, _LOG_SHARE = 1.0, 30.0, 60
"""Lines are logged every second at first, at last every half minute: always about a sixtieth of the run so far."""
_BAR = "{desc}: {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} tok {postfix}"
_NO_END = "{desc}: {n_fmt} tok {postfix}"


class Progress:
    """Takes the results of the tasks of one run; a context manager around them, used by one thread.

    What ends the run early is logged with its message, once a task has begun. A log that cannot be written ends nothing.

    Args:
        say: told plain lines.
        device: what the teacher runs on.
        total_tokens: of all tasks of the run; None where the end of the data is not known.
    """

    def __init__(
        self,
        storage: Storage,
        say: Say,
        *,
        workers: int,
        device: str,
        total_tokens: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._location, self._say, self._device, self._clock = storage.location, say, device, clock
        self._meter = Meter(workers, total_tokens, clock=clock)
        self._log, self._workers, self._has_begun = RunLog(storage, say), workers, False
        self.readings = [self._meter.read()]
        """Those that were logged, and one of the beginning."""
        self._unlogged: dict[int, tuple[int, int]] = {}
        self._began = self._logged = self._shown = clock()
        self._live = sys.stderr.isatty()
        self._bar = tqdm.tqdm(
            desc="extract",
            total=total_tokens,
            unit_scale=True,
            dynamic_ncols=True,
            disable=not self._live,
            bar_format=_NO_END if total_tokens is None else _BAR,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        self._bar.close()
        self._write()
        if kind is not None:
            if self._has_begun:  # else its message may say that nothing was written
                self._log.add("error", error=f"{kind.__name__}: {error}")
            return
        whole = self._meter.read_whole()
        if whole.shards:
            self._log.add("end", **whole.to_json())
            self._say(self._summary(whole))

    def expect(self, total_tokens: int | None) -> None:
        """Say how many tokens all tasks have, as far as it is known by now."""
        self._meter.total_tokens = self._bar.total = total_tokens
        self._bar.bar_format = _NO_END if total_tokens is None else _BAR

    def found(self, num_tokens: int) -> None:
        """So many tokens of the run were committed before."""
        self._meter.done_tokens += num_tokens
        if self._live:
            self._bar.initial += num_tokens
            self._bar.update(num_tokens)

    def begun(self, tasks: Iterable[Task]) -> Iterator[Task]:
        """The same tasks; the log begins with the first, so that a run with nothing to do leaves none."""
        for task in tasks:
            self._begin()
            yield task

    def _begin(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            totals = {"total_tokens": self._meter.total_tokens, "done_tokens": self._meter.done_tokens}
            self._log.begin(workers=self._workers, device=self._device, **totals)

    def add(self, result: TaskResult) -> None:
        """Count the result of a task, and show and log where the run is."""
        self._begin()
        self._meter.add(result)
        self._unlogged[result.shard] = (result.num_tokens, result.stored_bytes)
        reading, now = self._meter.read(), self._clock()
        if self._live:
            self._bar.set_postfix_str(f"{sentence(reading, self._device)}  {reading.stored_bytes / 1e6:,.1f} MB", refresh=False)
            self._bar.update(result.num_tokens)
        elif now - self._shown >= _LINE_S:
            self._shown = now
            self._say(self._line())
        if now - self._logged >= min(max((now - self._began) / _LOG_SHARE, _FIRST_LOG_S), _LAST_LOG_S):
            self._write()

    def note(self, event: str, **fields: object) -> None:
        """Log something else that happened."""
        self._begin()
        self._log.add(event, **fields)

    def _write(self) -> None:
        if not self._unlogged:
            return
        self._logged = self._clock()
        self.readings.append(self._meter.read())
        committed = {str(shard): sizes for shard, sizes in self._unlogged.items()}
        self._log.add("progress", **{**self.readings[-1].to_json(), "committed": committed})
        self._unlogged.clear()

    def _line(self) -> str:
        reading = self._meter.read()
        done, total = self._meter.done_tokens + reading.tokens, self._meter.total_tokens
        of = "" if total is None else f" of {short(total)} ({done / max(total, 1):.0%})"
        return f"extract: {short(done)}{of} tokens  {sentence(reading, self._device)}"

    def _summary(self, whole: Reading) -> str:
        text = (
            f"extract: {whole.shards} shards, {whole.tokens:,} tokens, {whole.stored_bytes / 1e6:,.1f} MB in {duration(whole.seconds)}: "
            f"{sentence(whole, self._device)}"
        )
        if whole.seconds >= LEAST_S and self._log.add_file("plot.png", plot_readings(self.readings, self._device)):
            text += f"; plot: {self._location}/{self._log.folder}/plot.png"
        return text

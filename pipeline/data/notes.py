"""What is to be said of a data set when it has been read: rows left out, texts that are empty, roles nobody knows.

One object goes with the data from the files to the windows. Knows no files and no tokenizers.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator

_SHOWN = 8
_LONGEST = 500
_MOST_KINDS = 1_000


class BadRowError(ValueError):
    """A row cannot be read: repair it, take it out, or have such rows left out with --on-bad-sample quarantine."""


class Notes:
    """Counts what is odd in the data, and says it once; one thread adds, another may read.

    Args:
        leaves_out: whether rows that cannot be read are left out and noted, instead of ending the run.
    """

    def __init__(self, *, leaves_out: bool = False) -> None:
        self.leaves_out = leaves_out
        self.num_left_out = 0
        self.first_left_out = ""
        self._counts: collections.Counter[str] = collections.Counter()
        self._unknown_suffixes: dict[str, str] = {}
        self._fresh: collections.deque[str] = collections.deque()
        self._said: set[str] = set()

    def refusal(self, where: str, problem: str) -> BadRowError:
        """The error for a row, where none is left out."""
        return BadRowError(
            f"--data: {where} {problem[:_LONGEST]}. Repair it or take it out; 'kvpipe extract' leaves such rows out with "
            "--on-bad-sample quarantine"
        )

    def leave_out(self, told: str) -> None:
        """Note a row that cannot be read: its place and the reason."""
        told = told[:_LONGEST]
        self.num_left_out += 1
        self.first_left_out = self.first_left_out or told
        self._fresh.append(told)

    def take_left_out(self) -> list[str]:
        """The rows left out since this was last asked, with the reason."""
        return [self._fresh.popleft() for _ in range(len(self._fresh))]

    def read_as_text(self, suffix: str, path: str) -> None:
        """A file whose suffix is not known is read as plain text."""
        self._unknown_suffixes.setdefault(suffix, path)

    def count(self, what: str) -> None:
        """Count something odd; `what` is said of a number, as in '3 x texts are empty'."""
        self._counts[what if what in self._counts or len(self._counts) < _MOST_KINDS else "more kinds of such things"] += 1

    def news(self) -> Iterator[str]:
        """What is to be said and has not been, a line each."""
        lines = [
            f"files with the suffix {suffix}, such as {path}, are read as plain text"
            for suffix, path in sorted(self._unknown_suffixes.copy().items())
        ]
        lines += [f"{number:,} x {what}" for what, number in sorted(self._counts.copy().items())[:_SHOWN]]
        if len(self._counts) > _SHOWN:
            lines.append(f"and {len(self._counts) - _SHOWN:,} more of such kinds")
        if self.num_left_out:
            lines.append(f"{self.num_left_out:,} rows cannot be read and are left out, the first: {self.first_left_out}")
        for line in lines:
            if line not in self._said:
                self._said.add(line)
                yield f"--data: {line}"

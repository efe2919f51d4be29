"""Logs of extractions in their store: `progress/RUN/00000.jsonl` and so on, for `kvpipe status` and plots (FORMAT.md 12).

Each run has a folder of its own, so that runs at the same time, or one after another, never write the same file. A line is
added by putting the whole file in place again: buckets cannot append, and nobody ever reads half a line. No reader needs them.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Annotated, Any, Required

from pydantic import ConfigDict, Field, StringConstraints, with_config
from typing_extensions import TypedDict

from kvstore.errors import StoreFormatError
from kvstore.manifest import PROGRESS
from kvstore.records import Size, parse
from kvstore.storage import MAX_RECORD_BYTES, Entry, Storage

_FILE_BYTES = 256 * 2**10
"""A full file is left alone and another begun, so that a line costs no more than this."""


class RunLog:
    """Writes the log of one run. A log that cannot be written is not worth a run: that is said once, and then nothing."""

    def __init__(self, storage: Storage, say: Callable[[str], object]) -> None:
        self._storage, self._say = storage, say
        begun = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
        self.folder = f"{PROGRESS}/{begun}-{secrets.token_hex(4)}"
        self._number, self._lines, self._bytes, self._told = 0, list[str](), 0, False

    def begin(self, **fields: Any) -> None:
        """The first line: who runs."""
        version = importlib.metadata.version("kvpipe")
        self.add("start", host=socket.gethostname(), pid=os.getpid(), kvpipe_version=version, **fields)

    def add(self, event: str, **fields: Any) -> None:
        """Add a line and put it into the store at once."""
        line = json.dumps({"event": event, "time_s": time.time(), **fields})
        if self._lines and self._bytes + len(line) > _FILE_BYTES:
            self._number, self._lines, self._bytes = self._number + 1, [], 0
        self._lines.append(line)
        self._bytes += len(line)
        self._put(f"{self._number:05d}.jsonl", "".join(f"{line}\n" for line in self._lines).encode())

    def add_file(self, name: str, content: bytes) -> bool:
        """Put a file beside the lines; whether that worked."""
        return self._put(name, content)

    def _put(self, name: str, content: bytes) -> bool:
        try:
            return self._storage.write(f"{self.folder}/{name}", content, replace=True)
        except OSError as error:
            if not self._told:
                self._say(
                    f"warning: the log {self._storage.location}/{self.folder} cannot be written ({error}); the run goes on"
                )
                self._told = True
            return False


@with_config(ConfigDict(strict=True, extra="allow", allow_inf_nan=False))
class Line(TypedDict, total=False):
    """What is read of a line; events of other versions may say more."""

    event: Required[str]
    time_s: Required[Annotated[float, Field(ge=0, le=2**36)]]
    host: str
    pid: int
    device: str
    error: str
    sample: str
    source: str
    reason: str
    committed: dict[
        Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")], Annotated[list[Size], Field(min_length=2, max_length=2)]
    ]
    """Tokens and bytes by shard."""


class LogReader:
    """Reads the logs of a store again and again; a file that did not change is read once."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._known: dict[Entry, list[dict[str, Any]]] = {}

    def read(self) -> dict[str, list[dict[str, Any]]]:
        """The lines of every run by its folder, the oldest run first; runs without a line, and damaged lines, are left out."""
        entries = [entry for entry in self._storage.entries(PROGRESS) if entry.key.endswith(".jsonl")]
        self._known = {entry: self._known.get(entry) or self._lines(entry.key) for entry in entries}
        runs: dict[str, list[dict[str, Any]]] = {}
        for entry in sorted(self._known):
            if lines := self._known[entry]:
                runs.setdefault(str(PurePosixPath(entry.key).parent), []).extend(lines)
        return runs

    def _lines(self, key: str) -> list[dict[str, Any]]:
        try:
            texts = self._storage.read(key, most_bytes=MAX_RECORD_BYTES).decode("utf-8", errors="replace").splitlines()
        except (FileNotFoundError, StoreFormatError):
            return []
        return [record for text in texts if (record := _parse(text)) is not None]


def _parse(text: str) -> dict[str, Any] | None:
    """A line of a log, None if it is none: a log says nothing of what is stored, so what cannot be read of it is left out."""
    try:
        return dict(parse(Line, text, "a line of a log", "12.2"))
    except StoreFormatError:
        return None

"""A trial of an extraction: a few tasks of the real data with the real teacher and workers, into stores that are thrown away.

Measures what nobody can know beforehand: the bytes per token of every codec, and how fast this teacher runs here. Uses the
executor, worker and writer of an extraction. Knows neither how much data there is nor what people want to read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import itertools
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from kvstore import CodecError, Store
from kvstore.calibration import Calibration, calibration_fingerprint, fit_groups
from kvstore.codec import CODECS, Codec, format_codecs, parse_codecs
from kvstore.commits import Commit
from kvstore.create import create_store
from kvstore.groups import plan_groups
from kvstore.layout import Layout
from kvstore.manifest import Manifest
from kvstore.metadata import array_keys
from kvstore.storage import Folder, Storage, locate
from kvstore.temporary import temporary_folder
from pipeline.config import ExtractConfig
from pipeline.data.samples import Sample
from pipeline.enter import Run, Signal
from pipeline.executors import Executor
from pipeline.executors.address import runs_elsewhere
from pipeline.models.load import tokenizer_files
from pipeline.parts import token_arrays
from pipeline.planning.draw import Batching, scattered_samples, whole_tasks
from pipeline.planning.rungs import commits_of, kv_arrays, layer_shares, payload_per_token, relative_error, write_again
from pipeline.tasks import Task, plan_tasks
from pipeline.worker import Moments, merge_moments

_SIZE_TOKENS, _SIZE_VALUES, _SIZE_TIMES = 65_536, 256 * 10**6, 3.0
"""What bytes per token are measured on: as many tokens as either allows, or can be computed in that many times the seconds for speed;
one sample at least. Samples of one text differ by a tenth, so an error of a percent takes a hundred."""
_WARM_UP_TOKENS = 512
_LEAST_SIZE_TOKENS = 2048.0
_GATE_TOKENS = 256
_SHORT = 0.5
"""Of the time wanted: a measurement that took less is made again with more tasks."""
_ROOM = 2**20
"""Shards of a trial store: room for every task of the trial, which have numbers of their own."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RungSize:
    """What keys and values take on disk in one codec, as measured."""

    codecs: Mapping[int, Codec]
    bytes_per_token: float
    """Without the indices of the shards, which depend on the layout alone."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Everything measured in bytes."""

    tokens: int
    """Tokens it was measured on."""
    rungs: Mapping[str, RungSize]
    """By codec as `parse_codecs` reads it; the one asked for first."""
    relative_error: float | None
    """Two standard errors of the bytes per token in the codec asked for, as if drawn from data without end; None of one task."""
    layer_shares: Mapping[int, float]
    """Part of each layer in the bytes of keys and values, in the codec asked for. They differ: a first layer follows from the token
    alone and repeats with it."""
    other_bytes_per_token: float
    """Of arrays beside keys and values."""
    other_arrays: int
    own_bytes: int
    """Of an empty store: tokenizer, metadata, calibration, manifest."""
    own_files: int
    commit: Commit
    """One of the codec asked for, as an example of what records say."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How fast an extraction is once it runs."""

    tokens: int
    """Tokens it was measured on."""
    seconds: float
    padded_per_s: float
    """Tokens per second of all workers together, padding included, from text in memory to committed shards."""
    gate_s_per_token: float
    """Of reading a token with and without the codec."""


class Trial:
    """Runs the trial in stores at `place`.

    Args:
        executor: one that has described its teacher.
        shards: the samples of the run's own tasks.
        layout_of: layout of a store with these codecs.
    """

    def __init__(
        self,
        run: Run,
        signal: Signal,
        executor: Executor,
        batching: Batching,
        shards: Sequence[Sequence[Sample]],
        layout_of: Callable[[Mapping[int, Codec]], Layout],
        place: str,
    ) -> None:
        self._run, self._signal, self._executor, self._batching = run, signal, executor, batching
        self._shards, self._place, self._workers = shards, place, executor.num_workers
        self._layout_of, self._layout = layout_of, _roomy(layout_of(signal.codecs))
        # Workers keep by its shard what they computed for calibration: no number may come twice.
        self._numbers = itertools.count()

    def measure(self, seconds: float) -> tuple[Sizes, Speed]:
        """Measure sizes, then speed for about so many seconds; computing for sizes takes up to three times as long."""
        started = time.perf_counter()
        warm_up = [self._batching.cut(samples, _WARM_UP_TOKENS) for samples in self._shards[-self._workers :]]
        self._calibrate(warm_up)
        padded_per_s = sum(map(self._batching.padded_tokens, warm_up)) / (time.perf_counter() - started)
        affordable = max(_SIZE_TIMES * padded_per_s * seconds, _LEAST_SIZE_TOKENS)
        most = min(float(_SIZE_TOKENS), _SIZE_VALUES / self._signal.stored.values_per_token, affordable)
        started = time.perf_counter()
        pieces = scattered_samples(self._shards, most, self._batching, self._workers)
        tasks, moments = self._calibrate(pieces)
        padded_per_s = sum(map(self._batching.padded_tokens, pieces)) / (time.perf_counter() - started)
        raw = self._raw_store(tasks)
        codec = format_codecs(self._signal.codecs)
        storage, calibration = self._create(codec, self._signal.codecs, moments)
        own = list(storage.entries(""))
        speed = self._time(storage, padded_per_s, seconds, calibration)
        others = array_keys(raw.manifest)[2 * len(raw.manifest.groups) :]
        rungs = {text: self._encoded(raw, moments, codecs) for text, codecs in self._rungs(codec)}
        sizes = Sizes(
            tokens=sum(task.num_tokens for task in tasks),
            rungs={
                text: RungSize(codecs=codecs, bytes_per_token=payload_per_token(rungs[text], kv_arrays(rungs[text].manifest)))
                for text, codecs in self._rungs(codec)
            },
            relative_error=relative_error(rungs[codec]),
            layer_shares=layer_shares(Store(storage)),
            other_bytes_per_token=payload_per_token(raw, others),
            other_arrays=len(others),
            own_bytes=sum(entry.size_bytes for entry in own),
            own_files=len(own),
            commit=commits_of(Store(storage))[0],
        )
        return sizes, speed

    def _calibrate(self, pieces: Sequence[Sequence[Sample]]) -> tuple[list[Task], Moments]:
        """Have the workers compute and keep these samples, one task for each piece."""
        tasks = [task for samples in pieces for task in plan_tasks(samples, self._layout, next(self._numbers))]
        return tasks, merge_moments(dict(self._executor.calibrate(self._signal.job, tasks)))

    def _raw_store(self, tasks: Sequence[Task]) -> Store:
        """A store of the captured bits of what the workers have kept."""
        storage, _ = self._create("raw", parse_codecs("raw", self._signal.stored.layer_numbers), {})
        for _ in self._executor.run(dataclasses.replace(self._signal.job, store=storage.location), tasks):
            pass
        return Store(storage)

    def _create(
        self, name: str, codecs: Mapping[int, Codec], moments: Moments, layout: Layout | None = None
    ) -> tuple[Storage, Calibration]:
        """An empty store as the run would make it; in its layout, or another."""
        groups = plan_groups(self._signal.stored, codecs)
        calibration = fit_groups(groups, moments)
        digest = calibration_fingerprint(calibration)
        manifest = Manifest(
            spec=self._signal.stored,
            teacher=self._signal.info.spec,
            layout=layout or self._layout,
            groups=groups,
            alignment=self._signal.alignment.to_json() if self._signal.alignment else None,
            calibration=digest,
            token_arrays=token_arrays(self._run.first),
            metadata={},
            tokenizer={},
            signal={**self._signal.record, "codec": format_codecs(codecs), "calibration": digest},
            data={"parts": [], "dropped": None},
            runs=[],
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            kvpipe_version=importlib.metadata.version("kvpipe"),
        )
        storage = locate(f"{self._place}/{next(self._numbers)}-{name}")
        create_store(storage, manifest, calibration, tokenizer_files(self._run.tokenizer))
        return storage, calibration

    def _rungs(self, codec: str) -> Iterator[tuple[str, Mapping[int, Codec]]]:
        """The codec asked for and every rung that this geometry can have."""
        for text in dict.fromkeys([codec, *CODECS]):
            codecs = parse_codecs(text, self._signal.stored.layer_numbers)
            with contextlib.suppress(CodecError):
                plan_groups(self._signal.stored, codecs)
                yield text, codecs

    def _encoded(self, raw: Store, moments: Moments, codecs: Mapping[int, Codec]) -> Store:
        """The raw store in another codec, as a writer makes it, and in the layout that codec would have."""
        layout = _roomy(self._layout_of(codecs))
        if layout == self._layout and {codec.name for codec in codecs.values()} == {"raw"}:
            return raw
        storage, calibration = self._create("rung", codecs, moments, layout)
        return write_again(raw, storage, calibration)

    def _time(self, storage: Storage, padded_per_s: float, seconds: float, calibration: Calibration) -> Speed:
        """Run tasks until they take long enough, or all there are."""
        job = dataclasses.replace(self._signal.job, store=storage.location)
        while True:
            pieces = whole_tasks(self._shards, padded_per_s * seconds, self._batching, self._workers)
            tasks = [task for samples in pieces for task in plan_tasks(samples, self._layout, next(self._numbers))]
            padded = {task.shard: self._batching.padded_tokens(samples) for task, samples in zip(tasks, pieces, strict=True)}
            started = time.perf_counter()
            finished = {result.shard: time.perf_counter() - started for result in self._executor.run(job, tasks)}
            elapsed = max(finished.values())
            if len(tasks) <= self._workers:  # one each: who is done early would have gone on
                padded_per_s = sum(padded[shard] / finished[shard] for shard in finished)
            else:
                padded_per_s = sum(padded.values()) / elapsed
            if elapsed >= _SHORT * seconds or sum(map(len, pieces)) == sum(map(len, self._shards)):
                break
        return Speed(
            tokens=sum(task.num_tokens for task in tasks),
            seconds=elapsed,
            padded_per_s=padded_per_s,
            gate_s_per_token=self._time_gate(calibration),
        )

    def _time_gate(self, calibration: Calibration) -> float:
        """Seconds for each token of a gate run; 0 where nothing is quantised, which takes half as long and once."""
        if not calibration:
            return 0.0
        codec, timed = format_codecs(self._signal.codecs), 0.0
        for most in (_GATE_TOKENS // 8, _GATE_TOKENS):  # the first to warm up
            input_ids = self._shards[0][0].input_ids[:most]
            started = time.perf_counter()
            self._executor.ask("gate", self._signal.job, (input_ids,), codec, calibration)
            timed = (time.perf_counter() - started) / len(input_ids)
        return timed


def _roomy(layout: Layout) -> Layout:
    """The same with room for every task of a trial."""
    return dataclasses.replace(layout, num_shards=_ROOM)


@contextlib.contextmanager
def trial_place(config: ExtractConfig) -> Iterator[str]:
    """Somewhere to throw stores away that every worker can see: a temporary folder, for workers elsewhere beside `out`."""
    if not runs_elsewhere(config.workers, config.ray_address):
        with temporary_folder("plan") as folder:
            yield str(folder)
        return
    assert config.out is not None
    storage = locate(f"{locate(config.out).location}.plan-{secrets.token_hex(4)}")
    try:
        yield storage.location
    finally:
        for entry in list(storage.entries("")):
            storage.delete(entry.key)
        if isinstance(storage, Folder):
            shutil.rmtree(storage.root, ignore_errors=True)

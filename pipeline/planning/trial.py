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
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Int64

from kvstore import CodecError, Store
from kvstore.arrays import array_key, array_keys, index_bytes, shard_key
from kvstore.calibration import Calibration, calibration_fingerprint, fit_groups
from kvstore.codec import CODECS, KINDS, Codec, format_codecs, parse_codecs
from kvstore.commits import Commit, read_commit
from kvstore.create import create_store
from kvstore.layout import Layout, fill_shards
from kvstore.manifest import Manifest, plan_groups
from kvstore.storage import Folder, Storage, locate
from kvstore.writer import ShardWriter
from pipeline.config import ExtractConfig
from pipeline.data.samples import Sample
from pipeline.enter import Run, Signal
from pipeline.executors import Executor
from pipeline.parts import token_arrays
from pipeline.tasks import Task, padded_length, plan_batches, plan_tasks
from pipeline.worker import Moments, merge_moments

_Item = TypeVar("_Item")

_SIZE_TOKENS, _SIZE_VALUES, _SIZE_SHARE = 65_536, 256 * 10**6, 3.0
"""What bytes per token are measured on: as many tokens as either allows, or can be computed in that many times the seconds for speed;
one sample at least. Samples of one text differ by a tenth, so an error of a percent takes a hundred."""
_PLACES = 16
"""All over the data, from which they come where they are not whole tasks."""
_WARM_UP_TOKENS = 512
_LEAST_SIZE_TOKENS = 2048.0
_GATE_TOKENS = 256
_SHORT = 0.5
"""Of the time wanted: a measurement that took less is made again with more tasks."""
_ROOM = 2**20
"""Shards of a trial store: room for every task of the trial, which have numbers of their own."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """How workers cut a task into forward passes."""

    batch_tokens: int
    max_positions: int
    alone: bool

    def batches(self, samples: Sequence[Sample]) -> list[tuple[list[Sample], int]]:
        """The samples of each forward pass and the length each is padded to."""
        lengths = [len(sample.input_ids) for sample in samples]
        found = plan_batches(lengths, self.batch_tokens, self.max_positions, alone=self.alone)
        width = (lambda length: length) if self.alone else (lambda length: padded_length(length, self.max_positions))
        return [([samples[row] for row in rows], width(lengths[rows[0]])) for rows in found]

    def padded_tokens(self, samples: Sequence[Sample]) -> int:
        """Tokens the teacher computes, padding included."""
        return sum(len(rows) * width for rows, width in self.batches(samples))

    def cut(self, samples: Sequence[Sample], most_padded: float | int) -> list[Sample]:
        """Whole forward passes, evenly spread, of at most so many padded tokens; of a larger one a part, of one sample at least."""
        batches = self.batches(samples)
        total = sum(len(rows) * width for rows, width in batches)
        count = max(int(len(batches) * min(most_padded / total, 1.0)), 1)
        chosen = [batches[(2 * turn + 1) * len(batches) // (2 * count)] for turn in range(count)]
        if count == 1:
            rows, width = chosen[0]
            return rows[: max(int(most_padded // width), 1)]
        return [sample for rows, _ in chosen for sample in rows]


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
    """Two standard errors of the bytes per token, from how much the tasks differ among themselves; None of one task."""
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
        affordable = max(_SIZE_SHARE * padded_per_s * seconds, _LEAST_SIZE_TOKENS)
        most = min(float(_SIZE_TOKENS), _SIZE_VALUES / self._signal.stored.values_per_token, affordable)
        started = time.perf_counter()
        pieces = self._from_all_over(most)
        tasks, moments = self._calibrate(pieces)
        padded_per_s = sum(map(self._batching.padded_tokens, pieces)) / (time.perf_counter() - started)
        raw = self._raw_store(tasks)
        codec = format_codecs(self._signal.codecs)
        storage, calibration = self._create(codec, self._signal.codecs, moments)
        own = list(storage.entries(""))
        speed = self._time(storage, padded_per_s, seconds, calibration)
        others = array_keys(raw.manifest)[2 * len(raw.manifest.groups) :]
        tokens = sum(task.num_tokens for task in tasks)
        rungs = {text: self._encoded(raw, moments, codecs) for text, codecs in self._rungs(codec)}
        sizes = Sizes(
            tokens=tokens,
            rungs={
                text: RungSize(codecs=codecs, bytes_per_token=_payload_per_token(rungs[text], _kv_arrays(rungs[text].manifest)))
                for text, codecs in self._rungs(codec)
            },
            relative_error=_relative_error(
                rungs[codec], tokens / sum(len(each.input_ids) for shard in self._shards for each in shard)
            ),
            layer_shares=_layer_shares(Store(storage)),
            other_bytes_per_token=_payload_per_token(raw, others),
            other_arrays=len(others),
            own_bytes=sum(entry.size_bytes for entry in own),
            own_files=len(own),
            commit=_commits(Store(storage))[0],
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
        with tempfile.TemporaryDirectory() as folder:
            self._run.tokenizer.save_pretrained(folder)
            create_store(storage, manifest, calibration, Path(folder))
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
        store, numbers = Store(storage), itertools.count()
        for commit in _commits(raw):
            first = int(np.flatnonzero(raw.samples.shard == commit.shard)[0])
            for placed, shard in zip(fill_shards([row.num_tokens for row in commit.samples], layout), numbers, strict=False):
                start = shard * layout.shard_tokens
                rows = [
                    dataclasses.replace(commit.samples[index], shard=shard, token_start=start + offset)
                    for index, offset in placed
                ]
                writer = ShardWriter(storage, store.manifest, calibration, shard, rows)
                _fill(
                    writer,
                    raw,
                    [first + index for index, _ in placed],
                    [(offset, commit.samples[i].num_tokens) for i, offset in placed],
                )
        return Store(storage)

    def _time(self, storage: Storage, padded_per_s: float, seconds: float, calibration: Calibration) -> Speed:
        """Run tasks until they take long enough, or all there are."""
        job = dataclasses.replace(self._signal.job, store=storage.location)
        while True:
            pieces = self._pieces(padded_per_s * seconds)
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

    def _from_all_over(self, padded_tokens: float) -> list[list[Sample]]:
        """Samples of so many tokens together, from as many tasks as make them up, or parts of several."""
        longest = max(len(sample.input_ids) for samples in self._shards for sample in samples)
        places = max(int(padded_tokens / self._mean_tokens), min(_PLACES, int(padded_tokens // longest)), self._workers)
        chosen = _spread(self._shards, places)
        share, generator = padded_tokens / len(chosen), np.random.default_rng(0)
        pieces = []
        for samples in chosen:
            # Drawn at random: those of one forward pass, or of one place in a task, are of one length.
            count = min(max(int(len(samples) * share / self._batching.padded_tokens(samples)), 1), len(samples))
            drawn = generator.choice(len(samples), count, replace=False)
            pieces.append([samples[index] for index in sorted(drawn.tolist())])
        return pieces

    def _pieces(self, padded_tokens: float) -> list[list[Sample]]:
        """Whole tasks, the same number for each worker, of so many tokens together; where one each is too much, parts of them."""
        each = int(padded_tokens / self._workers / self._mean_tokens)
        chosen = _spread(self._shards, max(each, 1) * self._workers)
        if each < 1:
            return [self._batching.cut(samples, padded_tokens / self._workers) for samples in chosen]
        return [list(samples) for samples in chosen]

    @property
    def _mean_tokens(self) -> float:
        """Of a task, padding included."""
        return sum(map(self._batching.padded_tokens, self._shards)) / len(self._shards)

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


def _fill(writer: ShardWriter, raw: Store, indices: Sequence[int], spans: Sequence[tuple[int, int]]) -> None:
    """Write samples of a raw store to a shard, and commit it."""
    dtype = np.dtype(raw.spec.dtype)  # a raw layer keeps the captured bits
    for layer in raw.spec.layer_numbers:
        batch = raw.read(indices, [layer])
        group, _ = writer.manifest.group_of(layer)
        key, value = (
            values[0] if group.quantizer(kind) else values[0].astype(dtype)
            for kind, values in zip(KINDS, (batch.key, batch.value), strict=True)
        )
        writer.put(layer, spans, key, value)
    for (offset, _), first, stop in zip(spans, batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
        beside = {name: numbers[first:stop] for name, numbers in batch.beside.items()}
        writer.put_tokens(offset, batch.input_ids[first:stop], beside)
    writer.commit()


def _spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """So many of them, evenly spread, or all there are."""
    count = min(count, len(items))
    return [items[(2 * turn + 1) * len(items) // (2 * count)] for turn in range(count)]


def _commits(store: Store) -> list[Commit]:
    return [read_commit(store.storage, shard) for shard in store.samples.summary["shard"].to_pylist()]


def _kv_arrays(manifest: Manifest) -> list[str]:
    return [array_key(group, group.array(kind)) for group in manifest.groups for kind in KINDS]


def _payload_per_token(store: Store, arrays: Sequence[str]) -> float:
    """Stored bytes per token of some arrays, without the indices of their shards."""
    payloads, tokens = _payloads(store, arrays)
    return float(payloads.sum() / tokens.sum())


def _payloads(store: Store, arrays: Sequence[str]) -> tuple[Int64[np.ndarray, "shard"], Int64[np.ndarray, "shard"]]:
    """Stored bytes of some arrays in each shard, without its indices, and its tokens."""
    commits, payloads = _commits(store), []
    for commit in commits:
        sizes = {stored.path: stored.size_bytes for stored in commit.objects}
        payloads.append(
            sum(sizes[shard_key(array, commit.shard)] - shard_index_bytes(store.manifest, array) for array in arrays)
        )
    return np.array(payloads), np.array([commit.num_tokens for commit in commits])


def _relative_error(store: Store, share: float) -> float | None:
    """Two standard errors of the bytes per token of keys and values, as a ratio estimated from shards drawn without replacement
    (Cochran, Sampling Techniques, 6.4).

    Args:
        share: of all of the data that these shards are.
    """
    payloads, tokens = _payloads(store, _kv_arrays(store.manifest))
    number = len(payloads)
    if number < 2:
        return None
    residuals = payloads - tokens * (payloads.sum() / tokens.sum())
    variance = (residuals**2).sum() * number / (number - 1) * max(1.0 - share, 0.0)
    return float(2.0 * np.sqrt(variance) / payloads.sum())


def _layer_shares(store: Store) -> dict[int, float]:
    """Part of each layer in the stored bytes of keys and values."""
    bits = {}
    for layer in store.spec.layers:
        measured = store.samples.fidelity()[str(layer.layer)]
        of_head = layer.key_dim * measured["key"]["bits"] + layer.value_dim * measured["value"]["bits"]
        bits[layer.layer] = layer.num_kv_heads * of_head
    return {layer: mine / sum(bits.values()) for layer, mine in bits.items()}


def shard_index_bytes(manifest: Manifest, array: str) -> int:
    """Bytes at the end of a shard that say where its chunks are: the same for a full shard and for one that is nearly empty."""
    return index_bytes(manifest, array) - 4  # the crc32c of the last chunk is the chunk's


@contextlib.contextmanager
def trial_place(config: ExtractConfig) -> Iterator[str]:
    """Somewhere to throw stores away that every worker can see: a temporary folder, for workers elsewhere beside `out`."""
    if config.ray_address is None:
        with tempfile.TemporaryDirectory(prefix="kvpipe-plan-") as folder:
            yield folder
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

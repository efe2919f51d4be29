"""Small real stores for tests, written by the real writer from seeded random numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import ml_dtypes
import numpy as np
import pyarrow as pa

from kvstore import open_store
from kvstore.calibration import Calibration, ChannelMoments, calibration_fingerprint, fit_groups
from kvstore.codec import KINDS, parse_codecs
from kvstore.commits import Commit, SampleRow, create_commit, sample_id, token_crc32c
from kvstore.compaction import compact, write_tables
from kvstore.create import create_store
from kvstore.groups import plan_groups
from kvstore.layout import Layout, fill_shards, plan_layout
from kvstore.manifest import Manifest, data_record, write_manifest
from kvstore.repeats import write_repeats
from kvstore.samples import ROWS, SUMMARY
from kvstore.spec import Dtype, KVSpec, LayerSpec, RopeSpec
from kvstore.storage import locate
from kvstore.writer import ShardWriter

ROPE = RopeSpec(kind="half", inv_freq=(1.0, 0.1, 0.01, 0.001))


def small_spec(num_layers: int = 3, num_kv_heads: int = 2, dim: int = 8, dtype: Dtype = "float32") -> KVSpec:
    rope = ROPE if dim >= ROPE.rotary_dim else dataclasses.replace(ROPE, inv_freq=ROPE.inv_freq[: dim // 2])
    return KVSpec(
        layers=tuple(
            LayerSpec(layer=layer, num_kv_heads=num_kv_heads, key_dim=dim, value_dim=dim, rope=0) for layer in range(num_layers)
        ),
        ropes=(rope,),
        dtype=dtype,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What went into a store: token ids, and {layer: (key, value)} of every sample, [token, kv_head, dim]."""

    spec: KVSpec
    input_ids: list[np.ndarray]
    kv: list[dict[int, tuple[np.ndarray, np.ndarray]]]


def random_source(spec: KVSpec, lengths: Sequence[int], seed: int = 0) -> Source:
    """Gaussian keys and values with a loud mean on keys, as Qwen2's key bias gives them."""
    rng = np.random.default_rng(seed)
    dtype = ml_dtypes.bfloat16 if spec.dtype == "bfloat16" else np.dtype(spec.dtype)

    def draw(length: int, heads: int, dim: int, mean: float) -> np.ndarray:
        return np.asarray((rng.normal(size=(length, heads, dim)) + mean).astype(dtype))

    return Source(
        spec=spec,
        input_ids=[rng.integers(0, 256, size=length, dtype=np.int32) for length in lengths],
        kv=[
            {
                layer.layer: (
                    draw(length, layer.num_kv_heads, layer.key_dim, 5.0 + layer.layer),
                    draw(length, layer.num_kv_heads, layer.value_dim, 0.0),
                )
                for layer in spec.layers
            }
            for length in lengths
        ],
    )


def calibrate(source: Source, codec: str) -> Calibration:
    groups = plan_groups(source.spec, parse_codecs(codec, source.spec.layer_numbers))
    moments = {
        (layer, kind): ChannelMoments.zeros(group.num_kv_heads, group.dim(kind))
        for group in groups
        for layer in group.layers
        for kind in KINDS
    }
    for sample in source.kv:
        for layer, sides in sample.items():
            for kind, values in zip(KINDS, sides, strict=True):
                moments[layer, kind].add(values)
    return fit_groups(groups, moments)


def begin_store(
    root: Path,
    source: Source,
    codec: str = "mix",
    signal: dict[str, object] | None = None,
    tokenizer: Path | None = None,
    teacher: KVSpec | None = None,
    calibration: Calibration | None = None,
    token_arrays: tuple[str, ...] = ("input_ids",),
    counts: Sequence[int] | None = None,
) -> tuple[Manifest, Calibration, list[list[int]]]:
    """Create the empty store; returns its manifest, calibration and the samples of each shard."""
    lengths = [len(ids) for ids in source.input_ids]
    calibration = calibrate(source, codec) if calibration is None else calibration
    groups = plan_groups(source.spec, parse_codecs(codec, source.spec.layer_numbers))
    layout = plan_layout(lengths, groups[0].row_bytes)
    tasks = [[index for index, _ in placed] for placed in fill_shards(lengths, layout)]
    identities = [sample_id(ids) for ids in source.input_ids]
    rows = sorted(zip(identities, counts or [1] * len(lengths), lengths, strict=True))
    part = {**data_record(rows, max(lengths)), "first_shard": 0, "num_shards": layout.num_shards}
    manifest = Manifest(
        spec=source.spec,
        teacher=teacher or source.spec,
        layout=layout,
        groups=groups,
        alignment=None,
        calibration=calibration_fingerprint(calibration),
        signal={"weights": "test", "codec": codec, **(signal or {})},
        metadata={},
        tokenizer={},
        data={"parts": [part], "dropped": None},
        token_arrays=token_arrays,
        runs=[{"first_part": 0, "complete": True}],
        created="2026-01-01T00:00:00+00:00",
        kvpipe_version="0.1.0",
    )
    files = {file.name: file.read_bytes() for file in tokenizer.iterdir()} if tokenizer else None
    manifest = create_store(locate(root), manifest, calibration, files)
    return manifest, calibration, tasks


def write_shard(
    root: Path,
    source: Source,
    manifest: Manifest,
    calibration: Calibration,
    shard: int,
    indices: Sequence[int],
    documents: Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    counts: Sequence[int] | None = None,
    beside: Mapping[int, Mapping[str, np.ndarray]] = MappingProxyType({}),
) -> None:
    offset, rows = 0, []
    for index in indices:
        ids = source.input_ids[index]
        rows.append(
            SampleRow(
                id=sample_id(ids),
                source=documents[index] if documents else f"document-{index}",
                shard=shard,
                token_start=shard * manifest.layout.shard_tokens + offset,
                num_tokens=len(ids),
                crc32c=token_crc32c(ids),
                count=counts[index] if counts else 1,
                text=texts[index] if texts else f"text of {index}",
            )
        )
        offset += -(-len(ids) // manifest.layout.chunk_tokens) * manifest.layout.chunk_tokens
    writer = ShardWriter(locate(root), manifest, calibration, shard, rows)
    for row, index in zip(rows, indices, strict=True):
        offset = row.token_start - shard * manifest.layout.shard_tokens
        writer.put_tokens(offset, source.input_ids[index], beside.get(index, {}))
        for layer, (key, value) in source.kv[index].items():
            writer.put(layer, [(offset, row.num_tokens)], key, value)
    writer.commit()


def write_store(
    root: Path,
    source: Source,
    codec: str = "mix",
    documents: Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    signal: dict[str, object] | None = None,
    tokenizer: Path | None = None,
    teacher: KVSpec | None = None,
    counts: Sequence[int] | None = None,
    calibration: Calibration | None = None,
    loss_masks: Mapping[int, np.ndarray] | None = None,
) -> Path:
    """A whole committed and compacted store of these samples."""
    arrays = ("input_ids",) if loss_masks is None else ("input_ids", "loss_mask")
    manifest, calibration, tasks = begin_store(root, source, codec, signal, tokenizer, teacher, calibration, arrays, counts)
    beside = {index: {"loss_mask": mask} for index, mask in (loss_masks or {}).items()}
    for shard, indices in enumerate(tasks):
        write_shard(root, source, manifest, calibration, shard, indices, documents, texts, counts, beside)
    compact(locate(root))
    return root


def add_repeats(root: Path, index: int, count: int) -> None:
    """One more part of the data, which had one stored sample that many times and nothing else."""
    storage, store = locate(root), open_store(root)
    manifest, number = store.manifest, len(store.manifest.data_parts)
    identity, num_tokens = store.samples.ids[index], int(store.samples.num_tokens[index])
    record = data_record([(identity, count, num_tokens)], num_tokens)
    repeats = write_repeats(storage, number, {identity: count})
    part = {**record, "first_shard": manifest.layout.num_shards, "num_shards": 0, "repeats": repeats}
    write_manifest(storage, dataclasses.replace(manifest, data={**manifest.data, "parts": [*manifest.data_parts, part]}))


def write_sample_tables(root: Path, num_shards: int, samples_per_shard: int) -> pa.Table:
    """A store of many samples of 64 tokens without their keys and values: sealed commit records that say next to nothing, and the
    tables of all samples in two parts. Returns the rows."""
    manifest, _, _ = begin_store(root, random_source(small_spec(num_layers=1), [64]))
    layout = Layout(chunk_tokens=64, shard_tokens=64 * samples_per_shard, num_shards=num_shards)
    parts = [{**manifest.data["parts"][0], "num_shards": num_shards}]
    data = {"parts": parts, "dropped": None}
    write_manifest(locate(root), dataclasses.replace(manifest, layout=layout, data=data))
    for shard in range(num_shards):
        record = Commit(shard=shard, signal=manifest.signal_fingerprint, objects=(), samples=(), fidelity={})
        create_commit(locate(root), record)
    count = num_shards * samples_per_shard
    rng = np.random.default_rng(0)
    digits = rng.bytes(32 * count).hex()
    numbers = np.arange(count)
    rows = pa.table(
        {
            "id": [digits[64 * index : 64 * (index + 1)] for index in range(count)],
            "source": [f"document-{index // 7}" for index in range(count)],
            "shard": numbers // samples_per_shard,
            "token_start": numbers * 64,
            "num_tokens": np.full(count, 64),
            "crc32c": rng.integers(0, 2**32, size=count),
            "count": 1 + numbers % 3,
            "text": [f"text of {index}" if index % 5 else None for index in range(count)],
        }
    ).cast(ROWS)
    shards = pa.table(
        {
            "shard": np.arange(num_shards),
            "num_samples": np.full(num_shards, samples_per_shard),
            "num_tokens": np.full(num_shards, 64 * samples_per_shard),
            "stored_bytes": np.full(num_shards, 10**8),
        }
    ).cast(SUMMARY)
    half = num_shards // 2
    write_tables(locate(root), rows.slice(half * samples_per_shard), shards.slice(half))
    write_tables(locate(root), rows.slice(0, half * samples_per_shard), shards.slice(0, half))
    return rows

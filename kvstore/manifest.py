"""What a store is: its manifest, groups, layout and the two fingerprints (FORMAT.md 2 and 3).

Pure records and planning; `writer` and `reader` put them on disk and take them off it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field, StringConstraints

from kvstore.codec import KINDS, Codec, codec_named, parse_codecs
from kvstore.errors import FingerprintMismatchError, StoreFormatError, StoreNotFoundError
from kvstore.groups import Group, plan_groups
from kvstore.layout import MAX_CHUNK_TOKENS, MIN_CHUNK_TOKENS, Layout
from kvstore.provenance import AlignmentRecord, DataRecord, RunRecord, SignalRecord
from kvstore.records import (
    INT64_MAX,
    STRICT,
    Difference,
    FileName,
    Sha256,
    StoreKey,
    bytes_sha256,
    differences,
    fingerprint,
    parse,
    unseal,
    write_sealed,
)
from kvstore.spec import MAX_LAYERS, KVSpec
from kvstore.storage import MAX_RECORD_BYTES, Storage

SCHEMA_VERSION = 1
TokenArrayName = Annotated[str, StringConstraints(pattern=r"^(input_ids|role|loss_mask|kv_mask)$")]
MANIFEST = "manifest.json"
ARRAYS = "kv.zarr"
COMMITS = "commits"
SAMPLES = "samples"
TOKENIZER = "tokenizer"
PROJECTION = "projection"
GATE = "gate.json"
PROGRESS = "progress"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Immutable identity of a store; `manifest.json` holds it sealed with its own sha256."""

    __pydantic_config__ = STRICT

    spec: KVSpec
    """What is stored: a baked store has the student's geometry under the teacher's layer numbers."""
    teacher: KVSpec
    """All attention layers of the teacher, stored or not: layer maps count depth on them."""
    layout: Layout
    groups: Annotated[tuple[Group, ...], Field(max_length=MAX_LAYERS)]
    alignment: dict[str, Any] | None
    """Record of `pipeline.align.Alignment`, None where no student was named."""
    token_arrays: tuple[TokenArrayName, ...]
    """Names of the arrays with one number a token: `input_ids` first, and those of `arrays.TOKEN_ARRAYS` this store has beside it."""
    calibration: Sha256 | None
    """sha256 over the mean and step arrays; None for raw."""
    metadata: dict[StoreKey, Sha256]
    """Fingerprint of every zarr.json by its path inside kv.zarr (`arrays.metadata_fingerprint`)."""
    tokenizer: dict[FileName, Sha256]
    """sha256 of every file in tokenizer/ by name."""
    projection: dict[FileName, Sha256] = dataclasses.field(default_factory=dict)
    """The same of projection/: the fitted maps a baked store was made with; empty where nothing was fitted."""
    signal: dict[str, Any]
    """Everything that shapes the numbers: weights, tokenizer, codec, alignment, layers, dtype."""
    data: dict[str, Any]
    """Which samples the store is for: `parts` in the order they were added, and a digest of those `dropped`."""
    runs: list[dict[str, Any]]
    """How the parts of the data were made, from `first_part` on: the settings of an extraction and how far it read the data, or the
    stores that were merged or recoded; `complete` when no part of a run is still to come."""
    created: Annotated[str, StringConstraints(max_length=100)]
    """UTC time, ISO 8601."""
    kvpipe_version: Annotated[str, StringConstraints(max_length=100)]

    @property
    def signal_fingerprint(self) -> str:
        return fingerprint(self.signal)

    @property
    def data_fingerprint(self) -> str:
        return fingerprint(self.data)

    @property
    def fingerprint(self) -> str:
        """Identity of the whole store: what a checkpoint of a student remembers."""
        return fingerprint([self.signal_fingerprint, self.data_fingerprint])

    @property
    def data_parts(self) -> list[dict[str, Any]]:
        """The parts of the data in the order they were added (FORMAT.md 10.1)."""
        parts: list[dict[str, Any]] = self.data.get("parts", [])
        return parts

    @property
    def is_response_only(self) -> bool:
        """Whether tokens that are not to be learnt from, those of prompts, have no keys and values (FORMAT.md 3.13)."""
        return bool(self.signal.get("response_only", False))

    @property
    def is_growing(self) -> bool:
        """Whether an extraction has not planned all of its data yet: more parts will follow."""
        return not all(run["complete"] for run in self.runs)

    def group_of(self, layer: int) -> tuple[Group, int]:
        """Group and slot of a teacher layer.

        Raises:
            ValueError: the store does not hold that layer.
        """
        for group in self.groups:
            if layer in group.layers:
                return group, group.layers.index(layer)
        raise ValueError(f"layers: got {layer}, but the store holds layers {list(self.spec.layer_numbers)}")

    def slots_of(self, layers: Iterable[int]) -> list[tuple[Group, list[int]]]:
        """The groups that hold these teacher layers, each with their slots in increasing order.

        Raises:
            ValueError: the store does not hold one of them.
        """
        found: dict[str, tuple[Group, set[int]]] = {}
        for layer in layers:
            group, slot = self.group_of(layer)
            found.setdefault(group.path, (group, set()))[1].add(slot)
        return [(group, sorted(slots)) for group, slots in found.values()]

    def codec_of(self, layer: int) -> Codec:
        """The codec of a teacher layer."""
        return codec_named(self.group_of(layer)[0].codec)

    def to_json(self) -> dict[str, Any]:
        body = dataclasses.asdict(self)
        if not self.projection:
            del body["projection"]
        return {
            "schema_version": SCHEMA_VERSION,
            **body,
            "fingerprints": {"signal": self.signal_fingerprint, "data": self.data_fingerprint},
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any], where: str) -> Manifest:
        """Parse a manifest.

        Raises:
            StoreFormatError: another schema version, fields that are missing or of another type or range, fingerprints that do not fit
                their fields, or fields that contradict each other; all contradictions are named.
        """
        version = record.get("schema_version")
        if version != SCHEMA_VERSION or isinstance(version, bool):
            raise StoreFormatError(
                f"schema_version: got {version!r:.80}, expected {SCHEMA_VERSION} ({where}); use the kvpipe that wrote it"
            )
        fields = {name: value for name, value in record.items() if name not in ("schema_version", "fingerprints")}
        manifest = parse(cls, fields, where, "2")
        expected = {"signal": manifest.signal_fingerprint, "data": manifest.data_fingerprint}
        if (got := record.get("fingerprints")) != expected:
            raise StoreFormatError(f"fingerprints: got {got!r:.200}, expected {expected} from the fields ({where})")
        parse(SignalRecord, manifest.signal, f"{where}: signal", "2.4")
        parse(DataRecord, manifest.data, f"{where}: data", "10.1")
        parse(list[RunRecord], manifest.runs, f"{where}: runs", "10.6")
        if manifest.alignment is not None:
            parse(AlignmentRecord, manifest.alignment, f"{where}: alignment", "2")
        lost = [
            f"{name}.{field} is missing"
            for name in ("spec", "teacher")
            for field in getattr(manifest, name).missing_in(record[name])
        ]
        if found := [*lost, *_contradictions(manifest)]:
            raise StoreFormatError(f"{where}: {'; '.join(found[:_MOST_NAMED])}; it was changed")
        # Plain values keep the order they were written in.
        return dataclasses.replace(manifest, **{name: record[name] for name in _PLAIN_FIELDS})


_PLAIN_FIELDS = ("alignment", "metadata", "tokenizer", "signal", "data", "runs")
_MOST_NAMED = 5


def _contradictions(manifest: Manifest) -> Iterator[str]:
    """What one field of a manifest says against another."""
    if manifest.is_response_only and "loss_mask" not in manifest.token_arrays:
        yield "response_only without a loss_mask among token_arrays (FORMAT.md 3.13)"
    if manifest.token_arrays[:1] != ("input_ids",) or len(set(manifest.token_arrays)) < len(manifest.token_arrays):
        yield f"token_arrays: got {list(manifest.token_arrays)}, expected input_ids first and each once (FORMAT.md 3.12)"
    yield from _layout_contradictions(manifest.layout)
    yield from _spec_contradictions("spec", manifest.spec)
    yield from _spec_contradictions("teacher", manifest.teacher)
    if strangers := set(manifest.spec.layer_numbers) - set(manifest.teacher.layer_numbers):
        yield f"spec: layers {sorted(strangers)} are none of the teacher's"
    elif not (manifest.alignment or {}).get("baked") and manifest.teacher.select(manifest.spec.layer_numbers) != manifest.spec:
        yield "spec: not the teacher's layers, although nothing is baked"
    yield from _group_contradictions(manifest)
    yield from _signal_contradictions(manifest)
    if manifest.alignment is not None and "capture_version" in manifest.signal:
        yield from _alignment_contradictions(manifest, manifest.alignment)
    yield from _data_contradictions(manifest)


def _layout_contradictions(layout: Layout) -> Iterator[str]:
    chunk = layout.chunk_tokens
    if chunk & (chunk - 1) or not MIN_CHUNK_TOKENS <= chunk <= MAX_CHUNK_TOKENS:
        yield f"layout.chunk_tokens: got {chunk}, expected a power of two from {MIN_CHUNK_TOKENS} to {MAX_CHUNK_TOKENS} (FORMAT.md 3.10)"
    if layout.shard_tokens % chunk:
        yield f"layout.shard_tokens: got {layout.shard_tokens}, expected a multiple of {chunk} (FORMAT.md 3.10)"
    if layout.num_tokens > INT64_MAX // 2**8:
        yield f"layout.num_shards: got {layout.num_shards} of {layout.shard_tokens} tokens, more than fit an axis"


def _spec_contradictions(name: str, spec: KVSpec) -> Iterator[str]:
    if not spec.layers:
        yield f"{name}: no layers"
    for layer in spec.layers:
        rope = spec.rope_of(layer.layer)
        dim = layer.value_dim if layer.latent else layer.key_dim
        if rope is not None and rope.start + rope.rotary_dim > dim:
            yield f"{name}: layer {layer.layer} rotates channels {rope.start} to {rope.start + rope.rotary_dim} of {dim}"


def _group_contradictions(manifest: Manifest) -> Iterator[str]:
    """Groups follow from the spec and a codec for each layer."""
    try:
        chosen = {layer: codec_named(group.codec) for group in manifest.groups for layer in group.layers}
        same = chosen.keys() == set(manifest.spec.layer_numbers) and plan_groups(manifest.spec, chosen) == manifest.groups
    except ValueError as error:
        yield f"groups: {error}"
        return
    if not same:
        yield "groups: not those that the layers of spec and their codecs make (FORMAT.md 3.9)"
        return
    if any(group.quantizer(kind) for group in manifest.groups for kind in KINDS) != (manifest.calibration is not None):
        yield "calibration: there is one exactly where a group is quantised (FORMAT.md 2.5)"
    expected = _metadata_keys(manifest)
    if manifest.metadata.keys() != expected:
        yield f"metadata: expected the zarr.json of {', '.join(sorted(expected ^ manifest.metadata.keys())[:3])} and no others"


def _metadata_keys(manifest: Manifest) -> set[str]:
    """Every zarr.json inside kv.zarr."""
    keys = {"zarr.json", *(f"{name}/zarr.json" for name in manifest.token_arrays)}
    for group in manifest.groups:
        names = ["layer", *(group.array(kind) for kind in KINDS)]
        names += [f"{kind}_{statistic}" for kind in KINDS if group.quantizer(kind) for statistic in ("mean", "step")]
        keys |= {f"{group.path}/{name}/zarr.json".lstrip("/") for name in names} | {f"{group.path}/zarr.json".lstrip("/")}
    return keys


def _signal_contradictions(manifest: Manifest) -> Iterator[str]:
    """The commits name the signal's fingerprint, so what it says of the numbers holds for every shard."""
    signal = manifest.signal
    codecs = {layer: codec_named(group.codec).name for group in manifest.groups for layer in group.layers}
    try:
        named = {layer: codec.name for layer, codec in parse_codecs(signal["codec"], manifest.spec.layer_numbers).items()}
    except ValueError as error:
        yield f"signal.codec: {error}"
        return
    if named != codecs:
        yield f"signal.codec: got {signal['codec']!r:.80}, but the groups are of other codecs"
    if "spec" in signal and parse(KVSpec, signal["spec"], "signal.spec", "2") != manifest.spec:
        yield "signal.spec: not the spec"
    for name in ("alignment", "calibration"):
        if name in signal and signal[name] != getattr(manifest, name):
            yield f"signal.{name}: not what the manifest has as {name}"


def _alignment_contradictions(manifest: Manifest, record: dict[str, Any]) -> Iterator[str]:
    """Of a store that an extraction began: the alignment's teacher is the store's, its map leads from layers there are to layers there are, and a baked store has the geometry
    of the student layers under the numbers of the teacher layers they are compared with."""
    teacher, student = (parse(KVSpec, record[side], f"alignment.{side}", "2") for side in ("teacher", "student"))
    pairs = [(int(ours), int(theirs)) for ours, theirs in record["layer_map"]]
    if teacher != manifest.teacher:
        yield "alignment.teacher: not the teacher"
    first: dict[int, int] = {}
    for ours, theirs in pairs:
        first.setdefault(theirs, ours)
    known = set(student.layer_numbers), set(teacher.layer_numbers)
    increasing = [ours for ours, _ in pairs] == sorted({ours for ours, _ in pairs})
    if not pairs or not increasing or not all(ours in known[0] and theirs in known[1] for ours, theirs in pairs):
        yield f"alignment.layer_map: got {pairs[:8]}, expected student layers in order, each with a layer of the teacher"
    elif not set(manifest.spec.layer_numbers) <= first.keys():
        yield f"alignment.layer_map: leads to layers {sorted(first)[:8]}, the store has {list(manifest.spec.layer_numbers)[:8]}"
    elif record["baked"]:
        layers = [dataclasses.replace(student.layer(ours), layer=theirs) for theirs, ours in sorted(first.items())]
        if dataclasses.replace(student, layers=tuple(layers), dtype=teacher.dtype) != manifest.spec:
            yield "spec: not the geometry of the alignment's student, although it is baked"


def _data_contradictions(manifest: Manifest) -> Iterator[str]:
    parts, shards = manifest.data_parts, 0
    for number, part in enumerate(parts):
        if part["first_shard"] != shards:
            yield f"data.parts[{number}].first_shard: got {part['first_shard']}, expected {shards} (FORMAT.md 10.1)"
        shards = part["first_shard"] + part["num_shards"]
    if parts and shards != manifest.layout.num_shards:
        yield f"data.parts: have {shards} shards, layout.num_shards says {manifest.layout.num_shards} (FORMAT.md 10.1)"
    first = [run["first_part"] for run in manifest.runs]
    if first != sorted(set(first)) or bool(parts) != bool(first) or (first and (first[0] or first[-1] >= len(parts))):
        yield f"runs: begin with parts {first[:8]}, expected increasing numbers from 0 to below {len(parts)} (FORMAT.md 10.6)"
    for run, stop in zip(manifest.runs, [*first[1:], len(parts)], strict=False):
        if "windows" in run and len(run["windows"]) != stop - run["first_part"]:
            yield f"runs: {len(run['windows'])} windows for parts {run['first_part']} to {stop - 1} (FORMAT.md 10.6)"


def read_manifest(storage: Storage) -> Manifest:
    """Read and verify the manifest of a store.

    Raises:
        StoreNotFoundError: no manifest there.
        StoreFormatError: it is damaged or of another version.
    """
    where = storage.location
    try:
        record = unseal(storage, MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreNotFoundError(
            f"no store at {where}: {MANIFEST} is missing; make one with 'kvpipe extract --teacher T --data D --out {where}'"
        ) from None
    return Manifest.from_json(record.body, record.where)


def read_beside(storage: Storage, folder: str, expected: Mapping[str, str]) -> dict[str, bytes]:
    """Content of the files of `tokenizer/` or `projection/`, by name.

    Args:
        expected: their sha256, as the manifest has them.

    Raises:
        StoreFormatError: a file is missing or damaged.
    """
    files = {}
    for name, sha256 in expected.items():
        with contextlib.suppress(FileNotFoundError):
            files[name] = storage.read(f"{folder}/{name}", most_bytes=MAX_RECORD_BYTES)
        actual = bytes_sha256(files[name]) if name in files else "nothing"
        if actual != sha256:
            raise StoreFormatError(
                f"{storage.location}/{folder}/{name}: hashes to {actual}, the manifest says {sha256}; restore the file"
            )
    return files


def write_manifest(storage: Storage, manifest: Manifest) -> None:
    """Put the manifest in place at once; a store begins to exist with it."""
    write_sealed(storage, MANIFEST, manifest.to_json())


def data_record(samples: Iterable[tuple[str, int, int]], seq_len: int) -> dict[str, Any]:
    """Identity of one part of a store's data: every sample in order, by content.

    Args:
        samples: id, count and number of tokens of each.
        seq_len: longest sample that was asked for, in tokens.
    """
    digest, num_samples, num_tokens = hashlib.sha256(), 0, 0
    for identity, count, tokens in samples:
        digest.update(f"{identity} {count}\n".encode())
        num_samples, num_tokens = num_samples + 1, num_tokens + tokens
    return {"samples": digest.hexdigest(), "num_samples": num_samples, "num_tokens": num_tokens, "seq_len": seq_len}


def refuse_mismatch(
    where: str,
    *,
    stored: Mapping[str, Any],
    wanted: Mapping[str, Any],
    what: str,
    owner: str = "this run",
    remedy: str = "Run with the store's own settings to resume it, or choose another --out.",
    hint: str = "",
) -> None:
    """Compare an existing store's identity with that of this run, or of another `owner`.

    Raises:
        FingerprintMismatchError: they differ; every differing field is named with what this run has and the store's.
    """
    found: list[Difference] = list(differences(wanted, stored))
    if found:
        raise FingerprintMismatchError(
            f"{what} of {owner} differs from the store at {where} in {len(found)} field(s):\n  "
            + "\n  ".join(str(difference) for difference in found)
            + f"\nNothing was written. {remedy} {hint}".rstrip()
        )

"""What a store is: its manifest, groups, layout and the two fingerprints (FORMAT.md 2 and 3).

Pure records and planning; `writer` and `reader` put them on disk and take them off it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np

from kvstore.codec import KINDS, Codec, Kind, Quantizer, code_dim, codec_named, storage_dtype
from kvstore.errors import FingerprintMismatchError, StoreFormatError, StoreNotFoundError
from kvstore.layout import Layout, RowBytes
from kvstore.records import Difference, bytes_sha256, differences, fingerprint, read_sealed, write_sealed
from kvstore.spec import Dtype, KVSpec, LayerSpec
from kvstore.storage import Storage

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
ARRAYS = "kv.zarr"
COMMITS = "commits"
SAMPLES = "samples"
TOKENIZER = "tokenizer"
PROJECTION = "projection"
GATE = "gate.json"
PROGRESS = "progress"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Layers that share their arrays: equal geometry, codec and storage dtype."""

    path: str
    """Zarr group inside kv.zarr: '' for the root, else 'group_1' and so on."""
    layers: tuple[int, ...]
    """The teacher's layer numbers; the position is the slot."""
    num_kv_heads: int
    key_dim: int
    value_dim: int
    codec: str
    dtype: Dtype

    def quantizer(self, kind: Kind) -> Quantizer | None:
        return codec_named(self.codec).quantizer(kind)

    def array(self, kind: Kind) -> str:
        """Name of the array of codes: `value_byte` where two 4-bit codes share a byte."""
        quantizer = self.quantizer(kind)
        return f"{kind}_byte" if quantizer and quantizer.form == "nibble" else kind

    def dim(self, kind: Kind) -> int:
        return self.key_dim if kind == "key" else self.value_dim

    def code_shape(self, kind: Kind) -> tuple[int, int]:
        """(kv_head, code) axes of the array of codes."""
        return self.num_kv_heads, code_dim(self.quantizer(kind), self.dim(kind))

    def storage_dtype(self, kind: Kind) -> np.dtype[Any]:
        return storage_dtype(self.quantizer(kind), self.dtype)

    @property
    def row_bytes(self) -> RowBytes:
        """Of the larger of the two arrays."""
        layer = max(int(np.prod(self.code_shape(kind))) * self.storage_dtype(kind).itemsize for kind in KINDS)
        return RowBytes(token=len(self.layers) * layer, layer=layer)


def plan_groups(spec: KVSpec, codecs: Mapping[int, Codec]) -> tuple[Group, ...]:
    """Groups of a store: layers of equal geometry and codec together, the largest group at the root.

    Args:
        codecs: by teacher layer, as `parse_codecs` gives them.

    Raises:
        CodecError: the codec cannot hold a layer's dims.
    """
    alike: dict[tuple[tuple[int, int, int], str], list[LayerSpec]] = {}
    for layer in spec.layers:
        alike.setdefault((layer.geometry, codecs[layer.layer].name), []).append(layer)
    groups = [
        Group(
            path="",
            layers=tuple(layer.layer for layer in layers),
            num_kv_heads=heads,
            key_dim=key_dim,
            value_dim=value_dim,
            codec=codec,
            dtype=spec.dtype,
        )
        for ((heads, key_dim, value_dim), codec), layers in alike.items()
    ]
    groups.sort(key=lambda group: (-group.row_bytes.token, group.layers))
    return tuple(dataclasses.replace(group, path=f"group_{index}" if index else "") for index, group in enumerate(groups))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Immutable identity of a store; `manifest.json` holds it sealed with its own sha256."""

    spec: KVSpec
    """What is stored: a baked store has the student's geometry under the teacher's layer numbers."""
    teacher: KVSpec
    """All attention layers of the teacher, stored or not: layer maps count depth on them."""
    layout: Layout
    groups: tuple[Group, ...]
    alignment: dict[str, Any] | None
    """Record of `pipeline.align.Alignment`, None where no student was named."""
    token_arrays: tuple[str, ...]
    """Names of the arrays with one number a token: `input_ids` first, and those of `arrays.TOKEN_ARRAYS` this store has beside it."""
    calibration: str | None
    """sha256 over the mean and step arrays; None for raw."""
    metadata: dict[str, str]
    """Fingerprint of every zarr.json by its path inside kv.zarr (`arrays.metadata_fingerprint`)."""
    tokenizer: dict[str, str]
    """sha256 of every file in tokenizer/ by name."""
    projection: dict[str, str] = dataclasses.field(default_factory=dict)
    """The same of projection/: the fitted maps a baked store was made with; empty where nothing was fitted."""
    signal: dict[str, Any]
    """Everything that shapes the numbers: weights, tokenizer, codec, alignment, layers, dtype."""
    data: dict[str, Any]
    """Which samples the store is for: `parts` in the order they were added, and a digest of those `dropped`."""
    runs: list[dict[str, Any]]
    """How the parts of the data were made, from `first_part` on: the settings of an extraction and how far it read the data, or the
    stores that were merged or recoded; `complete` when no part of a run is still to come."""
    created: str
    """UTC time, ISO 8601."""
    kvpipe_version: str

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
            StoreFormatError: another schema version, a missing field, or fingerprints that do not fit their fields.
        """
        version = record.get("schema_version")
        if version != SCHEMA_VERSION:
            raise StoreFormatError(
                f"schema_version: got {version!r}, expected {SCHEMA_VERSION} ({where}); use the kvpipe that wrote it"
            )
        try:
            manifest = cls(
                spec=KVSpec.from_json(record["spec"]),
                teacher=KVSpec.from_json(record["teacher"]),
                layout=Layout(**record["layout"]),
                groups=tuple(Group(**{**group, "layers": tuple(group["layers"])}) for group in record["groups"]),
                token_arrays=tuple(record["token_arrays"]),
                projection=record.get("projection", {}),
                **{name: record[name] for name in _PLAIN_FIELDS},
            )
            fingerprints = cast(dict[str, str], record["fingerprints"])
        except (KeyError, TypeError) as error:
            raise StoreFormatError(f"{where}: {error!r}; expected the fields of FORMAT.md 2") from error
        if manifest.is_response_only and "loss_mask" not in manifest.token_arrays:
            raise StoreFormatError(
                f"{where}: response_only without a loss_mask among token_arrays; it was changed (FORMAT.md 3.13)"
            )
        expected = {"signal": manifest.signal_fingerprint, "data": manifest.data_fingerprint}
        if fingerprints != expected:
            raise StoreFormatError(f"fingerprints: got {fingerprints}, expected {expected} from the fields ({where})")
        return manifest


_PLAIN_FIELDS = (*("alignment", "calibration", "metadata", "tokenizer", "signal", "data", "runs", "created", "kvpipe_version"),)


def read_manifest(storage: Storage) -> Manifest:
    """Read and verify the manifest of a store.

    Raises:
        StoreNotFoundError: no manifest there.
        StoreFormatError: it is damaged or of another version.
    """
    where = storage.location
    try:
        record = read_sealed(storage, MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreNotFoundError(
            f"no store at {where}: {MANIFEST} is missing; make one with 'kvpipe extract --teacher T --data D --out {where}'"
        ) from None
    return Manifest.from_json(record, f"{where}/{MANIFEST}")


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
            files[name] = storage.read(f"{folder}/{name}")
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

"""Changes to a store as a stranger could make them: one record altered and sealed again, one bit, one special file, one link, one stray.

`mutate` draws one change from a stream of random numbers and makes it. A seal proves nothing about the writer, so records get new
seals, and what names them by hash (the manifest's fingerprints, a summary's digests, names of files) is made to fit again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kvstore.metadata import metadata_fingerprint
from kvstore.records import canonical_json, fingerprint
from kvstore.samples import column_digest

DEEP = json.loads("[" * 500 + "]" * 500)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 0.5, -0.5, 1e308, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30),
    *(
        "",
        "1",
        "raw",
        "q8",
        "../../x",
        "/etc/passwd",
        "a/../b",
        "C:\\x",
        "nul\0byte",
        "é",
        "x" * 100_000,
        "0" * 64,
        "[/red]\x1b[2J",
    ),
    *([], {}, [None], [[]], {"a": 1}, [0] * 1000, DEEP),
)
"""What a field is set to: other types, the ends of number ranges, names that lead elsewhere."""


def reseal(file: Path, record: dict[str, Any]) -> None:
    record.pop("sha256", None)
    try:
        text = canonical_json(record)
    except (ValueError, RecursionError):
        text = "null"
    record["sha256"] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    file.write_bytes(json.dumps(record).encode("utf-8", "surrogatepass"))


def _places(record: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    keys = list(record) if isinstance(record, dict) else range(len(record)) if isinstance(record, list) else ()
    for key in keys:
        found.append((record, key))
        _places(record[key], found)
    return found


def alter(record: Any, stream: random.Random) -> str:
    """Change one place of a JSON value; says how."""
    container, key = stream.choice(_places(record, []))
    value = container[key]
    ways = ["set", "delete", "nudge", "rename", "add", "nest"] + (["twice", "swap"] if isinstance(container, list) else [])
    way = stream.choice(ways)
    if way == "nudge" and isinstance(value, (int, float)) and not isinstance(value, bool):
        container[key] = stream.choice(
            [value + 1, value - 1, -value, value * 2, float(value), str(value), value + 64, value * 1000]
        )
    elif way == "nudge" and isinstance(value, str):
        container[key] = stream.choice([value + "x", value[:-1], value.upper(), value[::-1], f" {value}", [value]])
    elif way == "delete":
        del container[key]
    elif way == "rename" and isinstance(container, dict):
        container[f"{key}_"] = container.pop(key)
    elif way == "add" and isinstance(container, dict):
        container["unknown"] = stream.choice(VALUES)
    elif way == "nest":
        container[key] = [value]
    elif way == "twice" and isinstance(container, list):
        container.insert(key, value)
    elif way == "swap" and isinstance(container, list):
        other = stream.randrange(len(container))
        container[key], container[other] = container[other], container[key]
    else:
        way, container[key] = "set", stream.choice(VALUES)
    return f"{way} {key!r:.40}"


def manifest(store: Path, stream: random.Random) -> str:
    file = store / "manifest.json"
    record = json.loads(file.read_text())
    part = stream.choice(
        [record, *(record[name] for name in ("spec", "layout", "groups", "data", "runs", "tokenizer", "signal"))]
    )
    told = alter(part or record, stream)
    if stream.random() < 0.7 and isinstance(record.get("fingerprints"), dict):
        for name in ("signal", "data"):
            with contextlib.suppress(ValueError, RecursionError):
                record["fingerprints"][name] = fingerprint(record.get(name))
    reseal(file, record)
    return told


def sealed(pattern: str) -> Callable[[Path, random.Random], str]:
    """One of the sealed records with such a name."""

    def change(store: Path, stream: random.Random) -> str:
        files = sorted(store.glob(pattern))
        if not files:
            return "nothing there"
        file = stream.choice(files)
        record = json.loads(file.read_text())
        told = alter(record, stream)
        reseal(file, record)
        if file.name.startswith("repeats") and stream.random() < 0.5:
            _name_repeats(store, file, record["sha256"])
        return f"{file.name}: {told}"

    return change


def _name_repeats(store: Path, file: Path, seal: str) -> None:
    record = json.loads((store / "manifest.json").read_text())
    record["data"]["parts"][int(file.stem.rpartition("-")[2])]["repeats"] = seal
    record["fingerprints"]["data"] = fingerprint(record["data"])
    reseal(store / "manifest.json", record)


def array_metadata(store: Path, stream: random.Random) -> str:
    """A zarr.json, and mostly its hash in the manifest too."""
    file = stream.choice(sorted((store / "kv.zarr").rglob("zarr.json")))
    document = json.loads(file.read_text())
    told = alter(document, stream)
    file.write_text(json.dumps(document))
    if stream.random() < 0.7:
        record = json.loads((store / "manifest.json").read_text())
        with contextlib.suppress(ValueError, TypeError, AttributeError, LookupError, RecursionError):
            record["metadata"][file.relative_to(store / "kv.zarr").as_posix()] = metadata_fingerprint(document)
            reseal(store / "manifest.json", record)
    return f"{file.relative_to(store)}: {told}"


def table(store: Path, stream: random.Random) -> str:
    """Numbers, types or metadata of a part or a summary, whose names and digests then fit again."""
    summary = stream.choice(sorted((store / "samples").glob("summary-*.parquet")))
    part = summary.with_name(f"part-{summary.name.split('-')[1]}.parquet")
    rows, shards = pq.read_table(part), pq.read_table(summary)
    metadata = dict(shards.schema.metadata)
    is_rows = stream.random() < 0.5
    changed, told = _alter_table(rows if is_rows else shards, stream)
    summary.unlink()
    if is_rows:
        rows = changed
        part.unlink()
        with contextlib.suppress(TypeError, ValueError, pa.ArrowException, AttributeError, KeyError):
            digests = {name: column_digest(rows[name]) for name in rows.column_names}
            metadata[b"kvpipe.columns"] = json.dumps(digests).encode()
    else:
        shards = changed
    if stream.random() < 0.1:
        metadata = stream.choice([{}, {b"kvpipe.columns": b"{"}, {b"kvpipe.columns": b'{"id": 1}'}, {b"kvpipe.columns": b"[]"}])
    write_tables(store / "samples", rows, shards.replace_schema_metadata(metadata))
    return f"{'part' if is_rows else 'summary'}: {told}"


def write_tables(folder: Path, rows: pa.Table, shards: pa.Table) -> None:
    """Write a part and its summary under names that fit their contents."""

    def written(table: pa.Table) -> tuple[bytes, str]:
        content = io.BytesIO()
        pq.write_table(table, content, compression="zstd", write_page_checksum=True)
        return content.getvalue(), hashlib.sha256(content.getvalue()).hexdigest()[:16]

    (part, named), (summary, own) = written(rows), written(shards)
    (folder / f"part-{named}.parquet").write_bytes(part)
    (folder / f"summary-{named}-{own}.parquet").write_bytes(summary)


def _alter_table(rows: pa.Table, stream: random.Random) -> tuple[pa.Table, str]:
    name = stream.choice(rows.column_names)
    number = rows.column_names.index(name)
    values = rows[name].to_pylist()
    way = stream.choice(["value", "value", "value", "type", "drop", "row", "twice", "null", "order"])
    if way == "drop":
        return rows.drop_columns([name]), f"drop {name}"
    if way == "row":
        return rows.slice(1), "without its first row"
    if way == "twice":
        return pa.concat_tables([rows, rows.slice(0, 1)]), "a row twice"
    if way == "order":
        return rows.take(pa.array(range(len(rows) - 1, -1, -1))), "rows backwards"
    kind: Any = rows.schema.field(name).type
    if way == "type":
        kind = stream.choice([pa.string(), pa.int64(), pa.float64(), pa.binary(), pa.bool_(), pa.list_(pa.int32())])
        values = [None] * len(values)
    elif way == "null":
        values[stream.randrange(len(values))] = None
    elif pa.types.is_integer(kind):
        low = 0 if pa.types.is_unsigned_integer(kind) else -(2 ** (kind.bit_width - 1))
        high = 2 ** (kind.bit_width - (0 if low == 0 else 1)) - 1
        row = stream.randrange(len(values))
        wanted = stream.choice([0, 1, -1, high, low, values[row] + 1, values[row] - 1, values[row] + 64, values[row] * 2])
        values[row] = min(max(wanted, low), high)
    else:
        values[stream.randrange(len(values))] = stream.choice(["", "x", "0" * 64, "A" * 64, "\x1b[2J", None, "é" * 1000])
    return rows.set_column(number, pa.field(name, kind), pa.array(values, kind)), f"{way} of {name}"


def flip(store: Path, stream: random.Random) -> str:
    files = [file for file in _files(store) if file.stat().st_size]
    file = stream.choice(files)
    content = bytearray(file.read_bytes())
    position = stream.randrange(len(content))
    content[position] ^= 1 << stream.randrange(8)
    file.write_bytes(content)
    return f"{file.relative_to(store)} at {position}"


def cut(store: Path, stream: random.Random) -> str:
    """Shorten, lengthen, empty, remove or exchange a file."""
    files = _files(store)
    file, other = stream.choice(files), stream.choice(files)
    way = stream.choice(["shorten", "lengthen", "empty", "remove", "exchange", "grow"])
    if way == "shorten":
        os.truncate(file, file.stat().st_size // 2)
    elif way == "lengthen":
        file.write_bytes(file.read_bytes() + b"\0" * 100)
    elif way == "empty":
        os.truncate(file, 0)
    elif way == "remove":
        file.unlink()
    elif way == "grow":
        os.truncate(file, 6 * 2**30)  # takes no room on the disk
    else:
        one, two = file.read_bytes(), other.read_bytes()
        file.write_bytes(two)
        other.write_bytes(one)
        if one == two:
            way = "exchange of equals"
    return f"{way} {file.relative_to(store)}"


def special(store: Path, stream: random.Random) -> str:
    """Something that is no file in the place of a file or a folder."""
    places = [*_files(store), *(path for path in sorted(store.rglob("*")) if path.is_dir())]
    path = stream.choice(places)
    way = stream.choice(["pipe", "socket", "device", "loop", "dangling", "folder", "copy", "outside"])
    outside = store.parent / "outside"
    shutil.rmtree(outside, ignore_errors=True)
    outside.mkdir()
    kept = path.rename(outside / "kept")
    if way == "pipe":
        os.mkfifo(path)
    elif way == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(outside / "socket"))  # a longer path would be no address
        (outside / "socket").rename(path)
    elif way == "folder":
        path.mkdir()
    elif way == "copy":
        path.symlink_to(kept)
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path.name, "dangling": "nowhere", "outside": "/proc/self"}[way])
    return f"{way} for {path.relative_to(store)}"


def junk(store: Path, stream: random.Random) -> str:
    """A file that is nobody's, in any folder."""
    folder = stream.choice([store, *(path for path in sorted(store.rglob("*")) if path.is_dir())])
    leases = store / ".staging" / "leases"
    name = stream.choice(
        [
            *(
                ".DS_Store",
                "Thumbs.db",
                "desktop.ini",
                "._00000.json",
                "00000.json.bak",
                "00000 (1).json",
                "0.json",
                "00099.json",
            ),
            *(
                "\u0660\u0660\u0660\u0660\u0661.json",
                "-1.json",
                "99999999999999999999.json",
                "part-x.parquet",
                "summary-.parquet",
                "summary-a-b.parquet",
            ),
            *(
                "repeats-x.json",
                "special_tokens_map.json",
                "added_tokens.json",
                "chat_template.jinja",
                "zarr.json",
                "a\nb",
                "c",
                "9",
            ),
            *("lease", "lease", "lease"),
        ]
    )
    content = stream.choice([b"", b"{}", b"[]", b"null", b"\xff\xfe", os.urandom(50), b"[" * 100_000, b'{"sha256": "x"}'])
    if name == "lease":
        leases.mkdir(parents=True, exist_ok=True)
        claim: dict[str, Any] = {
            "purpose": "x",
            "first": -1,
            "stop": 9,
            "host": "h",
            "pid": 1,
            "machine": "m",
            "started_s": 0.0,
        }
        alter(claim, stream)
        alter(claim, stream)
        (leases / "0123456789abcdef.json").write_text(json.dumps(claim))
        return f"lease {canonical_json(claim)[:80]}"
    if (folder / name).exists():
        return "nothing"
    (folder / name).write_bytes(content)
    return f"{(folder / name).relative_to(store)}: {content[:20]!r}"


def _files(store: Path) -> list[Path]:
    return [file for file in sorted(store.rglob("*")) if file.is_file() and not file.is_symlink()]


KINDS: dict[str, Callable[[Path, random.Random], str]] = {
    "manifest": manifest,
    "commit": sealed("commits/*.json"),
    "table": table,
    "repeats": sealed("samples/repeats-*.json"),
    "dropped": sealed("samples/dropped.json"),
    "gate": sealed("gate.json"),
    "metadata": array_metadata,
    "flip": flip,
    "cut": cut,
    "special": special,
    "junk": junk,
}
_WEIGHTS = {"manifest": 5, "commit": 4, "table": 4, "metadata": 2, "special": 2, "junk": 2}


def mutate(store: Path, seed: int) -> str:
    """Make one change; says what it was."""
    stream = random.Random(seed)
    kind = stream.choice([kind for kind in KINDS for _ in range(_WEIGHTS.get(kind, 1))])
    return f"{kind}: {KINDS[kind](store, stream)}"

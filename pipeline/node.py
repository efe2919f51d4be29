"""What every machine of a run must have: the driver's storage under the same path, the teacher's files, the same versions.

Asked on each machine before a teacher is loaded, so that the message can name it. Knows files; neither Ray nor models.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

from kvstore.storage import STAGING, Storage, locate

_VERSIONS = ("kvpipe", "torch", "transformers", "numpy", "zarr")
"""Packages of which another version could give other numbers."""


class NodeError(ValueError):
    """A machine of the cluster lacks something; the message names it and says what to do there."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Nonce:
    """A file the driver wrote where the store is, for the workers to find."""

    location: str
    key: str
    content: bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NodeInfo:
    """What must be the same on all machines."""

    host: str
    files: str
    """Digest of the teacher's config and of the names and sizes of its files."""
    versions: dict[str, str]


@contextlib.contextmanager
def nonce_in(storage: Storage) -> Iterator[Nonce]:
    """Leave a nonce in the staging area of a store, which need not exist yet, while the block runs."""
    content = secrets.token_bytes(16)
    nonce = Nonce(location=storage.location, key=f"{STAGING}/nonce-{secrets.token_hex(8)}", content=content)
    storage.write(nonce.key, content, replace=False)
    try:
        yield nonce
    finally:
        storage.delete(nonce.key)


def inspect_node(path: Path, nonce: Nonce | None) -> NodeInfo:
    """Make sure that this machine sees the store and the teacher.

    Args:
        path: the teacher's folder.

    Raises:
        NodeError: it does not.
    """
    host = socket.gethostname()
    if nonce is not None:
        _refuse_other_storage(host, nonce)
    if not (path / "config.json").is_file():
        raise NodeError(
            f"node {host}: the teacher is not in {path}, where the driver has it. Put it on a file system that every node mounts (for "
            "models of the hub: HF_HOME), or download it on every node to the same path"
        )
    versions = {name: importlib.metadata.version(name) for name in _VERSIONS}
    return NodeInfo(host=host, files=_files_digest(path), versions=versions)


def refuse_different(nodes: list[NodeInfo]) -> None:
    """Make sure that all machines have the same teacher and versions.

    Raises:
        NodeError: some differ; two are named.
    """
    first, *others = nodes
    for other in others:
        if other.files != first.files:
            raise NodeError(
                f"node {other.host}: its files of the teacher are not those of node {first.host} (config, names or sizes differ); copy "
                "the folder again, or share it"
            )
        for name, version in first.versions.items():
            if other.versions[name] != version:
                raise NodeError(
                    f"node {other.host}: got {name} {other.versions[name]}, expected {version} as on node {first.host}; install the same "
                    "versions on every node (constraints.txt has the tested ones)"
                )


def _refuse_other_storage(host: str, nonce: Nonce) -> None:
    try:
        found: object = locate(nonce.location).read(nonce.key)
        problem = "another file is there" if found != nonce.content else ""
    except FileNotFoundError:
        problem = "it is not there"
    except (OSError, ValueError) as error:
        problem = str(error)
    if problem:
        raise NodeError(
            f"node {host}: {nonce.location} is not what the driver sees under that name: it wrote {nonce.key} there, and for this "
            f"node {problem}. Mount the same file system at the same path on every node, or give --out s3://bucket/prefix"
        )


def _files_digest(path: Path) -> str:
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.iterdir()):
        if file.suffix in (".safetensors", ".json"):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    return digest.hexdigest()

"""Content hashes of a model's weights, config and tokenizer: equal content gives equal hashes on every machine.

Knows no model: it reads files, and from a tokenizer its serialised form.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from pipeline.models.checkpoint import weight_files
from pipeline.models.files import read_json

VOLATILE_CONFIG_FIELDS = ("transformers_version", "_name_or_path")
"""What rewriting an unchanged checkpoint may change in its config.json."""


def weights_fingerprint(path: Path) -> str:
    """Hash of the names and contents of a checkpoint's safetensors files.

    Free for a hub snapshot, whose files are links to blobs named by their sha256; about 0.6 s per GB otherwise.
    """
    contents = {file.name: _content_sha256(file) for file in weight_files(path)}
    return _sha256_of_json(contents)


def config_fingerprint(path: Path) -> str:
    """Hash of a checkpoint's config.json, without the fields that change when it is merely saved again."""
    config = read_json(path / "config.json")
    return _sha256_of_json({key: value for key, value in config.items() if key not in VOLATILE_CONFIG_FIELDS})


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of everything that decides which ids a fast tokenizer gives to a text."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Calls with truncation or padding leave their settings behind in the backend.
    backend.pop("truncation", None)
    backend.pop("padding", None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    added = {name: getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")}
    return _sha256_of_json({"backend": backend, "special_tokens": special, **added})


def _content_sha256(file: Path) -> str:
    target = file.resolve()
    if file.is_symlink() and re.fullmatch("[0-9a-f]{64}", target.name):
        return target.name
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sha256_of_json(record: object) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

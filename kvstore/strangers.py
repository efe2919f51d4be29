"""Which files of a store belong to nothing: leftovers of killed writers, which repairing removes, and files of others, which nobody touches.

Desktops, sync tools and people leave files in folders. They are no damage, no reader looks at them, and they are named. Pure functions
of names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from kvstore.arrays import shard_key
from kvstore.commits import Commit, shard_of
from kvstore.manifest import ARRAYS, GATE, MANIFEST, PROGRESS, PROJECTION, SAMPLES, TOKENIZER, Manifest
from kvstore.metadata import array_keys, expected_arrays
from kvstore.samples import is_part, is_summary
from kvstore.storage import STAGING, claim_key

_SAMPLES_OWN = re.compile(rf"{SAMPLES}/(dropped|repeats-[0-9]{{5,}})\.json")
_READ_BY_OTHERS = re.compile(r"[^.].*\.(json|model|jinja|tiktoken|py|safetensors)|(vocab|merges)\.txt|[^.]+_templates/.*")
"""Files of tokenizer/ and projection/ that a program given the folder would read."""


class Strangers(NamedTuple):
    """Keys of files that the records of a store do not account for."""

    orphans: tuple[str, ...]
    """Leftovers of killed writers."""
    foreign: tuple[str, ...]
    """Files of others."""
    misleading: tuple[str, ...]
    """Files of others in tokenizer/ and projection/ with which another program would read another tokenizer or other maps."""


def find_strangers(
    manifest: Manifest,
    commits: Iterable[Commit],
    damaged: Collection[int],
    keys: Iterable[str],
    writing: Collection[range],
    claims: Collection[str],
) -> Strangers:
    """Sort out the files of a store.

    Args:
        damaged: shards whose commit record cannot be read; their objects are kept.
        keys: every file.
        writing: shards that somebody is writing.
        claims: keys of living claims; with one, what lies in the staging folder is in use.
    """
    listed = {stored.path for commit in commits for stored in commit.objects}
    shards = {f"{ARRAYS}/{array}/c/": re.compile(_shard_pattern(array)) for array in array_keys(manifest)}
    ours = {MANIFEST, GATE, *(f"{ARRAYS}/{key}" for key in manifest.metadata)}
    ours |= {f"{TOKENIZER}/{name}" for name in manifest.tokenizer} | {f"{PROJECTION}/{name}" for name in manifest.projection}
    ours |= {
        f"{ARRAYS}/{array}/c/{'/'.join('0' * len(spec.shape))}"
        for array, spec in expected_arrays(manifest).items()
        if spec.shard is None
    }
    orphans, foreign, misleading = [], [], []
    for key in sorted(keys):
        folder, _, name = key.partition("/")
        if key in ours or key in listed or folder == PROGRESS or _is_record(key):
            continue
        if folder == STAGING:
            if not claims or (key.startswith(claim_key("").removesuffix(".json")) and key not in claims):
                orphans.append(key)
        elif (match := _match(shards, key)) is not None:
            shard = int(match)
            if shard not in damaged and not any(shard in span for span in writing):
                orphans.append(key)
        elif folder in (TOKENIZER, PROJECTION) and _READ_BY_OTHERS.fullmatch(name):
            misleading.append(key)
        else:
            foreign.append(key)
    return Strangers(tuple(orphans), tuple(foreign), tuple(misleading))


def _is_record(key: str) -> bool:
    return shard_of(key) is not None or is_part(key) or is_summary(key) or _SAMPLES_OWN.fullmatch(key) is not None


def _shard_pattern(array: str) -> str:
    return (
        re.escape(shard_key(array, 7))
        .replace("/c/7", r"/c/(?P<shard>[0-9]{1,10})")
        .replace("/c/0/7/", r"/c/0/(?P<shard>[0-9]{1,10})/")
    )


def _match(shards: dict[str, re.Pattern[str]], key: str) -> str | None:
    """The shard number in the key of a shard's object."""
    for prefix, pattern in shards.items():
        if key.startswith(prefix) and (match := pattern.fullmatch(key)):
            return match["shard"]
    return None

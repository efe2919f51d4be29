"""What identifies an extraction: everything that shapes its numbers, and the settings that made them.

Pure records for the manifest; knows no store on disk.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import transformers

from kvstore import KVStoreError
from kvstore.codec import Codec, format_codecs
from kvstore.records import plain
from kvstore.spec import KVSpec, format_layers
from pipeline.align import Alignment
from pipeline.config import ExtractConfig
from pipeline.models.fingerprint import config_fingerprint, tokenizer_fingerprint, weights_fingerprint
from pipeline.models.resolve import ResolvedModel
from pipeline.worker import TeacherInfo

CAPTURE_VERSION = 1
"""Raised whenever the same teacher and text would give other numbers."""


def signal_record(
    resolved: ResolvedModel,
    tokenizer: Any,
    info: TeacherInfo,
    stored: KVSpec,
    alignment: Alignment | None,
    codecs: Mapping[int, Codec],
    template: str | None,
    response_only: bool,
) -> dict[str, Any]:
    """Everything that shapes the numbers, but the calibration.

    Args:
        template: fingerprint of the chat template, None where the data is plain text.
        response_only: whether tokens that are not learnt from are left out.
    """
    signal = {
        "capture_version": CAPTURE_VERSION,
        "transformers": transformers.__version__.split(".")[0],
        "weights": weights_fingerprint(resolved.path),
        "config": config_fingerprint(resolved.path),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": template,
        "dtype": info.spec.dtype,
        "attn_implementation": info.attn_implementation,
        "layers": format_layers(stored.layer_numbers),
        "spec": stored.to_json(),
        "alignment": alignment.to_json() if alignment else None,
        "codec": format_codecs(codecs),
    }
    if response_only:
        signal["response_only"] = True
    return cast(dict[str, Any], plain(signal))


_NOT_RECORDED = frozenset(
    {
        *("out", "append", "accept_fidelity", "max_bytes", "task_range"),
        *("workers", "ray_address", "gpus_per_worker", "device", "grace_s", "gate_tokens"),
    }
)
"""Settings that shape no sample, or that belong to the machine they were given on."""


def recorded_settings(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a manifest keeps of an extraction's settings, read back.

    Raises:
        KVStoreError: there are settings that no extraction records: whoever made the store wants them obeyed on this machine.
    """
    if strangers := sorted(settings.keys() - (ExtractConfig.model_fields.keys() - _NOT_RECORDED)):
        raise KVStoreError(
            f"runs: the settings of the store at {where} have {', '.join(strangers)[:200]}, which no extraction records; it was changed. "
            "Nothing was read or written; give your own settings, or extract again"
        )
    return dict(settings)


def run_record(config: ExtractConfig, resolved: ResolvedModel) -> dict[str, Any]:
    """The settings of an extraction as its manifest keeps them, so that `repair` can run it again from anywhere."""
    teacher = resolved.id_or_path if resolved.preset is None else resolved.preset.name
    data = tuple(_absolute(part) for part in config.data)
    settings = config.model_copy(update={"teacher": teacher, "data": data, "revision": resolved.commit or config.revision})
    omitted = set(_NOT_RECORDED)
    if config.on_bad_sample == "fail":
        omitted.add("on_bad_sample")  # else it decides which rows of the data there are
    if not config.as_text:
        omitted.add("as_text")  # so that a version without this setting can repair the store
    return settings.model_dump(mode="json", exclude=omitted)


def _absolute(part: str) -> str:
    path = Path(part).expanduser()
    return str(path.absolute()) if path.exists() or (glob.has_magic(part) and glob.glob(str(path), recursive=True)) else part

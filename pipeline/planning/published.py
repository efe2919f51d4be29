"""What follows from a preset alone, where the teacher's weights are not on this machine."""

from __future__ import annotations

from typing import Any

from kvstore.codec import CODECS, format_codecs, parse_codecs
from kvstore.spec import KVSpec, LayerSpec, RopeSpec, parse_layers
from pipeline.config import ExtractConfig
from pipeline.data.windows import Consumed, Window
from pipeline.extract import stored_geometry
from pipeline.models.load import build_student
from pipeline.models.presets import Geometry, TeacherPreset, teacher_preset
from pipeline.models.probe import probe_kv_spec
from pipeline.planning.assembly import Found
from pipeline.planning.data_size import DataSize
from pipeline.planning.estimate import Records, Sizing
from pipeline.tasks import estimate_bytes

_GUESSED = Records(per_token=8.0, per_shard=20_000, spare_per_token=2.5, own=12_000_000, own_files=30)
"""Where there is no tokenizer to try: four bytes of text a token, twice, once compressed to less than half; a tokenizer of 150,000 tokens."""
_UNREAD = Window(number=0, samples=[], consumed=Consumed(documents=0, sha256="", samples=0, tokens=0), last=False)
_IDS_BYTES = 2.0
"""Of a compressed token id."""


def find_published(config: ExtractConfig, preset: TeacherPreset, why: str) -> Found:
    """Sizes without a teacher: its published geometry, and the bits per value of Gaussian channels.

    Args:
        why: it is not here.
    """
    dtype = "bfloat16" if config.dtype == "auto" else config.dtype
    teacher = published_spec(preset.geometry, dtype)
    alignment, stored = None, teacher.select(parse_layers(config.layers or "all", teacher.layer_numbers))
    if config.student is not None:
        student = teacher_preset(config.student)
        spec = (
            published_spec(student.geometry, dtype)
            if student is not None
            else probe_kv_spec(build_student(config.student, vocab_size=preset.geometry.vocab_size, seed=0)[0])
        )
        alignment, stored = stored_geometry(config, teacher, spec)
    tokens = config.max_tokens or None
    seq_len = min(config.seq_len, preset.geometry.max_position_embeddings)
    sizing = Sizing(
        stored=stored,
        lengths=[seq_len] * max(min(tokens or 0, config.window_tokens) // seq_len, 1),
        num_tokens=tokens,
        window_tokens=config.window_tokens,
        other_bytes_per_token=_IDS_BYTES,
        other_arrays=1,
        records=_GUESSED,
    )
    rungs = {}
    chosen = parse_codecs(config.codec, stored.layer_numbers)
    for name in dict.fromkeys([format_codecs(chosen), *CODECS]):
        codecs = parse_codecs(name, stored.layer_numbers)
        rungs[name] = codecs, estimate_bytes(stored, codecs, 10**6) / 10**6
    sizes = {layer: estimate_bytes(stored.select([layer]), {layer: codec}, 10**6) for layer, codec in chosen.items()}
    return Found(
        data=DataSize(
            window=_UNREAD,
            num_tokens=tokens,
            is_exact=False,
            relative_error=None,
            how="--max-tokens, if the data has as much" if tokens else "no --max-tokens, and no tokenizer here to count with",
            seconds_per_token=0.0,
        ),
        teacher=teacher,
        alignment=alignment,
        sizing=sizing,
        rungs=rungs,
        layer_shares={layer: size / sum(sizes.values()) for layer, size in sizes.items()},
        note=f"{why}. Sizes are those of Gaussian channels{'' if config.dtype != 'auto' else ' captured as bfloat16'}; nothing was "
        "tried, so there is no time",
    )


def published_spec(geometry: Geometry, dtype: Any) -> KVSpec:
    """The keys and values of a model as published."""
    ropes: tuple[RopeSpec, ...] = ()
    if geometry.rope_theta is not None:
        pairs = geometry.head_dim // 2
        ropes = (RopeSpec(kind="half", inv_freq=tuple(geometry.rope_theta ** (-pair / pairs) for pair in range(pairs))),)
    return KVSpec(
        layers=tuple(
            LayerSpec(
                layer=layer,
                num_kv_heads=geometry.num_kv_heads,
                key_dim=geometry.head_dim,
                value_dim=geometry.head_dim,
                rope=0 if ropes else None,
            )
            for layer in range(geometry.num_layers)
        ),
        ropes=ropes,
        dtype=dtype,
    )

"""The debugging checklist of training on a teacher's keys and values: both models, every shape on the way, and what is wrong with the pair.

Reads configs and tokenizers, never a large model's weights. Decides nothing by itself: a finding says what is wrong and what to do.
"""

from __future__ import annotations

import copy
import dataclasses
import sysconfig
from pathlib import Path
from typing import Any

import torch

from kvstore import open_store
from kvstore.codec import parse_codecs
from kvstore.reader import Store
from kvstore.spec import KVSpec, format_layers
from pipeline.align import Alignment, choose_student_layers
from pipeline.align.same_tokens import tokenizer_differences
from pipeline.align.spans import align_sample
from pipeline.align.token_bytes import TokenBytes
from pipeline.models.load import build_student, load_config, load_tokenizer
from pipeline.models.presets import Geometry, student_preset, teacher_preset
from pipeline.models.probe import probe_kv_spec
from pipeline.models.resolve import ModelLoadError, resolve_model
from pipeline.planning.published import published_spec
from pipeline.tasks import estimate_bytes

_TEXT_CHARACTERS = 8_000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something about the pair that a user should know."""

    what: str
    fix: str
    fatal: bool
    """Whether training would fail."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checkup:
    """One screen's worth of answers."""

    facts: dict[str, tuple[Any, Any]]
    """Of teacher and student, by field."""
    shapes: dict[str, tuple[int, ...]]
    """Of keys along the way, by what they are; of one layer and the sample text, [batch, kv_head, token, dim]."""
    index: str
    """Which teacher tokens those of the student take: how, number, type and range."""
    layer_map: tuple[tuple[int, int], ...]
    compared: str
    """In whose geometry layers are compared."""
    coverage: float | None
    """Share of the student's tokens of the sample text with a counterpart; None where a tokenizer is not here."""
    bytes_per_token: dict[str, float]
    """In codec `mix`, of a raw store of all layers and of one aligned to the student."""
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return not any(finding.fatal for finding in self.findings)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    name: str
    facts: dict[str, Any]
    spec: KVSpec
    tokenizer: Any
    """None where there is none of its own."""
    num_embeddings: int
    max_positions: int | None


def examine(teacher: str, student: str, store: str | None, layer_map: str, text: str | None) -> Checkup:
    """Look at a teacher and a student, and a store if there is one.

    Args:
        text: what to try tokens on; None for some of Python's standard library.

    Raises:
        ValueError: no such teacher or student, or no such layer map.
        KVStoreError: no such store.
    """
    findings: list[Finding] = []
    theirs = _known(teacher, findings)
    opened = None if store is None else open_store(store)
    tokenizer = theirs.tokenizer
    if opened is not None and opened.tokenizer_path is not None:
        tokenizer = load_tokenizer(opened.tokenizer_path)
    ours = _fresh(student, tokenizer, theirs) or _known(student, findings)
    alignment = Alignment.plan(theirs.spec, ours.spec, layer_map)
    sample = text or _sample_text()
    index, coverage, num_tokens = _tokens(theirs, ours, tokenizer, sample, findings)
    _check_heads(theirs, findings)
    if opened is not None:
        findings += _check_store(opened, theirs, ours, tokenizer)
    return Checkup(
        facts={field: (theirs.facts.get(field), ours.facts.get(field)) for field in theirs.facts},
        shapes=_shapes(alignment, num_tokens),
        index=index,
        layer_map=alignment.layer_map,
        compared=f"{alignment.comparison(alignment.teacher_layers[-1]).side}'s geometry",
        coverage=coverage,
        bytes_per_token=_costs(theirs.spec, ours.spec, layer_map),
        findings=tuple(findings),
    )


def _sample_text() -> str:
    source = (Path(sysconfig.get_paths()["stdlib"]) / "textwrap.py").read_text(encoding="utf-8")
    return source[:_TEXT_CHARACTERS] + "\nnaïve café, 日本語, 🙂\n"


def _known(name: str, findings: list[Finding]) -> _Side:
    """A model with a checkpoint here, or the published numbers of a preset."""
    try:
        path = resolve_model(name, download=False).path
    except ModelLoadError as error:
        preset = teacher_preset(name)
        if preset is None:
            raise ValueError(f"{name}: {error}") from error
        findings.append(
            Finding(
                what=f"{name} is not on this machine: its numbers are the published ones, and its tokens were not tried",
                fix=f"fetch it with 'hf download {preset.id}' for a full check",
                fatal=False,
            )
        )
        return _published(name, preset.geometry)
    return _of_config(name, load_config(path), load_tokenizer(path), findings)


def _published(name: str, geometry: Geometry) -> _Side:
    return _Side(
        name=name,
        facts={
            "model": name,
            "known from": "published numbers",
            "model_type": geometry.model_type,
            "hidden_size": geometry.hidden_size,
            "num_hidden_layers": geometry.num_layers,
            "num_attention_heads": geometry.num_heads,
            "num_key_value_heads": geometry.num_kv_heads,
            "head_dim": geometry.head_dim,
            "rope_theta": geometry.rope_theta,
            "vocab_size": geometry.vocab_size,
            "max_position_embeddings": geometry.max_position_embeddings,
        },
        spec=published_spec(geometry, "bfloat16"),
        tokenizer=None,
        num_embeddings=geometry.vocab_size,
        max_positions=geometry.max_position_embeddings,
    )


def _fresh(name: str, tokenizer: Any, theirs: _Side) -> _Side | None:
    """A student without weights, built as training will build it; None where it is a pretrained one."""
    preset = student_preset(name)
    if not name.endswith((".toml", ".json")) and (preset is None or preset.config is None):
        return None
    model, _ = build_student(name, vocab_size=theirs.num_embeddings if tokenizer is None else len(tokenizer), seed=0)
    return _of_config(name, model.config, None, [], model)


def _of_config(name: str, config: Any, tokenizer: Any, findings: list[Finding], model: Any = None) -> _Side:
    text = config.get_text_config()
    spec = probe_kv_spec(model.eval()) if model is not None else _spec_of(name, text, findings)
    rope = spec.rope_of(spec.layer_numbers[-1])
    parameters = getattr(text, "rope_parameters", None) or {}
    return _Side(
        name=name,
        facts={
            "model": name,
            "known from": "a fresh config" if tokenizer is None else "its checkpoint",
            "model_type": text.model_type,
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": getattr(text, "num_key_value_heads", text.num_attention_heads),
            "head_dim": spec.layers[-1].key_dim,
            "rope_theta": parameters.get("rope_theta") if rope else None,
            "vocab_size": text.vocab_size,
            "max_position_embeddings": getattr(text, "max_position_embeddings", None),
        },
        spec=spec,
        tokenizer=tokenizer,
        num_embeddings=int(text.vocab_size),
        max_positions=getattr(text, "max_position_embeddings", None),
    )


def _spec_of(name: str, config: Any, findings: list[Finding]) -> KVSpec:
    """Measured on one layer of that config with few words and no weights; the layers of nearly all models are alike."""
    from transformers import AutoModelForCausalLM

    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size = 1, 128
    small.bos_token_id = small.eos_token_id = small.pad_token_id = None
    kinds = getattr(config, "layer_types", None)
    if kinds:
        small.layer_types = kinds[:1]
    if kinds and len(set(kinds)) > 1:
        findings.append(
            Finding(
                what=f"{name} has layers of several kinds ({', '.join(sorted(set(kinds)))}); shapes here are those of its first",
                fix="'kvpipe plan' tries the model itself",
                fatal=False,
            )
        )
    one = probe_kv_spec(AutoModelForCausalLM.from_config(small).eval())
    layers = tuple(dataclasses.replace(one.layers[0], layer=layer) for layer in range(config.num_hidden_layers))
    return dataclasses.replace(one, layers=layers)


def _check_heads(theirs: _Side, findings: list[Finding]) -> None:
    queries, heads = theirs.facts["num_attention_heads"], theirs.spec.layers[-1].num_kv_heads
    if queries != heads:
        findings.append(
            Finding(
                what=f"{theirs.name} has {queries} query heads but {heads} KV heads: K and V have {heads}",
                fix="take head counts from the tensors or num_key_value_heads, never from num_attention_heads",
                fatal=False,
            )
        )


def _tokens(
    theirs: _Side, ours: _Side, tokenizer: Any, text: str, findings: list[Finding]
) -> tuple[str, float | None, tuple[int, int]]:
    """How tokens meet, the share that does, and how many each side has of the sample text."""
    if ours.tokenizer is None and tokenizer is not None and ours.num_embeddings < len(tokenizer):
        findings.append(_too_small(ours, len(tokenizer)))
    if tokenizer is None:
        return "identity, if the tokenizers are the same; not tried", None, (50, 50)
    try:
        source = TokenBytes(tokenizer)
        target = source if ours.tokenizer is None else TokenBytes(ours.tokenizer)
        ids = tokenizer(text, verbose=False)["input_ids"]
        sample = align_sample(source, target, ids)
    except ValueError as error:
        findings.append(Finding(what=str(error), fix="choose a student of the teacher's family, or a fresh one", fatal=True))
        return "none", 0.0, (50, 50)
    same, spans = source.same_as(target), sample.spans
    if not same:
        differences = "; ".join(tokenizer_differences(ours.tokenizer, tokenizer))
        findings.append(
            Finding(
                what=f"{ours.name} has another tokenizer: {len(sample.input_ids):,} tokens where {theirs.name} has {len(ids):,} (student "
                f"against teacher: {differences})",
                fix=f"extract a raw store, then 'kvpipe align STORE --student {ours.name} --out ALIGNED' and train from that",
                fatal=False,
            )
        )
    how = "identity" if same else "by bytes"
    span = f"{spans.indices.min(initial=0)} to {spans.indices.max(initial=0)} of {len(ids):,}"
    index = f"{how}: {len(spans.indices):,} {spans.indices.dtype} indices for {len(sample.input_ids):,} tokens, from {span}"
    return index, spans.coverage, (len(ids), len(sample.input_ids))


def _too_small(ours: _Side, needed: int) -> Finding:
    return Finding(
        what=f"{ours.name} has vocab_size {ours.num_embeddings:,}, expected at least {needed:,} of the tokenizer",
        fix="leave vocab_size out of a fresh student's config",
        fatal=True,
    )


def _shapes(alignment: Alignment, num_tokens: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Of zeros sent along the way, in the order of attention."""
    student_layer, teacher_layer = alignment.layer_map[-1]
    theirs, ours = alignment.teacher.layer(teacher_layer), alignment.student.layer(student_layer)
    key = torch.zeros(1, num_tokens[0], theirs.num_kv_heads, theirs.key_dim)
    value = torch.zeros(1, num_tokens[0], theirs.num_kv_heads, theirs.value_dim)
    projected = alignment.project(teacher_layer, key, value)
    found = {
        "teacher K": tuple(key.transpose(1, 2).shape),
        "teacher V": tuple(value.transpose(1, 2).shape),
        "projected K": tuple(projected[0].transpose(1, 2).shape),
        "projected V": tuple(projected[1].transpose(1, 2).shape),
    }
    for kind, index in (("K", 0), ("V", 1)):
        found[f"projected {kind} at the student's tokens"] = tuple(
            torch.zeros(1, num_tokens[1], *projected[index].shape[2:]).transpose(1, 2).shape
        )
    found["student K"] = (1, ours.num_kv_heads, num_tokens[1], ours.key_dim)
    found["student V"] = (1, ours.num_kv_heads, num_tokens[1], ours.value_dim)
    return found


def _costs(teacher: KVSpec, student: KVSpec, layer_map: str) -> dict[str, float]:
    layers = choose_student_layers(None, layer_map, student.layer_numbers)
    alignment = Alignment.plan(teacher, student, layer_map, layers)
    aligned = alignment.stored_spec() if alignment.is_smaller else teacher.select(alignment.teacher_layers)
    return {
        name: estimate_bytes(spec, parse_codecs("mix", spec.layer_numbers), 10**6) / 10**6
        for name, spec in (("raw, all layers", teacher), ("aligned to the student", aligned))
    }


def _check_store(store: Store, theirs: _Side, ours: _Side, tokenizer: Any) -> list[Finding]:
    """What keeps this student from training on this store, made by this teacher."""
    manifest, found = store.manifest, []
    ours_layers, stored = theirs.spec.layers, manifest.teacher.layers
    if [layer.geometry for layer in ours_layers] != [layer.geometry for layer in stored]:
        found.append(
            Finding(
                what=f"{store.location} is of a teacher with {len(stored)} layers of {_describe(manifest.teacher)}, {theirs.name} has "
                f"{len(ours_layers)} of {_describe(theirs.spec)}",
                fix="name the teacher the store was made with",
                fatal=False,
            )
        )
    recorded = None if manifest.alignment is None else Alignment.from_json(manifest.alignment)
    if recorded is not None and recorded.baked:
        wanted, given = ([layer.geometry for layer in spec.layers] for spec in (recorded.student, ours.spec))
        if wanted != given:
            found.append(
                Finding(
                    what=f"{store.location} is baked for a student of {len(wanted)} layers of {_describe(recorded.student)}, {ours.name} has "
                    f"{len(given)} of {_describe(ours.spec)}",
                    fix="train a student of that geometry, or align a raw store to this one",
                    fatal=True,
                )
            )
    committed, planned = len(store.samples.summary), manifest.layout.num_shards
    if committed < planned:
        found.append(
            Finding(
                what=f"{committed} of {planned} shards of {store.location} are committed",
                fix="run its 'kvpipe extract' command again",
                fatal=committed == 0,
            )
        )
    longest = int(store.samples.num_tokens.max(initial=0))
    if ours.max_positions is not None and longest > ours.max_positions:
        found.append(
            Finding(
                what=f"{ours.name} has max_position_embeddings {ours.max_positions}, the store samples of {longest} tokens",
                fix="raise it in the student's config, or extract with a smaller --seq-len",
                fatal=True,
            )
        )
    both = ours.tokenizer is not None and tokenizer is not None
    if both and (differences := tokenizer_differences(ours.tokenizer, tokenizer)):
        found.append(
            Finding(
                what=f"the token ids of {store.location} are not those of {ours.name} (student against store: {'; '.join(differences)})",
                fix=f"'kvpipe align {store.location} --student {ours.name} --out ALIGNED', and train from that",
                fatal=True,
            )
        )
    if both and ours.num_embeddings < len(tokenizer):
        found.append(_too_small(ours, len(tokenizer)))
    return found


def _describe(spec: KVSpec) -> str:
    layer = spec.layers[-1]
    return f"{layer.num_kv_heads} KV heads of {layer.key_dim} ({format_layers(spec.layer_numbers)})"

"""From a folder to a model in memory, refusing everything that would give wrong keys and values in silence.

Transformers by itself initialises missing weights at random, loads BERT as a "causal" model and makes up a tokenizer where
files are missing. Knows no store. Importing this module loads neither torch nor transformers; its functions do.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.models.checkpoint import TOKENIZER_FILES, damaged, validate_checkpoint
from pipeline.models.files import one_line, read_json
from pipeline.models.fingerprint import config_fingerprint, tokenizer_fingerprint, weights_fingerprint
from pipeline.models.presets import StudentPreset, TeacherPreset, parse_student, student_preset, student_preset_names
from pipeline.models.resolve import ModelLoadError, ResolvedModel, resolve_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

__all__ = [
    "ModelLoadError",
    "ResolvedModel",
    "build_student",
    "config_fingerprint",
    "geometry_mismatch",
    "load_causal_lm",
    "load_config",
    "load_tokenizer",
    "resolve_model",
    "tokenizer_code",
    "tokenizer_fingerprint",
    "weights_fingerprint",
]

VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken", "tekken.json")
"""A tokenizer has at least one of these; without any, transformers returns one that knows a single token."""

OPTIONAL_FIELDS = {"model_type", "head_dim"}
"""Fields transformers reads from any config although not every config class declares them."""


def load_causal_lm(
    path: Path, dtype: str = "auto", device: str = "cpu", last_layer: int | None = None, spare_embedding: bool = False
) -> PreTrainedModel:
    """Load a decoder from safetensors, in evaluation mode, every weight of it from the checkpoint.

    Args:
        dtype: `float32`, `float16`, `bfloat16`, or `auto` for the checkpoint's own.
        device: `cpu`, `cuda`, `cuda:1`, or `auto` to spread it over what there is.
        last_layer: what is above is not read where the model can do without (`partial.is_partial`); None for all.
        spare_embedding: whether rows of the embedding may be broken, which spoil only samples that have their tokens.

    Raises:
        ModelLoadError: the files are damaged or incomplete, or this is no causal decoder.
    """
    from transformers import AutoModelForCausalLM

    if problems := validate_checkpoint(path):
        raise ModelLoadError(f"the checkpoint in {path} cannot be used: " + "; ".join(problems))
    config = load_config(path)
    _validate_generation(path)
    if config.is_encoder_decoder:
        raise ModelLoadError(
            f"{path}: {config.model_type} is an encoder-decoder model; its keys and values are not causal. Choose a decoder"
        )
    with _transformers(path, "model"):
        kind: Any = AutoModelForCausalLM
        if last_layer is not None:
            kind, config = _partial_class(config, last_layer)
        model, report = kind.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            device_map=None if device == "cpu" else device,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the report names them, where transformers' own error does not
        )
    _validate_weights(path, report)
    _validate_causal(path, model)
    _validate_finite(path, model, spare_embedding)
    return model.eval()


@contextlib.contextmanager
def _transformers(path: Path, what: str) -> Iterator[None]:
    """While open, transformers reads a folder: whatever it raises becomes one line that names the folder and the cause.

    Exceptions of every class are meant, because transformers and tokenizers raise what their code happens to stumble over.

    Raises:
        ModelLoadError: it raised something.
    """
    try:
        yield
    except Exception as error:
        raise ModelLoadError(f"{path}: transformers cannot load this {what} ({_cause(path, error)})") from error


def _cause(path: Path, error: Exception) -> str:
    """Why transformers failed, in words that fit kvpipe: its own errors recommend arguments that kvpipe has not."""
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    settings = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
    code = sorted({str(name) for record in (config, settings) for name in _names_of_code(record.get("auto_map"))})
    if code and ("trust_remote_code" in str(error) or settings.get("auto_map")):
        return (
            f"it is written in code that comes with the checkpoint, {', '.join(code)}. kvpipe runs no code that comes with a checkpoint: "
            "choose a model that transformers itself supports"
        )
    quantised = config.get("quantization_config") or config.get("quantization")
    if quantised:
        method = quantised.get("quant_method", "MLX") if isinstance(quantised, dict) else quantised
        return f"its weights are quantised, by {method}: {one_line(error)}; choose the model they were made from"
    return one_line(error)


def _names_of_code(auto_map: Any) -> Iterator[Any]:
    """Classes that a config says are in its repository: one, or several of a kind."""
    for names in auto_map.values() if isinstance(auto_map, dict) else [auto_map]:
        yield from (name for name in (names if isinstance(names, list) else [names]) if name is not None)


def _partial_class(config: PretrainedConfig, last_layer: int) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """The class of a config without what is above a layer, and the config it takes: for some only that of the text part."""
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.models.partial import partial_class

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    own = config if type(skeleton.config) is type(config) else config.get_text_config()
    return partial_class(type(skeleton), last_layer), own


def load_config(path: Path) -> PretrainedConfig:
    """Read the config of a checkpoint folder.

    Raises:
        ModelLoadError: transformers cannot use it, or the model is written in code of its own.
    """
    from transformers import AutoConfig

    with _transformers(path, "config.json"):
        # Said explicitly: left open, transformers asks on the terminal and a worker would wait for ever.
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def _validate_generation(path: Path) -> None:
    """Refuse generation settings that transformers leaves out in silence, or that end its loading with another file's name or none."""
    from transformers import GenerationConfig

    file = path / "generation_config.json"
    if not file.is_file():
        return
    try:
        GenerationConfig.from_dict(read_json(file))
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ModelLoadError(
            f"{file}: these are no generation settings ({one_line(error)}); mend the file, or remove it: it only says how text is sampled"
        ) from error


def _config_errors() -> tuple[type[Exception], ...]:
    """What transformers raises for a config it cannot use."""
    from huggingface_hub.errors import StrictDataclassError

    return OSError, ValueError, KeyError, TypeError, StrictDataclassError


def _validate_weights(path: Path, report: Mapping[str, Any]) -> None:
    missing, mismatched = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
    if missing or mismatched or report["error_msgs"]:
        quantised = read_json(path / "config.json").keys() & {"quantization", "quantization_config"}
        hint = "; its weights are quantised, choose the model they were made from" if quantised else ""
        raise ModelLoadError(
            f"{path}: {len(missing)} weights of the model are missing from the checkpoint (first: {missing[:3]}), "
            f"{len(mismatched)} have another shape (first, with got and expected: {mismatched[:3]}); transformers would fill "
            f"them with random numbers{hint}. Download or convert the checkpoint again {report['error_msgs'] or ''}".rstrip()
        )


def _validate_finite(path: Path, model: PreTrainedModel, spare_embedding: bool) -> None:
    """Look at every weight: one that is not finite shows much later, as a model that seems not to be causal or a loss of NaN."""
    import torch

    spared = model.get_input_embeddings().weight if spare_embedding else None
    ordinary = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    broken = []
    with torch.inference_mode():
        for name, weight in model.named_parameters():
            looked_at = weight.dtype in ordinary and weight.numel() and not weight.is_meta and weight is not spared
            if looked_at and not torch.isfinite(torch.stack(weight.aminmax())).all():
                broken.append((name, weight))
    if broken:
        name, weight = broken[0]
        count = int(weight.numel() - torch.isfinite(weight).sum())
        kind = "NaN" if torch.isnan(weight).any() else "infinite"
        raise ModelLoadError(
            f"{path}: weight {name} is {kind} in {count:,} of {weight.numel():,} places ({len(broken)} weights of the model have such "
            f"values; dtype {str(weight.dtype).removeprefix('torch.')}), expected finite numbers. Download or convert the checkpoint again; float16 cannot "
            "hold what is beyond 65504, so try --dtype bfloat16 or float32 where that was chosen"
        )


def _validate_causal(path: Path, model: PreTrainedModel) -> None:
    from pipeline.models.attention import attention_modules

    causal_at, others = set(), []
    for attention in attention_modules(model):
        if getattr(attention.module, "is_causal", True) is False:
            others.append(attention)
        else:
            causal_at.add(attention.layer)
    # A decoder's cross-attention is not causal either, but has self-attention beside it.
    for attention in others:
        if attention.layer not in causal_at:
            raise ModelLoadError(
                f"{path}: {type(model).__name__} attends to later tokens ({attention.name}.is_causal is False, config "
                f"is_decoder {getattr(model.config, 'is_decoder', None)}); kvpipe needs a decoder that reads left to right"
            )


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The files that a tokenizer is saved as, by name."""
    from kvstore.temporary import temporary_folder

    with temporary_folder("tokenizer") as folder:
        tokenizer.save_pretrained(folder)
        return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Load the fast tokenizer of a checkpoint folder.

    Raises:
        ModelLoadError: the folder holds none, or only a slow one, which gives no byte offsets.
    """
    from transformers import AutoTokenizer

    if not any(found for pattern in VOCABULARY_FILES for found in path.glob(pattern)):
        raise ModelLoadError(f"{path}: there is no tokenizer, expected one of {', '.join(VOCABULARY_FILES)}")
    if problems := damaged(path, TOKENIZER_FILES):
        raise ModelLoadError(f"the tokenizer in {path} cannot be used: " + "; ".join(problems))
    with _transformers(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ModelLoadError(
            f"{path}: {type(tokenizer).__name__} is a slow tokenizer, which gives no offsets; save a tokenizer.json with it"
        )
    return tokenizer


def tokenizer_code(path: Path) -> str | None:
    """What is to be said of a tokenizer whose folder names code of its own for it; None where it names none."""
    settings = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
    auto_map = settings.get("auto_map")
    own = {"AutoTokenizer": auto_map.get("AutoTokenizer")} if isinstance(auto_map, dict) else auto_map
    if names := sorted({str(name) for name in _names_of_code(own)}):
        return (
            f"the tokenizer in {path} names code of its own, {', '.join(names)}, which is not run: its tokenizer.json is used"
        )
    return None


def geometry_mismatch(preset: TeacherPreset, config: PretrainedConfig) -> list[str]:
    """Fields in which a checkpoint's config differs from what its preset says; the checkpoint is right."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    rope = getattr(text, "rope_parameters", None) or {}
    actual = {
        "model_type": text.model_type,
        "num_layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "num_heads": heads,
        "num_kv_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.max_position_embeddings,
        "rope_theta": rope.get("rope_theta"),
    }
    return [
        f"{field}: the checkpoint has {value}, preset {preset.name!r} expected {expected}"
        for field, value in actual.items()
        if value != (expected := getattr(preset.geometry, field))
    ]


def build_student(spec: str, vocab_size: int | None, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast | None]:
    """Make a student in float32: a pretrained one with its tokenizer, or a fresh one (no tokenizer) from `seed`.

    Args:
        spec: a student preset, a file with a fresh config (`.toml` like the presets', or a `.json` like config.json), a
            local folder or a hub id.
        vocab_size: tokens a fresh student must know: those of the store's tokenizer.

    Raises:
        ModelLoadError: there is no such student, its fields are wrong, or its vocabulary is too small.
    """
    preset = _fresh_from_file(Path(spec)) if spec.endswith((".toml", ".json")) else student_preset(spec)
    if preset is not None and preset.config is not None:
        return _fresh_model(preset.name, preset.config, vocab_size, seed), None
    try:
        path = resolve_model(spec).path
    except ModelLoadError as error:
        raise ModelLoadError(f"student {error}. Student presets are {', '.join(student_preset_names())}") from error
    return load_causal_lm(path, dtype="float32"), load_tokenizer(path)


def _fresh_from_file(path: Path) -> StudentPreset:
    try:
        if path.suffix == ".toml":
            return parse_student(path)
        return StudentPreset(name=path.stem, config=read_json(path))
    except FileNotFoundError as error:
        raise ModelLoadError(f"student: there is no file {path}") from error
    except ValueError as error:
        raise ModelLoadError(f"student {path}: {one_line(error)}") from error


def _fresh_model(name: str, fields: Mapping[str, Any], vocab_size: int | None, seed: int) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {"vocab_size": vocab_size, **fields}
    if fields["vocab_size"] is None:
        raise ModelLoadError(f"student {name}: its config has no vocab_size and no tokenizer gives one; add it")
    if vocab_size is not None and fields["vocab_size"] < vocab_size:
        raise ModelLoadError(
            f"student {name}: got vocab_size {fields['vocab_size']}, expected at least {vocab_size}, the size of the "
            "tokenizer; leave vocab_size out and the tokenizer gives it"
        )
    model_type = fields.get("model_type")
    try:
        config = AutoConfig.for_model(**fields)
    except _config_errors() as error:
        raise ModelLoadError(
            f"student {name}: got model_type {model_type!r} and fields {sorted(fields)}: {one_line(error)}"
        ) from error
    defined = {field.name for field in dataclasses.fields(config)} | config.attribute_map.keys() | OPTIONAL_FIELDS
    if unknown := sorted(fields.keys() & config.to_dict().keys() - defined):
        raise ModelLoadError(f"student {name}: {model_type} has no fields {unknown}; it has {sorted(defined)}")
    heads, kv_heads = (getattr(config, field, None) for field in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads:
        raise ModelLoadError(
            f"student {name}: got num_attention_heads {heads}, num_key_value_heads {kv_heads}, expected the first to be a multiple of the "
            f"second; {model_type} takes its own default where one is left out"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # weights are drawn on the CPU; leave the devices' generators alone
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

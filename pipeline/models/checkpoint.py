"""What a model's folder holds: whether it is a checkpoint that can be loaded, and where it is none, what it is instead.

Judges by file names, sizes and headers; knows neither the hub nor what the files mean to a model.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.models.files import irregular, one_line, read_json, stand_in

INDEX = "model.safetensors.index.json"
MODEL_FILES = ("config.json", "generation_config.json")
"""JSON that is read with a model; transformers drops a generation_config.json it cannot read without a word."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
"""JSON that is read with a tokenizer, whose class is chosen by the model's type."""
OPENED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken")
"""Files that are read of a folder."""

FORMATS = (
    ("ggml*.bin", "GGML, of llama.cpp"),
    ("*.gguf", "GGUF, of llama.cpp"),
    ("consolidated*.safetensors", "Mistral's own names"),
    ("tf_model*.h5", "Keras, of TensorFlow"),
    ("*.h5", "Keras, of TensorFlow"),
    ("saved_model.pb", "TensorFlow"),
    ("*.ckpt.index", "TensorFlow"),
    ("flax_model*.msgpack", "Flax"),
    ("*.onnx", "ONNX"),
    ("openvino_model.xml", "OpenVINO"),
    ("*.engine", "TensorRT"),
    ("*.tflite", "TensorFlow Lite"),
    ("*.mlmodel", "Core ML"),
    ("*.mlpackage", "Core ML"),
    ("*.npz", "NumPy archives, as MLX once had them"),
    ("*.nemo", "NeMo"),
    ("*.keras", "Keras"),
    ("*.distcp", "torch.distributed"),
    ("global_step*", "DeepSpeed"),
    ("mp_rank_*", "Megatron or DeepSpeed"),
)
"""Weights of other programs, by what their files are called."""
_PICKLED = ("pytorch_model*.bin", "*.pth", "*.pt", "*.ckpt", "*.bin")
_OF_TRAINING = ("training_args.bin", "optimizer.pt", "scheduler.pt", "optimizer.bin", "scheduler.bin")
_SHOWN = 8


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder that make up its weights, sorted by name; they need not exist.

    Raises:
        ValueError: the index of the weights is damaged.
    """
    index = path / INDEX
    if (path / "model.safetensors").exists() or not index.exists():
        return [path / "model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"{INDEX}: weight_map is not a table of weights and the names of files beside it")
    return sorted(path / name for name in names)


def validate_checkpoint(path: Path) -> list[str]:
    """What is wrong with a checkpoint folder, as far as file names, sizes and headers tell; empty if nothing is."""
    if (path / "adapter_config.json").exists():
        return [_adapter(path)]
    if problems := damaged(path, MODEL_FILES):
        return problems
    if not (path / "config.json").exists():
        return [_no_config(path)]
    try:
        files = weight_files(path)
    except ValueError as error:
        return [f"a JSON file is damaged ({error}); download it again"]
    missing = [file.name for file in files if not file.exists()]
    problems = [_missing(path, missing)] if missing else []
    return problems + [problem for file in files if file.exists() and (problem := _damaged_weights(file)) is not None]


def damaged(path: Path, names: tuple[str, ...]) -> list[str]:
    """What is wrong with the files of a folder that are read, and inside those of these names, of which none need exist."""
    odd = [what for pattern in OPENED for file in sorted(path.glob(pattern)) if (what := irregular(file)) is not None]
    if odd:
        return [f"{'; '.join(odd)}; copy or download the folder again"]
    for name in names:
        if (path / name).exists():
            try:
                read_json(path / name)
            except ValueError as error:
                return [f"a JSON file is damaged ({error}); download it again"]
    return []


def _adapter(path: Path) -> str:
    try:
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
    except ValueError as error:
        return f"a JSON file is damaged ({error}); download it again"
    return (
        f"it is an adapter (adapter_config.json, of LoRA or the like), made for {base or 'a model it does not name'}, and no model; load it "
        "with peft, call merge_and_unload() and save_pretrained(), and name that folder, or name the model itself"
    )


def _no_config(path: Path) -> str:
    entries = sorted(entry.name for entry in path.iterdir())
    found = f"it has no config.json, only {entries[:_SHOWN]}"
    if (other := other_format(path)) is not None:
        return f"{found}: {other}"
    within = sorted(file.parent.relative_to(path) for depth in ("*", "*/*") for file in path.glob(f"{depth}/config.json"))
    if within:
        return f"{found}; did you mean the folder {', '.join(str(path / folder) for folder in within[:3])}?"
    return found


def _missing(path: Path, missing: list[str]) -> str:
    """Why weights are not here: never begun, another format, or a download that was not finished."""
    others = sorted(file.name for file in path.glob("*.safetensors"))
    if (path / INDEX).exists():
        return f"weight files are missing: {missing}; still downloading? 'hf download' resumes"
    shards = [name for name in others if "-of-" in name]
    if shards:
        last = shards[0].rpartition("-of-")[2].removesuffix(".safetensors")
        total = int(last) if last.isdecimal() else len(shards)
        absent = f"{INDEX}, which lists them, is missing" + (
            f", and so are {total - len(shards)} of them" if total > len(shards) else ""
        )
        return (
            f"its weights lie in {max(total, len(shards))} files ({shards[0]} ...), but {absent}; download what is missing too"
        )
    if (other := other_format(path)) is not None:
        return other
    if others:
        return f"weight files are missing: {missing}; it has {others}, which transformers does not look for: rename or convert them"
    return f"weight files are missing: {missing}; still downloading? 'hf download' resumes"


def other_format(path: Path) -> str | None:
    """What a folder without safetensors of transformers has instead; None where that is not known."""
    for pattern in _PICKLED:
        if any(file.name not in _OF_TRAINING and not file.match("ggml*.bin") for file in path.glob(pattern)):
            return (
                f"it has pickled weights ({pattern}) but no *.safetensors, and kvpipe never unpickles; load it once with "
                "transformers and write it again with save_pretrained"
            )
    for pattern, what in FORMATS:
        if (file := next(iter(sorted(path.glob(pattern))), None)) is not None:
            return (
                f"its weights are in another program's format ({file.name}: {what}), expected *.safetensors as transformers writes them; name the "
                "repository or folder they were converted from, or convert them back"
            )
    return None


def _damaged_weights(file: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            return None
    except SafetensorError as error:
        with file.open("rb") as stream:
            content = stream.read(256)
        what = stand_in(content) if content else None
        return f"{file.name} ({file.stat().st_size} bytes) {what or f'is damaged or still downloading ({one_line(error)})'}"
    except OSError as error:
        return f"{file.name} cannot be read ({one_line(error)})"

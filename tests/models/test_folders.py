"""What is said of a model's folder that cannot be used: the cause, the file and the place, whoever asks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.models.load import ModelLoadError, build_student, load_causal_lm, load_config, load_tokenizer, tokenizer_code
from pipeline.models.probe import CaptureError, probe_causal
from pipeline.models.resolve import resolve_model
from tests import processes
from tests.checkpoints import save_checkpoint, tiny_model

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen2", num_hidden_layers=2)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    tiny_model("qwen2").save_pretrained(folder, max_shard_size="200KB")
    return folder


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def instead(*names: str) -> Damage:
    """Files of these names in place of the weights."""

    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        for name in names:
            (folder / name).write_bytes(b"GGUF")

    return damage


def nest(folder: Path, name: str) -> None:
    """Put all of a folder's files into a folder inside it."""
    (folder / name).mkdir()
    for file in [path for path in folder.iterdir() if path.is_file()]:
        file.rename(folder / name / file.name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(instead("model-q4.gguf"), r"model-q4.gguf: GGUF, of llama.cpp\), expected \*.safetensors", id="gguf"),
        pytest.param(instead("tf_model.h5"), "tf_model.h5: Keras, of TensorFlow", id="tensorflow"),
        pytest.param(instead("flax_model.msgpack"), "flax_model.msgpack: Flax", id="flax"),
        pytest.param(instead("model.onnx", "training_args.bin"), "model.onnx: ONNX", id="onnx"),
        pytest.param(instead("weights.npz"), "as MLX once had them", id="mlx"),
        pytest.param(instead("consolidated.safetensors"), "Mistral's own names", id="mistral"),
        pytest.param(instead("model.gguf", "pytorch_model.bin"), r"pickled weights \(pytorch_model\*.bin\)", id="pickle"),
        pytest.param(instead("consolidated.00.pth"), r"pickled weights \(\*.pth\)", id="pth"),
        pytest.param(
            instead("weights.safetensors"), r"it has \['weights.safetensors'\], which transformers does not", id="name"
        ),
        pytest.param(instead(), r"weight files are missing: \['model.safetensors'\]; still downloading\?", id="config-only"),
        pytest.param(
            lambda folder: (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}'),
            r"it is an adapter \(adapter_config.json, of LoRA or the like\), made for some/base, and no model; .*merge_and_unload",
            id="adapter",
        ),
        pytest.param(
            lambda folder: (folder / "config.json").unlink(), r"no config.json, only \['generation_config.json'", id="no-config"
        ),
        pytest.param(
            lambda folder: nest(folder, "checkpoint-5"), r"did you mean the folder .*/checkpoint-5\?", id="folder-above"
        ),
        pytest.param(
            lambda folder: (folder / "model.safetensors").write_text(
                "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
            ),
            r"model.safetensors \(\d+ bytes\) is a pointer of Git LFS, not the file itself; fetch it with 'git lfs pull'",
            id="lfs",
        ),
        pytest.param(
            lambda folder: (folder / "model.safetensors").write_text("<!DOCTYPE html><html>Sign in</html>"),
            r"model.safetensors \(\d+ bytes\) is a web page",
            id="web-page",
        ),
        pytest.param(
            lambda folder: [(folder / "model.safetensors").unlink(), (folder / "model.safetensors").symlink_to("../blobs/abc")],
            r"model.safetensors is a link to ../blobs/abc, which is not there",
            id="dangling",
        ),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_called_what_it_is(folder: Path, damage: Damage, message: str) -> None:
    damage(folder)
    for load in (
        lambda: resolve_model(str(folder)),
        lambda: load_causal_lm(folder),
        lambda: build_student(str(folder), 258, 0),
    ):
        with pytest.raises(ModelLoadError, match=message) as caught:
            load()
        assert "\n" not in str(caught.value)


def test_shards_say_whether_the_index_or_a_shard_is_missing_or_cut(sharded: Path, tmp_path: Path) -> None:
    shards = sorted(path.name for path in sharded.glob("model-*.safetensors"))

    def copy(name: str) -> Path:
        return Path(shutil.copytree(sharded, tmp_path / name))

    without_index = copy("index")
    (without_index / "model.safetensors.index.json").unlink()
    without_both = copy("both")
    for name in ("model.safetensors.index.json", shards[1]):
        (without_both / name).unlink()
    cut = copy("cut")
    (cut / shards[1]).write_bytes((cut / shards[1]).read_bytes()[:-5])
    missing = copy("missing")
    (missing / shards[1]).unlink()
    outside = copy("outside")
    index = outside / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shards[1], f"../cut/{shards[1]}"))
    for place, message in (
        (without_index, rf"lie in {len(shards)} files \({shards[0]} ...\), but model.safetensors.index.json, .*is missing"),
        (without_both, rf"lie in {len(shards)} files .* is missing, and so are 1 of them; download what is missing too"),
        (cut, rf"{shards[1]} \(\d+ bytes\) is damaged or still downloading"),
        (missing, rf"weight files are missing: \['{shards[1]}'\]"),
        (outside, r"model.safetensors.index.json: weight_map is not a table of weights and the names of files beside it"),
    ):
        with pytest.raises(ModelLoadError, match=message):
            resolve_model(str(place))


@pytest.mark.parametrize(
    "auto_map", [{"AutoTokenizer": ["code.Slow", None]}, {"AutoTokenizer": "code.Slow"}, ["code.Slow", None]]
)
def test_code_that_a_tokenizer_names_is_said_not_to_be_run(folder: Path, auto_map: Any) -> None:
    settings = folder / "tokenizer_config.json"
    record = json.loads(settings.read_text()) if settings.exists() else {}
    assert tokenizer_code(folder) is None
    settings.write_text(json.dumps({**record, "auto_map": auto_map}))
    said = tokenizer_code(folder)
    assert said is not None
    assert "code of its own, code.Slow, which is not run" in said


DAMAGED = {
    "cut": (b'{"a": \n  ', r"JSONDecodeError in {file}, line 2, column 3"),
    "empty": (b"", r"{file} is empty"),
    "list": (b"[1]", r"{file}: got a JSON list, expected an object"),
    "latin1": (b'{"a": "\xff"}', r"{file}: byte 7 is 0xff, which is no UTF-8"),
    "utf16": ('{"a": 1}'.encode("utf-16"), r"{file}: is text in UTF-16, expected UTF-8"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, r"{file}: its values are nested too deep"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", r"{file} is a pointer of Git LFS"),
}


@pytest.mark.parametrize("how", DAMAGED)
@pytest.mark.parametrize(
    "file",
    [
        *("config.json", "generation_config.json", "adapter_config.json", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    ],
)
def test_damaged_json_is_named_with_the_place(folder: Path, file: str, how: str) -> None:
    content, message = DAMAGED[how]
    if file.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(content)
    with pytest.raises(ModelLoadError, match=message.format(file=file)) as caught:
        build_student(str(folder), vocab_size=258, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors"])
@pytest.mark.parametrize(
    ("put", "message"),
    [
        pytest.param(os.mkfifo, r"{file} is a pipe or a device, expected a file", id="pipe"),
        pytest.param(Path.mkdir, r"{file} is a folder, expected a file", id="folder"),
        pytest.param(lambda path: path.symlink_to("gone"), r"{file} is a link to gone, which is not there", id="dangling"),
    ],
)
def test_what_is_no_file_is_named_and_not_waited_for(folder: Path, file: str, put: Damage, message: str) -> None:
    (folder / file).unlink()
    put(folder / file)
    with pytest.raises(ModelLoadError, match=message.format(file=file)):
        build_student(str(folder), vocab_size=258, seed=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_weight_that_is_not_finite_is_named(folder: Path, name: str, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    kind = "NaN" if value != value else "infinite"
    with pytest.raises(ModelLoadError, match=rf"weight {name} is {kind} in 1 of [\d,]+ places"):
        load_causal_lm(folder)


def test_numbers_that_overflow_are_not_called_not_causal() -> None:
    model = tiny_model("qwen2", dtype=torch.float16)
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.v_proj.weight").fill_(6e4)
        model.get_parameter("model.layers.1.input_layernorm.weight").fill_(6e4)
    with pytest.raises(CaptureError, match=r"layer 1 .*not finite .*float16.*numbers overflow\? Try --dtype bfloat16"):
        probe_causal(model)


def test_a_broken_row_of_the_embedding_is_left_to_the_samples_unless_the_probe_meets_it(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][11] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"weight model.embed_tokens.weight is NaN in 64 of"):
        build_student(str(folder), vocab_size=258, seed=0)
    with pytest.raises(CaptureError, match=r"the embedding of tokens \[11\] is NaN or infinite"):
        probe_causal(load_causal_lm(folder, spare_embedding=True))


@pytest.mark.parametrize(
    ("file", "auto_map", "load"),
    [
        pytest.param("config.json", {"AutoConfig": "code.Config"}, load_config, id="config"),
        pytest.param("config.json", {"AutoConfig": "code.Config"}, load_causal_lm, id="model"),
        pytest.param("tokenizer_config.json", {"AutoTokenizer": ["code.Slow", None]}, load_tokenizer, id="tokenizer"),
    ],
)
def test_code_of_a_checkpoint_is_never_recommended(
    folder: Path, file: str, auto_map: dict[str, object], load: Callable[[Path], object]
) -> None:
    record = json.loads((folder / file).read_text())
    named = {"model_type": "own_kind"} if file == "config.json" else {"tokenizer_class": "OwnTokenizer"}
    (folder / file).write_text(json.dumps({**record, **named, "auto_map": auto_map}))
    (folder / "tokenizer.json").rename(folder / "own.tiktoken")
    with pytest.raises(ModelLoadError, match=r"code that comes with the checkpoint, code\.\w+\. kvpipe runs no code") as caught:
        load(folder)
    assert "trust_remote_code" not in str(caught.value)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_quantised_weights_are_called_so(folder: Path, method: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": method, "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(ModelLoadError, match=rf"weights are quantised, by {method}: .*choose the model they were made from"):
        load_causal_lm(folder)


@pytest.mark.slow
def test_every_command_that_takes_a_model_gives_the_same_cause(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    (tmp_path / "text.txt").write_text("some text to read")
    data = ("--data", tmp_path / "text.txt", "--out", tmp_path / "out")
    for arguments in (
        ("extract", "--teacher", folder, *data),
        ("extract", "--teacher", checkpoint, "--student", folder, *data),
        ("plan", "--teacher", folder, *data),
        ("doctor", "--teacher", folder, "--student", checkpoint),
        ("doctor", "--teacher", checkpoint, "--student", folder),
    ):
        done = processes.kvpipe(*map(str, arguments), environment={"COLUMNS": "400"})
        assert done.returncode == 1, arguments
        assert "it is an adapter (adapter_config.json" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("3f2a9c01\n".encode("utf-16"), "is text in UTF-16, expected UTF-8", id="utf-16"),
        pytest.param("3f2a9c01\n".encode("utf-16-le"), "byte 1 is zero, expected text in UTF-8", id="no-mark"),
        pytest.param("3f2a9c01\n".encode("utf-32"), "is text in UTF-32, expected UTF-8", id="utf-32"),
        pytest.param(b"# l\xf6schen\n3f2a9c01\n", "byte 3 is 0xf6, which is no UTF-8", id="latin-1"),
        pytest.param(b"\x89PNG\r\n\x1a\n\0", "expected text in UTF-8; is it a binary file", id="binary"),
        pytest.param(None, "Is a directory", id="folder"),
    ],
)
def test_a_file_of_ids_that_is_no_text_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    ids = tmp_path / "remove.txt"
    ids.mkdir() if content is None else ids.write_bytes(content)
    for arguments in (("drop", "no-store", "--ids", ids), ("doctor", "--teacher", "x", "--student", "y", "--text", ids)):
        if content is None and arguments[0] == "doctor":
            continue
        done = processes.kvpipe(*map(str, arguments), environment={"COLUMNS": "400"})
        assert done.returncode == 1
        assert message in done.stderr
        assert str(ids) in done.stderr
        assert "Traceback" not in done.stderr

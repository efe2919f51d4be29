"""One rule for the same tokenizer, by the ids that texts get, and what is said where they differ."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.align.same_tokens import tokenizer_differences
from pipeline.align.token_bytes import TokenBytes
from pipeline.models.load import load_tokenizer
from tests import processes
from tests.checkpoints import END_OF_TEXT, PADDING, save_checkpoint

CORPUS = ["the cat sat on the mat and the dog sat on the log", "12 and 34 are numbers, 1234 too", "don't isn't won't"] * 20


def trained(**over: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with merges; `over` are parts of its backend."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT, PADDING],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    for part, value in over.items():
        setattr(backend, part, value)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT, pad_token=PADDING)


def changed(change: Callable[[dict[str, Any]], object]) -> PreTrainedTokenizerFast:
    """The same with another description."""
    description = json.loads(trained().backend_tokenizer.to_str())
    change(description)
    backend = Tokenizer.from_str(json.dumps(description))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT, pad_token=PADDING)


def with_tokens(*tokens: str, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = trained()
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    if special:
        tokenizer.add_special_tokens(special)
    return tokenizer


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(trained, id="again"),
        pytest.param(lambda: with_tokens(pad_token=END_OF_TEXT), id="pad"),
        pytest.param(lambda: with_tokens(pad_token="<new>"), id="new-pad"),
        pytest.param(lambda: with_tokens(eos_token=PADDING), id="eos"),
        pytest.param(lambda: trained(decoder=decoders.Fuse()), id="decoder"),
        pytest.param(lambda: trained(post_processor=processors.ByteLevel(trim_offsets=True)), id="offsets"),
        pytest.param(
            lambda: trained(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False)])),
            id="written-otherwise",
        ),
        pytest.param(lambda: changed(lambda d: d.update(padding=None, truncation=None)), id="truncation"),
    ],
)
def test_tokenizers_that_give_equal_ids_are_the_same(other: Callable[[], PreTrainedTokenizerFast]) -> None:
    one, second = trained(), other()
    assert tokenizer_differences(one, second) == []
    assert tokenizer_differences(second, one) == []
    assert TokenBytes(one).same_as(TokenBytes(one))


def test_use_leaves_tokenizers_the_same() -> None:
    one, other = trained(), trained()
    other(["some text", "more"], truncation=True, max_length=4, padding=True)
    assert tokenizer_differences(one, other) == []


def swap_merges(description: dict[str, Any]) -> None:
    merges = description["model"]["merges"]
    merges[0], merges[-1] = merges[-1], merges[0]


def swap_ids(description: dict[str, Any]) -> None:
    vocabulary = description["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        pytest.param(lambda: with_tokens("<|im_end|>"), r"'<\|im_end\|>' is token none against \d+", id="added-token"),
        pytest.param(lambda: changed(swap_ids), r"'b' is token \d+ against \d+|'a' is token \d+ against \d+", id="ids"),
        pytest.param(lambda: changed(swap_merges), r"merges, the first that differ being \[", id="merges"),
        pytest.param(
            lambda: trained(normalizer=normalizers.NFC()), r" becomes \[.*parts that differ: normalizer", id="unicode"
        ),
        pytest.param(
            lambda: trained(normalizer=normalizers.Lowercase()), r"The quick .*parts that differ: normalizer", id="case"
        ),
        pytest.param(
            lambda: trained(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
            "parts that differ: pre_tokenizer",
            id="space",
        ),
        pytest.param(
            lambda: trained(
                pre_tokenizer=pre_tokenizers.Sequence(
                    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
                )
            ),
            "'Numbers: 7, .*parts that differ: pre_tokenizer",
            id="digits",
        ),
        pytest.param(
            lambda: trained(
                post_processor=processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[(END_OF_TEXT, 0)])
            ),
            r"becomes \[.*parts that differ: post_processor",
            id="beginning",
        ),
    ],
)
def test_tokenizers_that_give_other_ids_say_in_what(other: Callable[[], PreTrainedTokenizerFast], said: str) -> None:
    one, second = trained(), other()
    assert re.search(said, "; ".join(tokenizer_differences(one, second)))
    assert tokenizer_differences(second, one)
    assert not TokenBytes(one).same_as(TokenBytes(second))


def test_one_tokenizer_file_under_two_types_of_model_is_two_tokenizers_and_says_why(tmp_path: Path) -> None:
    qwen, llama = (load_tokenizer(save_checkpoint(tmp_path / kind, kind)) for kind in ("qwen2", "llama"))
    assert (tmp_path / "qwen2/tokenizer.json").read_bytes() == (tmp_path / "llama/tokenizer.json").read_bytes()
    said = "; ".join(tokenizer_differences(llama, qwen))
    assert "although their tokenizer.json is the same" in said
    assert f"transformers loads them as {type(llama).__name__} against {type(qwen).__name__}" in said
    assert "becomes [" in said


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param({"pad_token": END_OF_TEXT}, id="pad"),
        pytest.param({"pad_token": "<padding>", "eos_token": PADDING}, id="new-pad-and-end", marks=pytest.mark.slow),
    ],
)
def test_a_copy_of_the_teacher_with_another_special_token_is_a_student_everywhere(
    tmp_path: Path, setting: dict[str, str]
) -> None:
    teacher = save_checkpoint(tmp_path / "teacher", "qwen2", num_hidden_layers=2, initializer_range=0.01)
    student = Path(shutil.copytree(teacher, tmp_path / "student"))
    file = student / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **setting}))
    (tmp_path / "text.txt").write_text("\n\n".join(f"{line} {number}" for number, line in enumerate(CORPUS)))
    store, run = str(tmp_path / "kv"), str(tmp_path / "run")
    for arguments in (
        (
            "extract",
            "--teacher",
            teacher,
            "--student",
            student,
            "--data",
            tmp_path / "text.txt",
            "--out",
            store,
            "--codec",
            "raw",
        ),
        ("doctor", "--teacher", teacher, "--student", student, "--store", store),
        ("train", "--store", store, "--student", student, "--out", run, "--steps", "1", "--batch-size", "1"),
    ):
        done = processes.kvpipe(*map(str, arguments))
        assert done.returncode == 0, done.stderr


def test_another_tokenizer_is_refused_alike_by_extract_and_train(tmp_path: Path) -> None:
    teacher = save_checkpoint(tmp_path / "teacher", "llama", num_hidden_layers=2, initializer_range=0.01)
    student = save_checkpoint(tmp_path / "student", "qwen2", num_hidden_layers=2)
    (tmp_path / "text.txt").write_text("\n\n".join(CORPUS))
    extract = ("extract", "--teacher", teacher, "--data", tmp_path / "text.txt", "--codec", "raw")
    refused = processes.kvpipe(*map(str, (*extract, "--student", student, "--out", tmp_path / "baked")))
    assert processes.kvpipe(*map(str, (*extract, "--out", tmp_path / "kv"))).returncode == 0
    trained_on = processes.kvpipe(
        *map(str, ("train", "--store", tmp_path / "kv", "--student", student, "--out", tmp_path / "run"))
    )
    for done in (refused, trained_on):
        assert done.returncode == 1
        assert "has another tokenizer" in done.stderr.replace("\n", " ")
        assert "Qwen2Tokenizer against TokenizersBackend" in done.stderr.replace("\n", " ")
        assert "Traceback" not in done.stderr

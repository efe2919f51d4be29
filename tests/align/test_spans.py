"""Which teacher tokens lie under each student token: real tokenizers, trained here, against a byte by byte reference."""

from __future__ import annotations

import functools
import json
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.align import build_safe_linear_indices, resample_kv_with_interpolation, safe_time_resample
from pipeline.align.spans import SpanMap, align_sample, align_tokens, linear_spans, nearest_spans
from pipeline.align.token_bytes import TokenBytes
from tests.checkpoints import byte_tokenizer

ODD = [
    "naïve café",
    "日本語のテキスト",
    "🙂👩‍👩‍👧",
    "\t\tx\r\ny",
    "Größe  und",
    "a\u0301",
    "\u00a0…",
    "مرحبا",
    "1234567",
    "\n\n\n",
]


def _source(first: int) -> list[str]:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[first : first + 12]
    return [line for file in files for line in file.read_text().splitlines(keepends=True)] + ODD * 3


def _byte_level(vocab_size: int, lines: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def _sentencepiece(vocab_size: int, lines: list[str]) -> PreTrainedTokenizerFast:
    """As Llama 2's: a space before every text, bytes for what the vocabulary lacks, a beginning of text."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.train_from_iterator(
        [line for line in lines if line.isascii()],
        trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<unk>", "<s>", "</s>", *fallback], show_progress=False),
    )
    tokenizer = _without_added(tokenizer, keep=("<unk>", "<s>", "</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _without_added(tokenizer: Any, keep: tuple[str, ...]) -> Any:
    """The same with all others in the vocabulary alone, as where sentencepiece keeps its bytes."""
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] in keep]
    return Tokenizer.from_str(json.dumps(description))


@functools.cache
def side(name: str) -> TokenBytes:
    return TokenBytes(
        {
            "large": lambda: _byte_level(3000, _source(0)),
            "small": lambda: _byte_level(500, _source(40)),
            "bytes": byte_tokenizer,
            "sentencepiece": lambda: _sentencepiece(1500, _source(20)),
        }[name]()
    )


def dense(teacher: list[bytes], student: list[bytes]) -> np.ndarray:
    """Weight of every teacher token in every student token, by looking at every byte."""
    owners = [number for number, written in enumerate(teacher) for _ in written]
    ends = np.cumsum([len(written) for written in teacher])
    weights = np.zeros((len(student), len(teacher)))
    at = 0
    for row, written in enumerate(student):
        for byte in range(at, at + len(written)):
            if ends[owners[byte]] <= at + len(written):
                weights[row, owners[byte]] += 1
        at += len(written)
    total = weights.sum(axis=1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def to_dense(spans: SpanMap, num_teacher: int) -> np.ndarray:
    weights = np.zeros((len(spans.indptr) - 1, num_teacher))
    for row, (first, last) in enumerate(zip(spans.indptr, spans.indptr[1:], strict=False)):
        weights[row, spans.indices[first:last]] = spans.weights[first:last]
    return weights


PAIRS = [("large", "small"), ("small", "large"), ("large", "bytes"), ("bytes", "large"), ("bytes", "small")]
documents = st.lists(
    st.one_of(st.sampled_from([*ODD, "def f(self):", "    return ", " the", "x"]), st.text(max_size=8)), max_size=12
)


@settings(max_examples=400, deadline=None)
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
@given(parts=documents)
def test_spans_equal_a_dense_reference_byte_by_byte(teacher: str, student: str, parts: list[str]) -> None:
    """Invariants 11, 13, 14, 17 and 18."""
    text = "".join(parts).encode(errors="ignore").decode()
    ours, theirs = side(student), side(teacher)
    teacher_ids, student_ids = theirs.encode(text), ours.encode(text)
    spans = align_tokens(theirs, ours, teacher_ids, student_ids)
    expected = dense(theirs.write(teacher_ids), ours.write(student_ids))
    np.testing.assert_allclose(to_dense(spans, len(teacher_ids)), expected, atol=1e-6)
    assert spans.weights.min(initial=1.0) > 0
    np.testing.assert_allclose(expected.sum(axis=1)[spans.kept], 1.0)
    firsts = spans.indices[spans.indptr[:-1][spans.kept]]
    assert (np.diff(firsts) >= 0).all(), "time goes forwards"
    last = align_tokens(theirs, ours, teacher_ids, student_ids, "last")
    assert (last.kept == spans.kept).all()
    assert (last.indices == spans.indices[spans.indptr[1:][spans.kept] - 1]).all()
    if teacher == "bytes":
        assert spans.coverage == 1.0, "invariant 15: a byte always ends inside"


@settings(max_examples=300, deadline=None)
@given(
    parts=documents,
    teacher=st.sampled_from(["large", "small", "bytes", "sentencepiece"]),
    student=st.sampled_from(["large", "small", "bytes", "sentencepiece"]),
)
def test_a_sample_is_written_again_in_the_students_tokens(parts: list[str], teacher: str, student: str) -> None:
    text = "x" + "".join(parts).encode(errors="ignore").decode().replace("▁", "")
    theirs, ours = side(teacher), side(student)
    teacher_ids = theirs.tokenizer(text)["input_ids"]
    aligned = align_sample(theirs, ours, teacher_ids)
    np.testing.assert_array_equal(aligned.input_ids, ours.tokenizer(text)["input_ids"])
    assert len(aligned.spans.indptr) == len(aligned.source) + 1 == len(aligned.input_ids) + 1
    if teacher == student:
        assert to_dense(aligned.spans, len(teacher_ids)).tolist() == np.eye(len(teacher_ids)).tolist()
        return
    content = text.encode()
    starts = np.cumsum([0, *map(len, theirs.write(teacher_ids))])
    shift = int(starts[-1]) - len(content)  # a space of sentencepiece's own
    ours_written = ours.write(aligned.input_ids)
    ends = np.cumsum(list(map(len, ours_written)))
    ends -= int(ends[-1]) - len(content)
    for row in range(len(aligned.input_ids)):
        used = aligned.spans.indices[aligned.spans.indptr[row] : aligned.spans.indptr[row + 1]]
        if ours_written[row]:
            assert all(starts[token + 1] - shift <= ends[row] for token in used), "no teacher token ends beyond"
            assert starts[aligned.source[row] + 1] - shift >= ends[row]


def test_equal_tokenizers_are_recognised_however_large_their_embeddings(tmp_path: Path) -> None:
    """Invariant 12."""
    side("large").tokenizer.save_pretrained(tmp_path)
    again = TokenBytes(PreTrainedTokenizerFast.from_pretrained(tmp_path))
    assert again.same_as(side("large"))
    assert not side("small").same_as(side("large"))
    ids = again.encode("def f(x):\n    return x")
    spans = align_tokens(side("large"), again, ids, ids)
    assert (spans.indices == np.arange(len(ids))).all()
    assert (spans.weights == 1).all()


def test_a_sample_cut_inside_a_character_keeps_its_whole_ones() -> None:
    theirs, ours = side("bytes"), side("large")
    ids = theirs.encode("日本語")[1:-1]
    aligned = align_sample(theirs, ours, ids)
    assert ours.tokenizer.decode(aligned.input_ids) == "本"
    assert aligned.source[-1] == 4, "the third byte of the middle character"
    assert aligned.spans.indices.min() >= 2


def test_ends_of_text_are_each_others_and_do_not_change_the_rest() -> None:
    """Invariant 16."""
    llama, gpt = side("sentencepiece"), side("large")
    bos, eos = llama.tokenizer.bos_token_id, llama.tokenizer.eos_token_id
    plain = align_sample(llama, gpt, llama.encode("def f(x)"))
    framed = align_sample(llama, gpt, [bos, *llama.encode("def f(x)").tolist(), eos])
    assert framed.input_ids.tolist() == [*gpt.encode("def f(x)"), gpt.tokenizer.eos_token_id]
    inner = to_dense(framed.spans, 2 + len(llama.encode("def f(x)")))[:-1, 1:-1]
    np.testing.assert_array_equal(inner[1:], to_dense(plain.spans, inner.shape[1])[len(plain.input_ids) - len(inner) + 1 :])
    assert framed.source[-1] == len(llama.encode("def f(x)")) + 1
    back = align_sample(gpt, llama, [*gpt.encode("def f(x)").tolist(), gpt.tokenizer.eos_token_id])
    assert (back.input_ids[0], back.input_ids[-1]) == (bos, eos)
    assert not back.spans.kept[0], "there is no beginning of text on the teacher's side"


def test_special_tokens_both_have_stay_and_others_are_refused() -> None:
    def chat(markers: list[str]) -> TokenBytes:
        tokenizer = _byte_level(400, _source(0))
        tokenizer.add_special_tokens({"additional_special_tokens": markers})
        return TokenBytes(tokenizer)

    theirs, ours, other = chat(["<|im_start|>", "<|im_end|>"]), chat(["<|im_end|>", "<|im_start|>"]), side("bytes")
    ids = theirs.encode("<|im_start|>user\nnaïve?<|im_end|>\n")
    aligned = align_sample(theirs, ours, ids)
    assert ours.tokenizer.decode(aligned.input_ids) == "<|im_start|>user\nnaïve?<|im_end|>\n"
    assert aligned.input_ids[0] == ours.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert aligned.source.tolist()[0] == 0
    with pytest.raises(ValueError, match=r"has no special token <\|im_end\|>, <\|im_start\|>, which the sample has"):
        align_sample(theirs, other, ids)


def test_tokenizers_that_change_text_or_cannot_say_what_they_write_are_refused() -> None:
    lower = _byte_level(400, _source(0))
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match=r"changes the text from byte 0 on: got b'def f' of b'DEF F'"):
        align_sample(side("bytes"), TokenBytes(lower), side("bytes").encode("DEF F"))
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match=r"its parts are none, expected a byte-level tokenizer"):
        TokenBytes(words)
    with pytest.raises(ValueError, match=r"write other texts from byte 1 on"):
        align_tokens(side("bytes"), side("bytes"), [65, 66], [65, 67])
    with pytest.raises(ValueError, match=r"token id 999999 is none of its"):
        side("bytes").write([999_999])
    with pytest.raises(ValueError, match=r"expected a fast tokenizer"):
        TokenBytes(object())


def test_rows_are_weighted_means_with_gradients_and_zero_without_a_counterpart() -> None:
    spans = SpanMap(
        indptr=np.array([0, 2, 2, 3]), indices=np.array([0, 1, 3]), weights=np.array([0.25, 0.75, 1.0], dtype=np.float32)
    )
    x = torch.randn(4, 2, 3, dtype=torch.bfloat16).requires_grad_()
    out = spans.apply(x)
    expected = torch.stack([0.25 * x[0].float() + 0.75 * x[1].float(), torch.zeros(2, 3), x[3].float()])
    torch.testing.assert_close(out, expected.to(torch.bfloat16))
    out.float().sum().backward()
    assert x.grad is not None
    assert x.grad[2].abs().sum() == 0
    assert (spans.kept.tolist(), spans.coverage) == ([True, False, True], pytest.approx(2 / 3))


@pytest.mark.parametrize(("num_teacher", "num_student"), [(1, 4), (5, 1), (7, 7), (5, 12), (12, 5)])
def test_nearest_spans_are_nearest_resampling(num_teacher: int, num_student: int) -> None:
    x = torch.randn(num_teacher, 2, 3, generator=torch.Generator().manual_seed(0))
    indices = build_safe_linear_indices(1, num_teacher, num_student)
    expected = safe_time_resample(x.transpose(0, 1)[None], indices)[0].transpose(0, 1)
    assert torch.equal(nearest_spans(num_teacher, num_student).apply(x), expected)


@pytest.mark.parametrize(("num_teacher", "num_student"), [(1, 4), (5, 1), (7, 7), (5, 12), (12, 5), (13, 4)])
def test_linear_spans_are_linear_interpolation(num_teacher: int, num_student: int) -> None:
    x = torch.randn(num_teacher, 2, 3, dtype=torch.float64)
    expected = resample_kv_with_interpolation(x.transpose(0, 1)[None], num_student)[0].transpose(0, 1)
    torch.testing.assert_close(linear_spans(num_teacher, num_student).apply(x), expected, atol=1e-6, rtol=1e-6)

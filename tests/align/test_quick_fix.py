"""The quick-fix reference, word for word but for the import lines: its snippets run, and its names and edges hold."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.nn import functional

from pipeline import align
from pipeline.align import KVDimensionProjector, build_safe_linear_indices, resample_kv_with_interpolation, safe_time_resample

GIVEN = {
    "torch": torch,
    "F": functional,
    "device": "cpu",
    "B": 4,
    "T_in": 80,
    "T_out": 50,
    "T_student": 50,
    "extract_teacher_kv": lambda *_: (torch.randn(4, 12, 80, 128), torch.randn(4, 12, 80, 128)),
    "teacher_k": torch.randn(4, 12, 80, 128),
    "student_k": torch.randn(4, 2, 50, 128),
    "student_v": torch.randn(4, 2, 50, 128),
    "teacher_kv": torch.randn(4, 12, 80, 128),
    "x": torch.randn(4, 2, 80, 128),
}
"""What the reference takes as given."""

SNIPPETS = {
    "heads": """
kv_projector = KVProjector(Ht=12, Hs=2, Dt=128, Ds=128).to(device)
k_teacher = torch.randn(4, 12, 50, 128)
v_teacher = torch.randn(4, 12, 50, 128)
k_proj, v_proj = kv_projector(k_teacher, v_teacher)  # [B, 2, T, 128]
assert k_proj.shape == v_proj.shape == (4, 2, 50, 128)
""",
    "time": """
indices = build_safe_linear_indices(B=4, T_in=80, T_out=50, device=device)
x_resampled = safe_time_resample(x, indices)
assert x_resampled.shape == (4, 2, 50, 128)
""",
    "by hand": """
Ht = teacher_k.shape[1]
Hs = student_k.shape[1]
Dt = teacher_k.shape[-1]
Ds = student_k.shape[-1]
kv_projector = KVProjector(Ht, Hs, Dt, Ds).to(device)
teacher_k, teacher_v = extract_teacher_kv(...)
k_proj, v_proj = kv_projector(teacher_k, teacher_v)
k_aligned = resample_kv_with_interpolation(k_proj, T_student)
v_aligned = resample_kv_with_interpolation(v_proj, T_student)
loss_k = F.mse_loss(k_aligned, student_k)
loss_v = F.mse_loss(v_aligned, student_v)
""",
    "in one": """
projector = KVDimensionProjector(
    teacher_configs={"Qwen2-7B": {"d_model": 3584, "num_layers": 28}},
    student_d_model=2048,
    student_num_kv_heads=2,
    mlp_ratio=1.0
)
teacher_k, teacher_v = extract_teacher_kv(...)
k_aligned, v_aligned = projector.project_teacher_kv(
    "Qwen2-7B", teacher_k, teacher_v
)
assert k_aligned.shape == v_aligned.shape == (4, 2, 80, 128)
""",
    "segments": """
resampled_kv = resample_kv_with_interpolation(
    teacher_kv,
    50,
    teacher_segments=None,
    student_segments=None
)
assert resampled_kv.shape == (4, 12, 50, 128)
""",
    "indices": """
indices = build_safe_linear_indices(B, T_in, T_out, device)
assert indices.shape == (B, T_out)
assert indices.dtype == torch.int64
assert 0 <= indices.min() and indices.max() < T_in
""",
    "quick test": """
proj = KVProjector(12, 2, 128, 128)
k = torch.randn(4, 12, 50, 128)
v = torch.randn(4, 12, 50, 128)
k_out, v_out = proj(k, v)
assert k_out.shape == (4, 2, 50, 128), "Head projection failed!"
x = torch.randn(4, 2, 80, 128)
indices = build_safe_linear_indices(4, 80, 50, x.device)
x_out = safe_time_resample(x, indices)
assert x_out.shape == (4, 2, 50, 128), "Time resampling failed!"
""",
    "empty and single": """
x = torch.randn(4, 2, 0, 128)
indices = build_safe_linear_indices(4, 0, 10, x.device)
x_resampled = safe_time_resample(x, indices)
assert x_resampled.shape == (4, 2, 10, 128)
assert torch.all(indices == 0), "Empty input should map all indices to 0"
x = torch.randn(4, 2, 1, 128)
assert torch.allclose(x, safe_time_resample(x, build_safe_linear_indices(4, 1, 1, x.device)))
""",
}


@pytest.mark.parametrize("name", SNIPPETS)
def test_a_snippet_of_the_reference_runs_as_written(name: str) -> None:
    exec(SNIPPETS[name], {**GIVEN, **{public: getattr(align, public) for public in align.__all__}})


@pytest.mark.parametrize("name", ["Qwen2-7B", "qwen2-7b", "QWEN2-7B", "Qwen/Qwen2-7B", "qwen/qwen2-7b"])
@pytest.mark.parametrize("asked", ["Qwen2-7B", "qwen2-7b", "Qwen/Qwen2-7B"])
def test_a_teacher_is_called_in_any_case_with_and_without_its_organisation(name: str, asked: str) -> None:
    projector = KVDimensionProjector({name: {"d_model": 3584, "num_layers": 28}}, 2048, 2, mlp_ratio=1.0)
    k = torch.randn(1, 4, 3, 128)
    assert projector.project_teacher_kv(asked, k, k)[0].shape == (1, 2, 3, 128)
    assert len(list(projector.parameters())) == 4


def test_teachers_that_differ_in_case_or_organisation_are_told_apart_or_asked_about() -> None:
    config = {"d_model": 512, "num_layers": 2, "head_dim": 64}
    projector = KVDimensionProjector({"one/model": config, "other/Model": config}, 512, 2)
    k = torch.randn(1, 4, 3, 64)
    assert projector.project_teacher_kv("ONE/model", k, k)[0].shape == (1, 2, 3, 64)
    with pytest.raises(
        ValueError, match=r"'model' is the name of several teachers, expected one of \['one/model', 'other/Model'\]"
    ):
        projector.project_teacher_kv("model", k, k)
    with pytest.raises(ValueError, match=r"no teacher 'third/model'"):
        projector.project_teacher_kv("third/model", k, k)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        pytest.param("Qwn2-7B", r"did you mean \['qwen2-7b'", id="typing-mistake"),
        pytest.param("someone/Qwen2-7B", r"did you mean \['qwen2-7b'", id="another-organisation"),
        pytest.param("zzz", r"nor a preset \(there are \[", id="nothing-like-it"),
    ],
)
def test_a_teacher_without_a_preset_is_answered_with_those_like_it(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        KVDimensionProjector({name: {"d_model": 3584, "num_layers": 28}}, 2048, 2)


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (align.KVProjector, ["Ht", "Hs", "Dt", "Ds"]),
        (build_safe_linear_indices, ["B", "T_in", "T_out", "device"]),
        (safe_time_resample, ["x", "indices"]),
        (resample_kv_with_interpolation, ["kv", "T_out", "teacher_segments", "student_segments"]),
        (KVDimensionProjector, ["teacher_configs", "student_d_model", "student_num_kv_heads", "mlp_ratio"]),
        (KVDimensionProjector.project_teacher_kv, ["self", "name", "k", "v"]),
    ],
)
def test_the_names_of_arguments_are_those_of_the_reference(function: Any, parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters)[: len(parameters)] == parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_and_memory_layout_of_a_tensor_do_not_matter(dtype: torch.dtype) -> None:
    by_token = torch.randn(2, 80, 12, 128).to(dtype)
    k, whole = by_token.transpose(1, 2), by_token.transpose(1, 2).contiguous()
    indices = build_safe_linear_indices(2, 80, 50)
    for function in (
        lambda x: safe_time_resample(x, indices),
        lambda x: resample_kv_with_interpolation(x, 50),
        lambda x: resample_kv_with_interpolation(x, 50, [30, 50], [(0, 10), (10, 50)]),
        lambda x: align.KVProjector(12, 2, 128, 64)(x, x)[0],
    ):
        assert function(k).dtype == dtype
        assert torch.equal(function(k), function(whole))

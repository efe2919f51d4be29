"""The quick-fix API. Suffixes: B batch, L layer, H heads, T token, D channels of a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss

from pipeline.align import (
    KVDimensionProjector,
    KVProjector,
    build_safe_linear_indices,
    projectors,
    resample_kv_with_interpolation,
    safe_time_resample,
)
from pipeline.align.projectors import CollapseError
from pipeline.align.rope import rotate
from tests.align.cases import DIM_PAIRS, HEAD_PAIRS, plain_rope

QWEN: dict[str, dict[str, int]] = {"Qwen2.5-7B": {"d_model": 3584, "num_layers": 28}}


def random_kv(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, *shape, generator=generator).to(dtype)
    return k, v


def test_quick_fix_projects_twelve_heads_to_two() -> None:
    k, v = random_kv(4, 12, 50, 128)
    projector = KVProjector(Ht=12, Hs=2, Dt=128, Ds=128)
    k_proj, v_proj = projector(k, v)
    assert k_proj.shape == v_proj.shape == (4, 2, 50, 128)
    torch.testing.assert_close(k_proj, k.reshape(4, 2, 6, 50, 128).mean(2))
    torch.testing.assert_close(v_proj, v.reshape(4, 2, 6, 50, 128).mean(2))


def test_quick_fix_resamples_80_tokens_to_50() -> None:
    x, _ = random_kv(4, 2, 80, 64)
    indices = build_safe_linear_indices(B=4, T_in=80, T_out=50, device=x.device)
    resampled = safe_time_resample(x, indices)
    assert resampled.shape == (4, 2, 50, 64)
    assert indices.shape == (4, 50)
    assert torch.equal(resampled, x[:, :, indices[0]])
    assert resample_kv_with_interpolation(x, 50).shape == (4, 2, 50, 64)


@pytest.mark.parametrize(("Dt", "Ds"), DIM_PAIRS)
@pytest.mark.parametrize(("Ht", "Hs"), HEAD_PAIRS)
def test_every_geometry_is_projected_without_parameters_or_noise(Ht: int, Hs: int, Dt: int, Ds: int) -> None:
    k, v = random_kv(2, Ht, 7, Dt)
    projector = KVProjector(Ht, Hs, Dt, Ds)
    k_proj, v_proj = projector(k, v)
    assert k_proj.shape == v_proj.shape == (2, Hs, 7, Ds)
    assert not list(projector.parameters())
    again, _ = KVProjector(Ht, Hs, Dt, Ds)(k, v)
    assert torch.equal(k_proj, again)
    constant, _ = projector(torch.ones_like(k), torch.ones_like(v))
    assert set(constant.unique().round(decimals=5).tolist()) == ({0.0, 1.0} if Ds > Dt else {1.0})


def test_equal_geometry_gives_the_same_objects_back() -> None:
    k, v = random_kv(2, 4, 7, 64, dtype=torch.bfloat16)
    for trainable in (False, True):
        projector = KVProjector(4, 4, 64, 64, trainable=trainable)
        k_proj, v_proj = projector(k, v)
        assert k_proj is k
        assert v_proj is v
        assert not list(projector.parameters())
        assert not list(projector.buffers())


def test_projected_keys_can_be_rotated_by_the_student() -> None:
    k, v = random_kv(2, 4, 60, 128)
    projector = KVProjector(Ht=4, Hs=2, Dt=128, Ds=64)
    positions = torch.arange(60)
    k_proj, _ = projector(k, v)
    rotated_first, _ = projector(rotate(k, positions, plain_rope(128)), v)
    torch.testing.assert_close(rotate(k_proj, positions, plain_rope(64)), rotated_first, atol=1e-5, rtol=0)


def test_rotations_given_to_the_projector_decide_which_key_channels_it_takes() -> None:
    k, v = random_kv(1, 2, 3, 4)
    projector = KVProjector(2, 2, 4, 4, teacher_rope=plain_rope(4, kind="interleaved"), student_rope=plain_rope(4, kind="half"))
    k_proj, v_proj = projector(k, v)
    assert torch.equal(k_proj, k[..., [0, 2, 1, 3]])
    assert torch.equal(v_proj, v)


def test_head_dims_that_cannot_rotate_are_spread() -> None:
    k, v = random_kv(1, 2, 3, 9)
    k_proj, _ = KVProjector(2, 2, 9, 3)(k, v)
    assert torch.equal(k_proj, k[..., [0, 3, 6]])


def test_a_trainable_projector_starts_as_the_fixed_map_and_learns() -> None:
    k, v = random_kv(2, 12, 5, 16)
    projector = KVProjector(12, 2, 16, 8, trainable=True)
    fixed = KVProjector(12, 2, 16, 8)(k, v)
    out = projector(k, v)
    torch.testing.assert_close(out, fixed)
    torch.autograd.backward(out[0].square().sum() + out[1].square().sum())
    gradients = [parameter.grad for parameter in projector.parameters()]
    assert len(gradients) == 2
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize(
    ("k_shape", "v_shape"),
    [
        pytest.param((4, 28, 50, 128), (4, 28, 50, 128), id="query-heads"),
        pytest.param((4, 4, 50, 64), (4, 4, 50, 64), id="other-head-dim"),
        pytest.param((4, 50, 128), (4, 50, 128), id="no-head-axis"),
        pytest.param((4, 4, 50, 128), (4, 4, 49, 128), id="k-and-v-differ"),
    ],
)
def test_other_geometry_is_refused_with_shapes_and_configuration(k_shape: tuple[int, ...], v_shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"got key \[4, .*value \[4, .*Ht=4, Hs=2, Dt=128, Ds=64.*num_key_value_heads"
    ) as caught:
        KVProjector(4, 2, 128, 64)(torch.zeros(k_shape), torch.zeros(v_shape))
    assert str(list(k_shape)) in str(caught.value)
    assert str(list(v_shape)) in str(caught.value)


def test_a_projector_without_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="Hs=0"):
        KVProjector(4, 0, 64, 64)


def test_several_teachers_fit_the_students_loss_directly() -> None:
    projector = KVDimensionProjector(
        teacher_configs={
            "Qwen2.5-7B": {"d_model": 3584, "num_layers": 28},
            "gpt": {"d_model": 1536, "num_layers": 12, "num_kv_heads": 12, "head_dim": 128},
        },
        student_d_model=2048,
        student_num_kv_heads=4,
        mlp_ratio=1.0,
        student_head_dim=64,
    )
    student_k, student_v = (x.requires_grad_() for x in random_kv(2, 4, 30, 64))
    for name, num_heads in (("Qwen2.5-7B", 4), ("Qwen2.5-7B", 28), ("gpt", 12)):
        k, v = random_kv(2, num_heads, 41, 128)
        k_aligned, v_aligned = projector.project_teacher_kv(name, k, v, 30)
        loss = mse_loss(student_k, k_aligned) + mse_loss(student_v, v_aligned)
        torch.autograd.backward(loss)
        expected_k, expected_v = KVProjector(num_heads, 4, 128, 64)(k, v)
        torch.testing.assert_close(k_aligned, resample_kv_with_interpolation(expected_k, 30))
        torch.testing.assert_close(v_aligned, resample_kv_with_interpolation(expected_v, 30))
    assert all(not parameter.requires_grad for parameter in projector.parameters())


def test_layers_are_an_axis_of_their_own_only_when_named() -> None:
    projector = KVDimensionProjector(QWEN, 2048, 2, student_head_dim=64)
    k, v = random_kv(2, 5, 4, 9, 128)
    k_aligned, v_aligned = projector.project_teacher_kv("Qwen2.5-7B", k, v, 6, axes="BLHTD")
    assert k_aligned.shape == v_aligned.shape == (2, 5, 2, 6, 64)
    for layer in range(5):
        one_k, one_v = projector.project_teacher_kv("Qwen2.5-7B", k[:, layer], v[:, layer], 6)
        torch.testing.assert_close(k_aligned[:, layer], one_k)
        torch.testing.assert_close(v_aligned[:, layer], one_v)
    with pytest.raises(ValueError, match=r"key \[2, 5, 4, 9, 128\].*axes='BHTD'.*expected .*axes='BLHTD'"):
        projector.project_teacher_kv("Qwen2.5-7B", k, v)
    with pytest.raises(ValueError, match="axes='BTHD'"):
        projector.project_teacher_kv("Qwen2.5-7B", k[:, 0], v[:, 0], axes="BTHD")


def test_equal_geometry_and_length_give_the_same_objects_back() -> None:
    projector = KVDimensionProjector(QWEN, 2048, 4, student_head_dim=64)
    k, v = random_kv(2, 4, 9, 64, dtype=torch.bfloat16)
    k_aligned, v_aligned = projector.project_teacher_kv("Qwen2.5-7B", k, v, 9)
    assert k_aligned is k
    assert v_aligned is v


def test_half_precision_is_rounded_once_over_all_steps() -> None:
    projector = KVDimensionProjector(QWEN, 2048, 4, student_head_dim=64)
    k, v = random_kv(2, 12, 9, 128, dtype=torch.bfloat16)
    k_aligned, _ = projector.project_teacher_kv("Qwen2.5-7B", k, v, 20)
    single, _ = projector.project_teacher_kv("Qwen2.5-7B", k.to(torch.float32), v.to(torch.float32), 20)
    assert k_aligned.dtype == torch.bfloat16
    assert torch.equal(k_aligned, single.to(torch.bfloat16))


def test_all_parameters_exist_before_any_tensor_is_seen() -> None:
    def build() -> KVDimensionProjector:
        return KVDimensionProjector(QWEN, 512, 4, mlp_ratio=0.5, student_head_dim=64, trainable=True)

    projector = build()
    names = set(projector.state_dict())
    optimizer = torch.optim.SGD(projector.parameters(), lr=0.1)
    k, v = random_kv(2, 12, 9, 32)
    before, _ = projector.project_teacher_kv("Qwen2.5-7B", k, v)
    torch.testing.assert_close(before, KVProjector(12, 4, 32, 64)(k, v)[0])
    for _ in range(2):
        optimizer.zero_grad()
        k_aligned, v_aligned = projector.project_teacher_kv("Qwen2.5-7B", k, v)
        torch.autograd.backward(k_aligned.square().mean() + v_aligned.square().mean())
        optimizer.step()
    assert set(projector.state_dict()) == names
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in projector.parameters())
    after, _ = projector.project_teacher_kv("Qwen2.5-7B", k, v)
    assert not torch.equal(after, before)
    copy = build()
    copy.load_state_dict(projector.state_dict())
    assert torch.equal(copy.project_teacher_kv("Qwen2.5-7B", k, v)[0], after)


def test_without_an_mlp_there_are_no_parameters() -> None:
    assert not list(KVDimensionProjector(QWEN, 512, 4, student_head_dim=64).parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"teacher_configs": {}}, "teacher_configs is empty", id="no-teacher"),
        pytest.param({"teacher_configs": {"a": {"d_model": 64}}}, r"missing \['num_layers'\]", id="field-missing"),
        pytest.param(
            {"teacher_configs": {"a": {"d_model": 64, "num_layers": 2, "n_head": 4}}},
            r"unknown \['n_head'\]",
            id="field-unknown",
        ),
        pytest.param({"teacher_configs": {"a": {"d_model": 0, "num_layers": 2}}}, "not positive", id="field-zero"),
        pytest.param(
            {"teacher_configs": {"a": {"d_model": 512, "num_layers": 2, "num_kv_heads": 8, "head_dim": 128}}},
            "num_kv_heads \\* head_dim = 1024 to be at most d_model",
            id="contradicting-widths",
        ),
        pytest.param({"student_d_model": 128}, "student_num_kv_heads=4 x student_head_dim=64 = 256", id="student-too-wide"),
        pytest.param({"student_num_kv_heads": 0}, "student_num_kv_heads=0", id="no-student-heads"),
        pytest.param({"mlp_ratio": -1.0}, "got mlp_ratio=-1.0", id="negative-ratio"),
        pytest.param({"trainable": True}, "something to train", id="nothing-to-train"),
    ],
)
def test_contradicting_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "teacher_configs": QWEN,
        "student_d_model": 2048,
        "student_num_kv_heads": 4,
        "student_head_dim": 64,
    }
    with pytest.raises(ValueError, match=message):
        KVDimensionProjector(**arguments | changes)


@pytest.mark.parametrize(
    ("k_shape", "v_dim", "stated", "message"),
    [
        pytest.param((2, 28, 9, 512), 512, {}, r"28 heads x 512 = 14336.*Is axis 1 layers", id="layers-as-heads"),
        pytest.param((2, 8, 9, 128), 128, {"num_kv_heads": 4}, "num_key_value_heads", id="other-heads-than-stated"),
        pytest.param((2, 4, 9, 64), 64, {"head_dim": 128}, "D = head_dim", id="other-head-dim-than-stated"),
        pytest.param((2, 4, 9, 128), 64, {}, "use an Alignment", id="k-and-v-differ"),
        pytest.param((2, 29, 4, 9, 128), 128, {}, "at most num_layers", id="too-many-layers"),
    ],
)
def test_tensors_that_contradict_the_teachers_config_are_refused(
    k_shape: tuple[int, ...], v_dim: int, stated: dict[str, int], message: str
) -> None:
    projector = KVDimensionProjector({"qwen": {"d_model": 3584, "num_layers": 28, **stated}}, 2048, 4, student_head_dim=64)
    k, v = torch.zeros(k_shape), torch.zeros(*k_shape[:-1], v_dim)
    with pytest.raises(ValueError, match=message) as caught:
        projector.project_teacher_kv("qwen", k, v, axes="BLHTD" if k.ndim == 5 else "BHTD")
    for shown in (str(list(k.shape)), str(list(v.shape)), "'d_model': 3584", "student d_model=2048"):
        assert shown in str(caught.value)


def test_an_unknown_teacher_is_refused_with_those_there_are() -> None:
    k, v = random_kv(1, 4, 3, 64)
    with pytest.raises(ValueError, match=r"no teacher 'llama', expected one of \['Qwen2.5-7B'\]"):
        KVDimensionProjector(QWEN, 2048, 4, student_head_dim=64).project_teacher_kv("llama", k, v)


def test_the_students_head_dim_is_taken_from_the_first_teachers_entry() -> None:
    teachers = {"a": {"d_model": 512, "num_layers": 2, "head_dim": 32}, "b": {"d_model": 512, "num_layers": 2, "head_dim": 64}}
    k, v = random_kv(1, 4, 3, 64)
    assert KVDimensionProjector(teachers, 512, 2).project_teacher_kv("b", k, v)[0].shape == (1, 2, 3, 32)


def test_the_students_head_dim_is_taken_from_the_preset_of_the_first_teachers_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "teachers").mkdir()
    (tmp_path / "teachers" / "some-7b.toml").write_text("[geometry]\nhead_dim = 96\n")
    monkeypatch.setattr(projectors, "configs_dir", lambda: tmp_path)
    k, v = random_kv(1, 4, 3, 96)
    projector = KVDimensionProjector({"some-7b": {"d_model": 3584, "num_layers": 2}}, 512, 2)
    assert projector.project_teacher_kv("some-7b", k, v)[0].shape == (1, 2, 3, 96)
    for stranger in ("other", "../teachers/some-7b"):
        with pytest.raises(ValueError, match=r"there are \['some-7b'\]\); pass student_head_dim="):
            KVDimensionProjector({stranger: {"d_model": 3584, "num_layers": 2}}, 512, 2)


def test_a_shipped_preset_gives_the_students_head_dim() -> None:
    projector = KVDimensionProjector({"qwen2-7b": {"d_model": 3584, "num_layers": 28}}, 2048, 2)
    k, v = random_kv(1, 4, 3, 128)
    assert projector.project_teacher_kv("qwen2-7b", k, v)[0].shape == (1, 2, 3, 128)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_projector_that_learns_to_give_nothing_is_stopped(kind: str) -> None:
    torch.manual_seed(0)
    k, v = torch.randn(2, 4, 30, 8), torch.randn(2, 4, 30, 8)
    projector: torch.nn.Module
    if kind == "linear":
        projector = KVProjector(4, 2, 8, 8, trainable=True)
    else:
        projector = KVDimensionProjector(
            {"teacher": {"d_model": 32, "num_layers": 2, "head_dim": 8}},
            16,
            2,
            mlp_ratio=4.0,
            student_head_dim=8,
            trainable=True,
        )

    def project() -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(projector, KVDimensionProjector):
            return projector.project_teacher_kv("teacher", k, v)
        found: tuple[torch.Tensor, torch.Tensor] = projector(k, v)
        return found

    optimizer = torch.optim.Adam(projector.parameters(), lr=0.02)
    losses = []

    def train() -> None:
        for _ in range(2000):
            loss = sum((side.square().mean() for side in project()), torch.zeros(()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))

    with pytest.raises(CollapseError, match=r"the variance of what it gives fell to .*, expected at least 0\.1 of the"):
        train()
    assert losses[-1] < 0.5 * losses[0], "the loss itself only ever looked better"
    with torch.no_grad():
        project()
    projector.eval()
    project()

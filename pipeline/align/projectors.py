"""Modules that bring a teacher's keys and values to a student's geometry: the quick-fix API.

The maps are fixed and closed-form (`heads`, `time`). `trainable=True` adds a residual that starts at zero, to be fitted offline
to a pretrained student's own keys and values and then frozen: trained jointly with the student, a projector on the teacher's
side collapses (the KV loss falls and the student gets worse). Does not know stores, layers or an `Alignment`.

Suffixes: B batch, L layer, H heads, T token, D channels of a head; `...` any leading axes.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvstore.spec import RopeSpec
from pipeline.align.heads import Channels, key_channels, project_heads, select_channels, spread_channels
from pipeline.align.time import resample_kv_with_interpolation
from pipeline.presets_path import close_names, configs_dir, find_preset, same_name

_TEACHER_FIELDS = ("d_model", "num_layers", "num_kv_heads", "head_dim")


COLLAPSED = 0.1
"""Part of its first variance below which the output of a trained projector counts as collapsed."""


class CollapseError(ValueError):
    """A projector that is being trained gives nearly a constant: stop, and train the student's side instead."""


class KVProjector(nn.Module):
    """Project keys and values [B, Ht, T, Dt] to [B, Hs, T, Ds]; for equal geometry the very same objects come back.

    Args:
        Ht: the teacher's KV heads (`num_key_value_heads`, or the tensor's own axis 1), never its query heads.
        teacher_rope: how the teacher rotates keys, and `student_rope` the student; when not given, both are taken to rotate
            the whole head in halves with equal bases.
        trainable: add a linear residual from `Dt` to `Ds` for K and for V, starting at zero (see the module's warning).

    While a residual is trained, `forward` raises CollapseError once the output varies less than a tenth of the fixed map's.
    """

    def __init__(
        self,
        Ht: int,
        Hs: int,
        Dt: int,
        Ds: int,
        *,
        teacher_rope: RopeSpec | None = None,
        student_rope: RopeSpec | None = None,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        if min(Ht, Hs, Dt, Ds) < 1:
            raise ValueError(f"KVProjector: got Ht={Ht}, Hs={Hs}, Dt={Dt}, Ds={Ds}, expected at least 1 each")
        self.Ht, self.Hs, self.Dt, self.Ds = Ht, Hs, Dt, Ds
        self._key_channels = key_channels(
            Dt, Ds, teacher_rope or _rope_of_equal_base(Dt), student_rope or _rope_of_equal_base(Ds)
        )
        self._value_channels = spread_channels(Dt, Ds)
        is_identity = Ht == Hs and self._key_channels == tuple(range(Dt))
        self.key_residual: nn.Linear | None = None
        self.value_residual: nn.Linear | None = None
        if trainable and not is_identity:
            self.key_residual, self.value_residual = _zero_linear(Dt, Ds), _zero_linear(Dt, Ds)

    def forward(
        self, k: Float[Tensor, "..."], v: Float[Tensor, "..."]
    ) -> tuple[Float[Tensor, "B Hs T Ds"], Float[Tensor, "B Hs T Ds"]]:
        """Project keys `k` (before rotation) and values `v`, both [B, Ht, T, Dt].

        Raises:
            ValueError: a tensor of another geometry; the message has both shapes and this projector's.
        """
        if k.shape != v.shape or k.ndim != 4 or k.shape[1] != self.Ht or k.shape[3] != self.Dt:
            raise ValueError(
                f"KVProjector: got key {list(k.shape)}, value {list(v.shape)}, expected both [B, {self.Ht}, T, {self.Dt}] "
                f"(projector: {self.extra_repr()}). Ht is num_key_value_heads, not num_attention_heads: take it from "
                "key.shape[1]."
            )
        return (
            self._project(k, self._key_channels, self.key_residual),
            self._project(v, self._value_channels, self.value_residual),
        )

    def extra_repr(self) -> str:
        return f"Ht={self.Ht}, Hs={self.Hs}, Dt={self.Dt}, Ds={self.Ds}"

    def _project(self, x_BHTD: Tensor, channels: Channels, residual: nn.Linear | None) -> Tensor:
        if residual is None:
            return project_heads(select_channels(x_BHTD, channels), self.Hs, head_axis=-3)
        pooled = project_heads(x_BHTD, self.Hs, head_axis=-3)
        learned: Tensor = residual(pooled.to(residual.weight.dtype))
        fixed = select_channels(pooled, channels)
        out = fixed + learned.to(x_BHTD.dtype)
        _refuse_collapse(residual, fixed, out)
        return out


class KVDimensionProjector(nn.Module):
    """Bring several teachers' keys and values to one student's heads, head dim and (on request) length.

    Head counts come from the tensors, so the fixed maps are closed forms made on demand; parameters exist only for the MLPs,
    which live in the student's geometry and therefore exist, all of them, after `__init__`. Heads are taken to rotate whole
    with equal bases on both sides; where that is untrue use `KVProjector` with RopeSpecs, or an `Alignment`.

    Args:
        teacher_configs: per teacher `d_model` and `num_layers`; `num_kv_heads` and `head_dim` are checked when given. Any
            names will do. `d_model` is the width of all heads together, num_heads * head_dim (mostly `hidden_size`).
        student_d_model: the same of the student.
        mlp_ratio: hidden width of each teacher's residual MLPs (K and V) relative to student heads x head dim; 0 for none.
        student_head_dim: when not given, the first teacher's: its entry, else that of the preset it is called after, in any case
            and with or without the organisation (`Qwen2-7B`, `Qwen/Qwen2-7B`, `qwen2-7b`).
        trainable: let the MLPs learn (see the module's warning); otherwise they only apply what a state dict brings.

    Raises:
        ValueError: configs that contradict each other or leave the student's head dim open.
    """

    def __init__(
        self,
        teacher_configs: Mapping[str, Mapping[str, int]],
        student_d_model: int,
        student_num_kv_heads: int,
        mlp_ratio: float = 0.0,
        *,
        student_head_dim: int | None = None,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        self.teacher_configs = {name: _parse_teacher(name, config) for name, config in teacher_configs.items()}
        if not self.teacher_configs:
            raise ValueError("KVDimensionProjector: teacher_configs is empty, expected {name: {'d_model': .., ...}}")
        if mlp_ratio < 0 or (trainable and mlp_ratio == 0):
            raise ValueError(
                f"KVDimensionProjector: got mlp_ratio={mlp_ratio}, trainable={trainable}, expected a ratio of at least 0, "
                "above 0 to have something to train"
            )
        self.student_d_model = student_d_model
        self.Hs = student_num_kv_heads
        self.Ds = _first_head_dim(self.teacher_configs) if student_head_dim is None else student_head_dim
        width = self.Hs * self.Ds
        if self.Hs < 1 or self.Ds < 1 or width > student_d_model:
            raise ValueError(
                f"KVDimensionProjector: student_num_kv_heads={self.Hs} x student_head_dim={self.Ds} = {width}, expected at "
                f"least 1 each and at most student_d_model={student_d_model} together. student_head_dim was "
                f"{'taken from the first teacher' if student_head_dim is None else 'given'}; pass the student's own."
            )
        self.mlps = nn.ModuleDict()
        if mlp_ratio > 0:
            for name in self.teacher_configs:
                for part in ("key", "value"):
                    self.mlps[_module_key(name, part)] = _ResidualMLP(width, mlp_ratio)
        self.mlps.requires_grad_(trainable)

    def project_teacher_kv(
        self,
        name: str,
        k: Float[Tensor, "..."],
        v: Float[Tensor, "..."],
        student_seq_len: int | None = None,
        *,
        axes: str = "BHTD",
    ) -> tuple[Float[Tensor, "*lead Hs T Ds"], Float[Tensor, "*lead Hs T Ds"]]:
        """Project one teacher's keys (before rotation) and values to [B, Hs, T, Ds], or [B, L, Hs, T, Ds] for `BLHTD`.

        Args:
            name: one of `teacher_configs`, in any case, with or without the organisation.
            student_seq_len: resample the time axis linearly to this many tokens; None keeps it.
            axes: what the axes of `k` and `v` are; never guessed from their number.

        Raises:
            ValueError: an unknown teacher, or tensors that contradict `axes` or the teacher's config.
        """
        name = self._teacher_named(name)
        self._validate_tensors(name, k, v, axes)
        Dt, seq_len = k.shape[-1], k.shape[-2] if student_seq_len is None else student_seq_len
        channels = key_channels(Dt, self.Ds, _rope_of_equal_base(Dt), _rope_of_equal_base(self.Ds))
        key_mlp, value_mlp = (self.mlps[_module_key(name, part)] if self.mlps else None for part in ("key", "value"))
        return (
            self._project(k, channels, key_mlp, seq_len),
            self._project(v, spread_channels(Dt, self.Ds), value_mlp, seq_len),
        )

    def extra_repr(self) -> str:
        return f"teachers={list(self.teacher_configs)}, Hs={self.Hs}, Ds={self.Ds}"

    def _project(self, x: Tensor, channels: Channels, mlp: nn.Module | None, seq_len: int) -> Tensor:
        chosen = select_channels(x, channels)
        if mlp is None and x.shape[-3:-1] == (self.Hs, seq_len):
            return chosen
        # Several steps, one rounding.
        pooled = project_heads(chosen.to(torch.promote_types(x.dtype, torch.float32)), self.Hs, head_axis=-3)
        timed = resample_kv_with_interpolation(pooled.flatten(0, -4), seq_len)
        out: Tensor = timed.reshape(*x.shape[:-3], *timed.shape[-3:])
        if mlp is not None:
            out = mlp(out)
        return out.to(x.dtype)

    def _teacher_named(self, name: str) -> str:
        """The key of `teacher_configs` that a name means, in any case, with or without the organisation."""
        if name in self.teacher_configs:
            return name
        found = [teacher for teacher in self.teacher_configs if same_name(teacher, name)]
        if len(found) > 1:
            raise ValueError(f"project_teacher_kv: {name!r} is the name of several teachers, expected one of {found}")
        if not found:
            raise ValueError(f"project_teacher_kv: no teacher {name!r}, expected one of {list(self.teacher_configs)}")
        return found[0]

    def _validate_tensors(self, name: str, k: Tensor, v: Tensor, axes: str) -> None:
        config = self.teacher_configs[name]
        got = (
            f"project_teacher_kv({name!r}): got key {list(k.shape)}, value {list(v.shape)} as axes={axes!r} "
            f"(teacher {config}; student d_model={self.student_d_model}, num_kv_heads={self.Hs}, head_dim={self.Ds})"
        )
        if axes not in ("BHTD", "BLHTD") or k.ndim != len(axes):
            raise ValueError(f"{got}, expected [B, H, T, D] with axes='BHTD' or [B, L, H, T, D] with axes='BLHTD'")
        if k.shape != v.shape:
            raise ValueError(f"{got}, expected equal shapes; for unequal key and value dims use an Alignment")
        H, D = k.shape[-3], k.shape[-1]
        if (config.get("num_kv_heads", H), config.get("head_dim", D)) != (H, D):
            raise ValueError(
                f"{got}, expected H = num_kv_heads and D = head_dim. num_kv_heads is num_key_value_heads of the model's "
                "config, not num_attention_heads"
            )
        if config["d_model"] < H * D:
            raise ValueError(
                f"{got}: {H} heads x {D} = {H * D}, expected at most d_model. Is axis 1 layers, [B, L, T, d]? Then split "
                "heads and pass axes='BLHTD'. If heads are wider than hidden_size, d_model is num_heads * head_dim"
            )
        if axes == "BLHTD" and k.shape[1] > config["num_layers"]:
            raise ValueError(f"{got}, expected at most num_layers on axis 1")


class _ResidualMLP(nn.Module):
    """x + MLP(x) over all heads of a token, zero at first. No biases: a constant in K is not neutral under rotation."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = max(1, round(width * ratio))
        self.inner = nn.Linear(width, hidden, bias=False)
        self.outer = _zero_linear(hidden, width)

    def forward(self, x: Float[Tensor, "*lead H T D"]) -> Float[Tensor, "*lead H T D"]:
        flat = x.transpose(-3, -2).flatten(-2).to(self.inner.weight.dtype)
        learned: Tensor = self.outer(nn.functional.gelu(self.inner(flat))).to(x.dtype)
        out = x + learned.reshape(x.transpose(-3, -2).shape).transpose(-3, -2)
        _refuse_collapse(self.outer, x, out)
        return out


def _refuse_collapse(residual: nn.Linear, fixed: Tensor, out: Tensor) -> None:
    """While a residual is trained, stop once what comes out varies much less than at the start, when it was the fixed map's output.

    Raises:
        CollapseError: it does.
    """
    if not (residual.training and residual.weight.requires_grad and torch.is_grad_enabled()) or fixed.numel() < 2:
        return
    start, now = (float(values.detach().float().var()) for values in (fixed, out))
    if now < COLLAPSED * start:
        raise CollapseError(
            f"projector: the variance of what it gives fell to {now:.3g}, expected at least {COLLAPSED:g} of the {start:.3g} it began with: it "
            "learns to give the student what is easy instead of what the teacher says, and the KV loss falls while the student gets worse. Fit it "
            "offline to a pretrained student and freeze it, or adapt the student's side"
        )


def _zero_linear(num_in: int, num_out: int) -> nn.Linear:
    linear = nn.Linear(num_in, num_out, bias=False)
    nn.init.zeros_(linear.weight)
    return linear


def _rope_of_equal_base(dim: int) -> RopeSpec | None:
    """Rotation of the whole head; any base does, as long as both sides share it. None for an odd dim, which cannot rotate."""
    if dim % 2:
        return None
    return RopeSpec(kind="half", inv_freq=tuple(10000.0 ** (-2 * pair / dim) for pair in range(dim // 2)))


def _parse_teacher(name: str, config: Mapping[str, int]) -> dict[str, int]:
    unknown = sorted(set(config) - set(_TEACHER_FIELDS))
    missing = sorted({"d_model", "num_layers"} - set(config))
    bad = {field: value for field, value in config.items() if not isinstance(value, int) or value < 1}
    if unknown or missing or bad:
        raise ValueError(
            f"teacher_configs[{name!r}]: got {dict(config)}; unknown {unknown}, missing {missing}, not positive integers "
            f"{bad}; expected d_model and num_layers, optionally num_kv_heads and head_dim"
        )
    width = config.get("num_kv_heads", 1) * config.get("head_dim", 1)
    if width > config["d_model"]:
        raise ValueError(
            f"teacher_configs[{name!r}]: got {dict(config)}, expected num_kv_heads * head_dim = {width} to be at most "
            "d_model, which is num_heads * head_dim"
        )
    return dict(config)


def _first_head_dim(teachers: Mapping[str, Mapping[str, int]]) -> int:
    """Head dim of the first teacher: its entry, else the preset of that name."""
    name, config = next(iter(teachers.items()))
    if "head_dim" in config:
        return config["head_dim"]
    folder = configs_dir() / "teachers"
    preset = find_preset(folder, name)
    if preset is None:
        names = sorted(path.stem for path in folder.glob("*.toml"))
        close = close_names(name, names)
        raise ValueError(
            f"student_head_dim: not given, and teacher {name!r} has neither a head_dim ({dict(config)}) nor a preset "
            f"({f'did you mean {close}? ' if close else ''}there are {names}); pass student_head_dim=<the student's head dim>"
        )
    return int(tomllib.loads(preset.read_text(encoding="utf-8"))["geometry"]["head_dim"])


def _module_key(name: str, part: str) -> str:
    """A module name for one teacher's keys or values: torch allows no dot there, and model names have them."""
    return f"{name.replace('%', '%25').replace('.', '%2E')}_{part}"

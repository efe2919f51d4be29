"""Settings of a training run. Imports pydantic only, so that parsing comes before anything heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Location = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
Positive = Annotated[int, Field(ge=1)]


def _one_or_several(value: object) -> object:
    """One name as a tuple; a list as well, which is what JSON makes of a tuple."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class TrainConfig(BaseModel):
    """A run of `kvpipe train`: a store, a student, a folder, and how to train."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    store: Location
    """The store to train from: a folder, or `s3://bucket/prefix`."""
    student: str
    """Student: a TOML file or preset of configs/students (fresh weights), or a model folder or hub name (pretrained)."""
    out: Path
    """Folder of the run: checkpoints, metrics.jsonl, summary.json, loss.png and the final model under `model/`."""

    steps: Positive = 1000
    """Optimizer steps of the whole run."""
    batch_size: Positive = 16
    """Samples per optimizer step over all ranks and micro-batches; 16 windows were used in research/alignment.md 7."""
    micro_batch_size: Positive | None = None
    """Samples per forward pass of one rank: less memory, the same data. None for an equal share of batch_size per rank."""
    batch_tokens: Positive | None = None
    """Most tokens per optimizer step, in place of batch_size, for samples of very unequal length; a longer one comes alone. Every sample
    comes once a pass, so there is no tail."""
    micro_batch_tokens: Positive | None = None
    """With batch_tokens about how many tokens per forward pass of one rank; None for an equal share per rank."""
    learning_rate: float = Field(default=3e-4, gt=0.0)
    """Peak learning rate, cosine to 0. Usual for fresh students of 0.1-1B; tiny ones want 6e-3, pretrained ones about 2e-5."""
    warmup: Fraction = 0.03
    """Fraction of the steps over which the learning rate rises from 0; 3 % is customary."""
    weight_decay: float = Field(default=0.05, ge=0.0)
    """Decoupled weight decay (AdamW), on matrices only; as in research/alignment.md 7."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's decay rates; 0.95 is the language-model custom and was used in research/alignment.md 7."""
    max_grad_norm: float = Field(default=1.0, ge=0.0)
    """Gradients are scaled down to this norm; 0 turns that off."""

    lora_rank: Positive | None = None
    """Train low-rank additions of this rank to all linear layers of a pretrained student (LoRA), merged into it at the end; None trains
    all of it. Wants a learning rate of about 1e-4 and the package peft: pip install 'kvpipe[lora]'."""

    kv_weight: float = Field(default=1.0, ge=0.0)
    """Weight lambda of the KV loss against cross-entropy; 1 and 3 did about equally well (research/alignment.md 7.5)."""
    kv_until: Fraction = 0.5
    """Fraction of the steps with the KV loss, from the first; then lambda is 0. Half beat constant and three quarters (7.5)."""
    kv_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of lambda over the steps that have it: `constant`, or falling from kv_weight to 0, `linear` or as a half `cosine`."""
    kv_loss: Literal["mse", "smooth_l1", "cosine", "relation"] = "mse"
    """Distance of keys and values: `mse` over the targets' variance; `smooth_l1`, for outlier channels; `cosine`, blind to length;
    `relation`, how tokens of a sample relate to each other (MiniLMv2), which needs no map between heads and dims."""
    adapter: Literal["none", "orthogonal", "linear"] = "none"
    """Learned map from the student's keys and values to the stored ones, trained beside it and left out of the saved student;
    `orthogonal` can only turn, `linear` is free. `none` uses the fixed map, within the seeds of both (docs/alignment.md)."""
    ce_only: bool = False
    """Control: plain cross-entropy in the same data order from the same initial weights; no KV is read."""
    shuffle_targets: bool = False
    """Control: every sample gets the keys and values of another sample of its batch."""
    sink_tokens: int = Field(default=4, ge=0)
    """First positions of a sample left out of the KV loss: attention sinks have outlier keys that would dominate it."""
    layer_map: str = "last_aligned"
    """Which teacher layer a student layer follows, where the store has no baked map; it beat `uniform` on every seed (7.5). `cka` takes
    those most like the layers of a pretrained student; pairs such as '0=3,1=9' are taken as they are."""
    layers: str = "all"
    """Student layers in the KV loss: 'all' that have a teacher layer, or a list such as '0,4,8-11' or '-1' for the last."""

    seed: int = Field(default=0, ge=0)
    """Initial weights and order of the data; runs of equal seed are comparable step by step."""
    eval_fraction: Fraction = 0.05
    """Share of the tokens held out by document; 0 for none. The choice depends on the documents' content, not on the seed."""
    eval_max_tokens: Positive = 1_000_000
    """Upper limit of the held-out tokens; a million tell losses 0.001 nats apart and cost seconds."""
    eval_every: Positive = 100
    """Steps between evaluations; there is always one at the end."""
    save_every: Positive = 500
    """Steps between checkpoints; the newest two are kept."""
    log_every: Positive = 10
    """Steps averaged in one line of metrics.jsonl."""
    mix: dict[str, Annotated[float, Field(gt=0.0, lt=1.0)]] = {}
    """Other stores to draw from as well, each with its share of the samples; the rest is drawn from `store`. Shares are kept in every
    stretch of the run; a store that is drawn more often than it has samples goes round again. All must hold the same layers of one teacher."""
    shuffle: Literal["windowed", "global", "none"] = "windowed"
    """How samples are ordered: shards permuted and their samples within windows, all samples at once, or as they lie."""
    tail: Literal["drop", "pad", "short"] = "drop"
    """Samples that fill no whole batch at the end of an epoch: left out, filled up with samples of weight 0, or a smaller batch."""
    balance_tokens: bool = False
    """Share the samples of each batch out so that ranks and micro-batches have about as many tokens; the batch stays the same."""
    shuffle_window_bytes: Positive = 64 * 2**30
    """Decoded bytes of whole shards among which samples are shuffled; costs no memory, only locality of the reads."""

    resume: bool = False
    """Continue from the newest complete checkpoint in `out`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward pass; weights and losses stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto` takes an accelerator if there is one."""
    torch_compile: bool = False
    """Compile the student's parts around its attention with torch.compile: norms and MLPs. Attention has kernels of its own."""
    fsdp: bool = False
    """Shard weights, gradients and optimizer over the ranks (FSDP2) instead of a copy of each on every rank; on GPUs only.
    A run is resumed as it began: sharded or not."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time, the same numbers."""
    threads: Positive | None = None
    """CPU threads of torch in each process; None leaves torch's choice. Losses repeat bit by bit only at an equal number."""
    workers: int = Field(default=0, ge=0)
    """Processes that read batches; 0 reads in a thread of this process while the model computes. With 1 the model hardly notices (0.98 of
    its speed instead of 0.96 at steps of 80 ms on two cores); it takes 0.5 GB of memory."""
    report_to: Annotated[tuple[str, ...], BeforeValidator(_one_or_several)] = ()
    """Experiment trackers of transformers, such as 'tensorboard' or 'wandb', one or a list; none unless asked for."""

    @model_validator(mode="after")
    def _fields_agree(self) -> TrainConfig:
        if self.ce_only and self.shuffle_targets:
            raise ValueError("ce_only and shuffle_targets: both are set, expected one; ce_only uses no targets to shuffle")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size: got {self.micro_batch_size}, expected a divisor of batch_size {self.batch_size}"
            )
        self._budget_agrees()
        if self.fsdp and self.adapter != "none":
            raise ValueError(f"adapter: got {self.adapter} with fsdp, expected none there: adapters are not sharded")
        if self.fsdp and self.lora_rank is not None:
            raise ValueError(
                f"lora_rank: got {self.lora_rank} with fsdp, expected none there: sharded weights cannot be merged"
            )
        if self.adapter != "none" and (self.kv_loss == "relation" or self.kv_steps == 0):
            reason = "no KV loss" if self.kv_steps == 0 else "kv_loss relation, which compares unlike geometries as they are"
            raise ValueError(f"adapter: got {self.adapter} with {reason}, expected none there")
        if sum(self.mix.values()) >= 1:
            raise ValueError(
                f"mix: got shares {self.mix} that add up to {sum(self.mix.values())}, expected less than 1: the rest is {self.store}'s"
            )
        if self.store in self.mix:
            raise ValueError(f"mix: got {self.store}, which is the store itself, expected others")
        if self.shuffle_targets and self.batch_size == 1:
            raise ValueError("shuffle_targets: a batch of 1 has no other sample; set batch_size to 2 or more")
        return self

    def _budget_agrees(self) -> None:
        if self.batch_tokens is None and self.micro_batch_tokens is not None:
            raise ValueError("micro_batch_tokens: set without batch_tokens, expected micro_batch_size there")
        if self.batch_tokens is not None and self.micro_batch_size is not None:
            raise ValueError("micro_batch_size: set with batch_tokens, expected micro_batch_tokens there")
        if self.batch_tokens is not None and self.shuffle_targets:
            raise ValueError(
                "shuffle_targets: set with batch_tokens, but a batch of one sample has no other; expected batch_size"
            )
        if (self.micro_batch_tokens or 0) > (self.batch_tokens or 0):
            raise ValueError(
                f"micro_batch_tokens: got {self.micro_batch_tokens}, expected at most batch_tokens {self.batch_tokens}"
            )

    @property
    def kv_steps(self) -> int:
        """Number of steps, from the first on, that use the KV loss."""
        return 0 if self.ce_only or self.kv_weight == 0 else round(self.kv_until * self.steps)

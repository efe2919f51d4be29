"""Settings of an extraction, and how settings are put together from a TOML file, `--set` and flags.

Knows no torch and no store: parsing comes before anything heavy is imported.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic

from pipeline.presets_path import configs_dir

Location = Annotated[str, pydantic.BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
"""A folder, or `s3://bucket/prefix`, as `kvstore.storage.locate` takes it; a Path would lose the second slash."""


class ExtractConfig(pydantic.BaseModel):
    """One extraction: teacher, data and where the store goes."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    teacher: str
    """Preset name, Hugging Face id, or a local folder with safetensors."""
    data: tuple[str, ...] = ()
    """Text files or globs, files of rows (.jsonl, .json, .csv, .tsv, .parquet), a `datasets` folder, or a hub id as 'org/name' or
    'org/name:config'."""
    out: Location | None = None
    """Where the store goes: a folder, or `s3://bucket/prefix`; a preset names a default."""
    student: str | None = None
    """Preset, id, folder or config file of a student: bakes its alignment, so the store is smaller and fits only it."""
    layers: str | None = None
    """'all', or a list such as '0,4,8-11' or '-1'. Teacher layers of a raw store, student layers of a baked one."""
    layer_map: str = "last_aligned"
    """Which teacher layer a student layer takes when a student is named: last_aligned, uniform, or pairs such as '0=3,1=9,-1=-1'."""
    codec: str = "mix"
    """raw, q8, fp8, q8z, mix, q4z or q4z-min (12 to 2.35 bits per value); layers may differ: 'mix,0=raw,24-27=q8'."""
    seq_len: int = pydantic.Field(2048, ge=2)
    """Longest sample in tokens; longer documents are cut into consecutive samples. At most the teacher's positions."""
    batch_tokens: int | None = pydantic.Field(None, ge=1)
    """Padded tokens of one forward pass; a longer sample runs alone. None measures what fits a GPU, and is 8,192 on a CPU."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Type the teacher computes in; auto is the checkpoint's own."""
    device: str = "auto"
    """'cpu', 'cuda', 'cuda:1' ...; auto takes a GPU when there is one."""
    workers: int = pydantic.Field(0, ge=0)
    """Ray workers, each with a teacher of its own. 0 runs in this process; with `ray_address` it is one worker per GPU of the cluster."""
    ray_address: str | None = None
    """Ray cluster to use, 'auto' or host:port; without it a local one is started."""
    gpus_per_worker: int = pydantic.Field(0, ge=0)
    """GPUs one teacher is spread over, for teachers larger than one GPU; 0 is one where there are any."""
    on_bad_sample: Literal["fail", "quarantine"] = "fail"
    """What to do about a row that cannot be read, and a sample that crashes its worker, raises or gives NaN: end the run and name it, or
    leave it out and record it."""
    grace_s: float = pydantic.Field(20.0, ge=0)
    """Seconds that tasks in hand get to finish after SIGTERM or Ctrl-C; Slurm and Kubernetes kill after 30."""
    text_field: str = "text"
    """Field of a row that holds the text."""
    as_text: bool = False
    """Read every file as plain text, whatever its suffix says: markup such as .html is refused otherwise."""
    split: str = "train"
    """Split of a data set that has several."""
    limit: int | None = pydantic.Field(None, ge=1)
    """Most samples to store."""
    max_tokens: int | None = pydantic.Field(None, ge=0)
    """Most tokens to store; 0 is no limit. A preset's default is 1,000,000."""
    sample_tokens: int | None = pydantic.Field(None, ge=1)
    """Store about so many tokens in documents drawn at random from all of the data, instead of its first; reads it all once more."""
    overlap: int = pydantic.Field(0, ge=0)
    """Tokens that a later sample of a long document repeats from the one before, as context that is not learnt from."""
    response_only: bool = False
    """Store keys and values only of tokens to be learnt from, what the assistant says in conversations; the teacher reads all of them."""
    window_tokens: int = pydantic.Field(1_048_576, ge=1)
    """Tokens planned at a time: bounds the memory that data of any size takes, about 60 bytes for each."""
    append: bool = False
    """Add this data to the store that is there, as a new part; without it other data is refused."""
    task_range: str | None = pydantic.Field(None, pattern=r"^\d+/\d+$")
    """`3/8` does the third of eight equal runs of shards: for job arrays, each of which runs the same command with its own N."""
    calibration: Location | None = None
    """Another store whose means and steps to use instead of measuring them, so that the two can be merged."""
    max_kl: float = pydantic.Field(0.01, ge=0.0)
    """Largest change of the teacher's predictions by the codec, KL in nats per token; 0.01 is far below what a seed changes."""
    gate_tokens: int = pydantic.Field(4096, ge=2)
    """Tokens over which that change is measured, before the first shard and after the last."""
    accept_fidelity: bool = False
    """Store even where the codec changes the teacher's predictions by more than `max_kl`."""
    max_bytes: pydantic.ByteSize | None = pydantic.Field(None, ge=1)
    """Most bytes of the whole store, a number or like `500GB` or `1TiB`: nothing is begun that could pass it, even uncompressed. Only one
    process may be adding to it."""
    revision: str | None = None
    """Branch, tag or commit of the teacher on the hub."""
    seed: int | None = None
    """Shuffle the documents with this seed before limits apply; without it they keep their order."""
    keep_text: bool = True
    """Store each sample's text beside it, so that students with another tokenizer can be aligned later."""

    @pydantic.model_validator(mode="after")
    def _overlap_is_shorter_than_a_sample(self) -> ExtractConfig:
        if self.overlap >= self.seq_len:
            raise ValueError(f"overlap: got {self.overlap}, expected less than seq_len {self.seq_len}")
        return self

    @pydantic.model_validator(mode="after")
    def _a_byte_limit_is_for_one_process(self) -> ExtractConfig:
        if self.max_bytes is not None and self.task_range is not None:
            raise ValueError(
                "max_bytes: got it with task_range, whose processes add to one store without knowing of each other's bytes; limit such "
                "a run with max_tokens ('kvpipe plan' says how many fit), or use --workers or --ray-address, which one process watches"
            )
        return self


Config = TypeVar("Config", bound=pydantic.BaseModel)


class MissingSettingsError(ValueError):
    """Settings without which nothing can run were given nowhere: a wrong use of the command, not a wrong value."""

    def __init__(self, names: Sequence[str], section: str) -> None:
        super().__init__(", ".join(names))
        self.names = tuple(names)
        self.section = section


def load_config(
    model: type[Config], section: str, file: Path | None, settings: Sequence[str], flags: Mapping[str, Any]
) -> Config:
    """Put a config together: the file's table, then `--set name=value`, then flags; the later wins.

    Args:
        file: a TOML file, or the name of a shipped recipe.

    Raises:
        MissingSettingsError: settings that must be given were not.
        ValueError: the file, a setting or the result is wrong; every problem is listed with its field.
    """
    merged: dict[str, Any] = {}
    if file is not None:
        merged.update(_read_table(file, section))
    for setting in settings:
        merged.update([_parse_setting(setting, section)])
    merged.update({name: value for name, value in flags.items() if value is not None and value != ()})
    try:
        return model.model_validate(merged)
    except pydantic.ValidationError as error:
        if all(problem["type"] == "missing" for problem in error.errors()):
            raise MissingSettingsError([str(problem["loc"][0]) for problem in error.errors()], section) from None
        lines = [f"  {_told(problem, section)}" for problem in error.errors()]
        if any(problem["type"] == "extra_forbidden" for problem in error.errors()):
            lines.append(f"known settings are: {', '.join(model.model_fields)}")
        raise ValueError("\n".join(["settings:", *lines])) from None


def _told(problem: Mapping[str, Any], section: str) -> str:
    where = ".".join(map(str, problem["loc"]))
    if not where:  # of several settings, which the message names
        return f"{section}: {problem['msg']}"
    return (
        f"{where}: {problem['msg']}" if problem["type"] == "missing" else f"{where}: {problem['msg']}; got {problem['input']!r}"
    )


def recipes() -> dict[str, Path]:
    """The shipped recipes by name."""
    return {path.stem: path for path in sorted((configs_dir() / "recipes").glob("*.toml"))}


def _read_table(file: Path, section: str) -> dict[str, Any]:
    if not file.exists() and str(file) in recipes():
        file = recipes()[str(file)]
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"--config: there is no file {file} and no recipe of that name; recipes are {', '.join(recipes())}"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"--config: {file} cannot be read as TOML: {error}") from None
    table = document.get(section)
    if not isinstance(table, dict):
        raise ValueError(f"--config: {file} has no table [{section}]; it has {', '.join(document) or 'nothing'}")
    return table


def _parse_setting(setting: str, section: str) -> tuple[str, Any]:
    name, equals, text = setting.partition("=")
    if not equals:
        raise ValueError(f"--set: got {setting!r}, expected name=value, for instance --set {section}.seed=1")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    return name.removeprefix(f"{section}."), value

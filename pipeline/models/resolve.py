"""From a name to a folder with a checkpoint: presets, hub repositories (pinned to a commit), local folders.

Knows names and the hub; what lies in a folder is `checkpoint`'s business. Imports neither torch nor transformers. The hub client is
imported inside functions: it alone takes 0.4 s.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from pipeline.models.checkpoint import validate_checkpoint
from pipeline.models.files import one_line as one_line
from pipeline.models.presets import TeacherPreset, student_preset, teacher_preset, teacher_preset_names
from pipeline.presets_path import close_names, same_name

HUB_TIMEOUT_S = 3.0
"""How long the hub may take to answer; the client by itself retries for about 23 s."""
WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja", "tokenizer*")
"""Files of a repository worth downloading: weights without pickle, configs, tokenizer."""
UNWANTED = ("*/*", "consolidated*")
"""Files that match `WANTED` all the same: folders of other formats, Mistral's second copy of its weights."""

Answer = TypeVar("Answer")


class ModelLoadError(ValueError):
    """A model cannot be found or used: the message says where it was looked for and what to do."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """A model that lies on this machine."""

    name: str
    """What was asked for."""
    id_or_path: str
    """Hub repository, or absolute local folder."""
    path: Path
    """Folder that holds the files: what workers are given."""
    commit: str | None
    """Commit of the hub repository; None for a local folder."""
    preset: TeacherPreset | None
    """The teacher preset of that name, if it is one."""


def resolve_model(name: str, revision: str | None = None, *, download: bool = True) -> ResolvedModel:
    """Find a model by preset name, local folder or hub id, downloading it if need be and the hub can be reached.

    A preset's very own name wins over a folder of that name; write `./name` for the folder. A folder wins over everything else that a
    preset may be called (`presets.teacher_preset`). Repositories in the local cache are found in any case, with or without the organisation.

    Args:
        revision: branch, tag or commit of a hub repository; its default branch if None.
        download: whether to fetch what is not here; without it the hub is not asked.

    Raises:
        ModelLoadError: there is no such model here or on the hub, or its checkpoint is incomplete.
    """
    teacher, student = teacher_preset(name), student_preset(name)
    if teacher is None and student is not None and student.id is None:
        raise ModelLoadError(f"{name}: this student preset is a fresh model without weights; it can be trained, not loaded")
    preset = teacher or student
    if preset is None and (name.startswith(("/", ".", "~")) or Path(name).is_dir()):
        if revision is not None:
            raise ModelLoadError(f"{name}: got revision {revision!r} with a local folder; revisions belong to hub models")
        path, commit = _folder(name), None
        id_or_path = str(path)
    else:
        id_or_path = (preset and preset.id) or name
        try:
            path = _snapshot(id_or_path, revision, name) if download else _cached(id_or_path, revision)
        except ModelLoadError:
            cached = _spelling_in_cache(id_or_path)
            if cached in (None, id_or_path):
                raise
            id_or_path, path = cached, _cached(cached, revision)
        commit = path.name
    if problems := validate_checkpoint(path):
        raise ModelLoadError(f"{name}: the checkpoint in {path} cannot be used: " + "; ".join(problems))
    return ResolvedModel(name=name, id_or_path=id_or_path, path=path, commit=commit, preset=teacher)


def _folder(name: str) -> Path:
    path = Path(name).expanduser().absolute()
    if path.is_dir():
        return path
    found = "a file" if path.exists() else "nothing"
    raise ModelLoadError(
        f"{name}: there is {found} at {path}, expected a folder with config.json and *.safetensors (names that start with "
        "'/', '.' or '~' are folders, all others presets or hub ids)"
    )


def _snapshot(repo_id: str, revision: str | None, name: str) -> Path:
    """Folder of one commit of a hub repository: from the hub if it has it for us, else from the local cache."""
    from huggingface_hub import HfApi, errors, snapshot_download

    # The first is the HTTP library's own base error, whichever of httpx or httpx2 this client was built on.
    failures: tuple[type[BaseException], ...] = errors.HfHubHTTPError.__bases__
    download = functools.partial(
        snapshot_download, repo_id, revision=revision, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)
    )
    try:
        within(HUB_TIMEOUT_S, lambda: HfApi().model_info(repo_id, revision=revision, timeout=HUB_TIMEOUT_S))
    except errors.HFValidationError as error:
        raise ModelLoadError(_hub_message(error, repo_id, revision, name)) from error
    except failures as error:
        try:
            return Path(download(local_files_only=True))
        except errors.LocalEntryNotFoundError:
            raise ModelLoadError(_hub_message(error, repo_id, revision, name)) from error
    try:
        return Path(download())
    except failures as error:
        raise ModelLoadError(
            f"{repo_id}: the download broke off ({type(error).__name__}: {error}); run the same command again, it resumes"
        ) from error


def _cached(repo_id: str, revision: str | None) -> Path:
    """Folder of one commit of a hub repository in the local cache."""
    from huggingface_hub import constants, errors, snapshot_download

    try:
        return Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED), local_files_only=True
            )
        )
    except (errors.LocalEntryNotFoundError, errors.HFValidationError) as error:
        close = close_names(repo_id, teacher_preset_names())
        raise ModelLoadError(
            f"{repo_id} is not in the local hub cache {constants.HF_HUB_CACHE} at revision {revision or 'main'!r}; "
            + (f"did you mean the preset {' or '.join(close)}? Else " if close else "")
            + f"fetch it with 'hf download {repo_id}'"
        ) from error


def _spelling_in_cache(name: str) -> str | None:
    """The hub repository in the local cache that a name means in any case, with or without the organisation; None if there is none.

    Raises:
        ModelLoadError: several are meant; they are named.
    """
    from huggingface_hub import constants

    folders = sorted(Path(constants.HF_HUB_CACHE).glob("models--*"))
    cached = [folder.name.removeprefix("models--").replace("--", "/") for folder in folders]
    found = [name] if name in cached else [repository for repository in cached if same_name(repository, name)]
    if len(found) > 1:
        raise ModelLoadError(
            f"{name}: several repositories of the local hub cache have that name, expected one of {', '.join(found)}"
        )
    return found[0] if found else None


def within(seconds: float, call: Callable[[], Answer]) -> Answer:
    """Result of `call`, or TimeoutError: a name lookup or a trickling answer can outlast the client's own timeouts."""
    future: Future[Answer] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # handed over, as concurrent.futures does; its pool would wait at exit
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(seconds)


def _hub_message(error: BaseException, repo_id: str, revision: str | None, name: str) -> str:
    """One line for each way a hub repository can be out of reach."""
    from huggingface_hub import constants, errors

    is_preset_like = name == repo_id and ("/" not in name or bool(close_names(name, teacher_preset_names())))
    close = close_names(name, teacher_preset_names()) or teacher_preset_names()
    subject = f"{name} is no preset (presets: {', '.join(close)}) and, as a hub repository," if is_preset_like else repo_id
    if isinstance(error, errors.HFValidationError):
        return f"{name!r} is neither a preset ({', '.join(close)}), nor a local folder, nor a hub id such as 'Qwen/Qwen2-7B'"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repo_id} is gated and you have no access: ask for it on https://huggingface.co/{repo_id}, then run "
            "'hf auth login' or set HF_TOKEN"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{subject} is not on the hub, or is private and not yours to see; check the name, or run 'hf auth login'"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r} on the hub; see https://huggingface.co/{repo_id}/tree/main"
    reason = "HF_HUB_OFFLINE is set" if isinstance(error, errors.OfflineModeIsEnabled) else one_line(error)
    return (
        f"{subject} is not, or not completely, in the local hub cache {constants.HF_HUB_CACHE} at revision "
        f"{revision or 'main'!r}, and the hub cannot be reached ({reason}). On a connected machine run "
        f"'hf download {repo_id}' and set HF_HOME to the folder above its 'hub' cache, or pass a local folder"
    )

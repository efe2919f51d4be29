"""Names become folders: presets, hub ids and local folders, on a connected machine, a disconnected one and one in between.

The hub is a small HTTP server on this machine that answers as the real one does; the client is the real one.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub.constants
import pytest
from huggingface_hub.utils import close_session

from pipeline.models.load import load_causal_lm, load_tokenizer
from pipeline.models.probe import probe_kv_spec
from pipeline.models.resolve import ModelLoadError, resolve_model, validate_checkpoint
from tests.checkpoints import lay_out_hub_cache, save_checkpoint, tiny_model

ROOT = Path(__file__).parents[2]
QWEN2_7B_HEADS = {"num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen2", **QWEN2_7B_HEADS)


@pytest.fixture
def hf_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache and no network."""
    home = tmp_path / "hf"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return home


class FakeHub(http.server.ThreadingHTTPServer):
    """The parts of the hub's HTTP interface that resolving and downloading a model use."""

    def __init__(self, repository: Path) -> None:
        super().__init__(("127.0.0.1", 0), FakeHubHandler)
        self.files = {path.name: path.read_bytes() for path in repository.iterdir()}
        self.commit = "c0ffee" * 6 + "c0de"
        self.error: tuple[int, str] | None = None
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class FakeHubHandler(http.server.BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def answer(self, with_body: bool) -> None:
        path = urlsplit(self.path).path
        self.server.requests.append(f"{self.command} {path}")
        headers = {"X-Repo-Commit": self.server.commit}
        status, body = 200, b""
        name = path.rpartition("/")[2]
        if self.server.error is not None:
            status, headers["X-Error-Code"] = self.server.error
        elif "/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.server.files.items()
            ]
            body = json.dumps(entries).encode()
        elif path.startswith("/api/models/"):
            body = json.dumps({"id": "Qwen/Qwen2-7B", "sha": self.server.commit}).encode()
        elif name in self.server.files:
            body = self.server.files[name]
            headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
        else:
            status, headers["X-Error-Code"] = 404, "EntryNotFound"
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(hf_home: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that has Qwen/Qwen2-7B, with pickled and duplicate weights beside the safetensors, and can be reached."""
    repository = tmp_path / "repository"
    shutil.copytree(checkpoint, repository)
    for unwanted in ("pytorch_model.bin", "consolidated.safetensors", "README.md", "modeling_evil.py"):
        (repository / unwanted).write_bytes(b"unwanted")
    with FakeHub(repository) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield server
        server.shutdown()
        close_session()


def test_a_preset_resolves_offline_from_the_hub_cache(hf_home: Path, checkpoint: Path) -> None:
    commit = lay_out_hub_cache(hf_home, "Qwen/Qwen2-7B", checkpoint)
    model = resolve_model("qwen2-7b")
    assert (model.name, model.id_or_path, model.commit) == ("qwen2-7b", "Qwen/Qwen2-7B", commit)
    assert model.path == hf_home / "hub/models--Qwen--Qwen2-7B/snapshots" / commit
    assert model.preset is not None
    assert model.preset.name == "qwen2-7b"


@pytest.mark.parametrize("name", ["Qwen2-7B", "QWEN2-7B", "Qwen/Qwen2-7B", "qwen/qwen2-7b"])
def test_a_preset_resolves_in_any_case_with_or_without_the_organisation(hf_home: Path, checkpoint: Path, name: str) -> None:
    commit = lay_out_hub_cache(hf_home, "Qwen/Qwen2-7B", checkpoint)
    for download in (True, False):
        model = resolve_model(name, download=download)
        assert (model.id_or_path, model.commit) == ("Qwen/Qwen2-7B", commit)
        assert model.preset is not None


@pytest.mark.parametrize("name", ["Some/Model-7B", "some/model-7b", "MODEL-7b"])
@pytest.mark.parametrize("download", [True, False])
def test_a_cached_repository_is_found_in_any_case_with_or_without_the_organisation(
    hf_home: Path, checkpoint: Path, name: str, download: bool
) -> None:
    commit = lay_out_hub_cache(hf_home, "Some/Model-7B", checkpoint)
    model = resolve_model(name, download=download)
    assert (model.id_or_path, model.commit, model.preset) == ("Some/Model-7B", commit, None)


def test_a_name_of_several_cached_repositories_is_asked_about(hf_home: Path, checkpoint: Path) -> None:
    for repository in ("Some/Model-7B", "other/model-7b"):
        lay_out_hub_cache(hf_home, repository, checkpoint)
    assert resolve_model("other/model-7b").id_or_path == "other/model-7b"
    with pytest.raises(
        ModelLoadError, match=r"model-7b: several repositories .* expected one of Some/Model-7B, other/model-7b"
    ):
        resolve_model("model-7b")


def test_the_environment_alone_makes_a_preset_resolve_and_load_offline(tmp_path: Path, checkpoint: Path) -> None:
    lay_out_hub_cache(tmp_path, "Qwen/Qwen2-7B", checkpoint)
    code = "from pipeline.models.load import resolve_model; print(resolve_model('qwen2-7b').path)"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    path = Path(done.stdout.strip())
    assert path.is_relative_to(tmp_path)
    assert len(load_tokenizer(path)) == 258
    assert probe_kv_spec(load_causal_lm(path)).layer(1).geometry == (4, 128, 128)


def test_a_hub_id_and_a_revision_resolve_offline(hf_home: Path, tmp_path: Path, checkpoint: Path) -> None:
    main = lay_out_hub_cache(hf_home, "some/model", checkpoint)
    other = lay_out_hub_cache(hf_home, "some/model", save_checkpoint(tmp_path / "other", seed=1), revision="v2")
    assert resolve_model("some/model").commit == main
    assert resolve_model("some/model", revision="v2").commit == other
    assert resolve_model("some/model", revision=main).commit == main
    assert resolve_model("some/model").preset is None


def test_an_uncached_model_offline_says_where_it_was_sought_and_what_to_do(hf_home: Path) -> None:
    with pytest.raises(ModelLoadError) as caught:
        resolve_model("qwen2-7b")
    message = str(caught.value)
    for part in (
        "Qwen/Qwen2-7B",
        str(hf_home / "hub"),
        "HF_HUB_OFFLINE is set",
        "hf download Qwen/Qwen2-7B",
        "HF_HOME",
        "local folder",
    ):
        assert part in message
    assert "\n" not in message


def test_a_mistyped_preset_is_answered_with_those_like_it(hf_home: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"qwen2-8b is no preset \(presets: qwen3-8b, qwen2-7b, qwen2.5-7b\)"):
        resolve_model("qwen2-8b")


def test_a_mistyped_preset_is_answered_with_those_like_it_where_the_hub_is_not_asked(hf_home: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"Qwen2-7b-x is not in the local hub cache .* did you mean the preset qwen2-7b"):
        resolve_model("Qwen2-7b-x", download=False)
    with pytest.raises(ModelLoadError, match=r"'main'; fetch it with 'hf download org/zzz'"):
        resolve_model("org/zzz", download=False)


@pytest.mark.parametrize("trickle", [pytest.param(False, id="silent"), pytest.param(True, id="trickling")])
def test_a_hub_that_does_not_answer_costs_at_most_five_seconds(
    hf_home: Path, monkeypatch: pytest.MonkeyPatch, trickle: bool
) -> None:
    def answer_a_byte_at_a_time() -> None:
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):
            for byte in b"HTTP/1.1 200 OK\r\nX-Padding: " + b"x" * 50:
                connection.send(bytes([byte]))
                stop.wait(0.2)

    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        if trickle:
            threading.Thread(target=answer_a_byte_at_a_time, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(ModelLoadError, match=r"hub cannot be reached .*'hf download Qwen/Qwen2-7B'"):
            resolve_model("qwen2-7b")
        assert time.monotonic() - start < 5
    stop.set()
    close_session()


def test_a_refused_connection_falls_back_on_the_cache(hf_home: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    commit = lay_out_hub_cache(hf_home, "Qwen/Qwen2-7B", checkpoint)
    assert resolve_model("qwen2-7b").commit == commit


def test_a_download_takes_weights_and_tokenizer_and_no_pickle_or_code(
    hub: FakeHub, hf_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = resolve_model("qwen2-7b")
    assert model.commit == hub.commit
    assert {path.name for path in model.path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve_model("qwen2-7b") == model


def test_a_cached_model_is_not_downloaded_again(hub: FakeHub) -> None:
    resolve_model("qwen2-7b")
    hub.requests.clear()
    resolve_model("qwen2-7b")
    assert not [request for request in hub.requests if "/resolve/" in request]


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        pytest.param(403, "GatedRepo", r"Qwen/Qwen2-7B is gated .*'hf auth login' or set HF_TOKEN", id="gated"),
        pytest.param(404, "RepoNotFound", r"Qwen/Qwen2-7B is not on the hub, or is private", id="missing"),
        pytest.param(404, "RevisionNotFound", r"Qwen/Qwen2-7B has no revision 'v9'", id="revision"),
        pytest.param(503, "", r"hub cannot be reached \(HfHubHTTPError: .*503", id="down"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(hub: FakeHub, status: int, code: str, message: str) -> None:
    hub.error = (status, code)
    with pytest.raises(ModelLoadError, match=message) as caught:
        resolve_model("qwen2-7b", revision="v9")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("code", ["GatedRepo", "RepoNotFound", "RevisionNotFound"])
def test_a_model_the_hub_no_longer_gives_still_resolves_from_the_cache(
    hub: FakeHub, hf_home: Path, checkpoint: Path, code: str
) -> None:
    commit = lay_out_hub_cache(hf_home, "Qwen/Qwen2-7B", checkpoint)
    hub.error = (404, code)
    assert resolve_model("qwen2-7b").commit == commit


def test_a_folder_resolves_to_itself(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    for name in (str(checkpoint), f"./{checkpoint.name}", checkpoint.name, f"~/{checkpoint.name}"):
        model = resolve_model(name)
        assert (model.path, model.id_or_path, model.commit) == (checkpoint, str(checkpoint), None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("./no-such-model", r"there is nothing at .*/no-such-model, expected a folder", id="relative"),
        pytest.param("/no/such/model", r"there is nothing at /no/such/model, expected a folder", id="absolute"),
        pytest.param("~/no-such-model", r"there is nothing at .*/no-such-model, expected a folder", id="home"),
        pytest.param("not a name", r"neither a preset .* nor a local folder, nor a hub id", id="no-name-at-all"),
        pytest.param("qwen2-tiny", r"fresh model without weights", id="fresh-student"),
    ],
)
def test_a_name_that_cannot_be_a_model_says_so(hf_home: Path, name: str, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        resolve_model(name)


def test_a_file_is_not_a_model_folder(checkpoint: Path) -> None:
    with pytest.raises(ModelLoadError, match="there is a file at"):
        resolve_model(str(checkpoint / "model.safetensors"))


def test_a_folder_has_no_revisions(checkpoint: Path) -> None:
    with pytest.raises(ModelLoadError, match="revision 'v2' with a local folder"):
        resolve_model(str(checkpoint), revision="v2")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param("no config", r"it has no config.json, only \['generation_config.json'", id="no-config"),
        pytest.param("bad config", r"a JSON file is damaged \(JSONDecodeError", id="bad-config"),
        pytest.param("no weights", r"weight files are missing: \['model.safetensors'\]", id="no-weights"),
        pytest.param("pickle", r"pickled weights .* never unpickles", id="pickle"),
        pytest.param("truncated", r"model.safetensors \(\d+ bytes\) is damaged or still downloading", id="truncated"),
        pytest.param("empty", r"model.safetensors \(0 bytes\) is damaged or still downloading", id="empty"),
    ],
)
def test_an_unusable_checkpoint_says_what_is_wrong(tmp_path: Path, checkpoint: Path, damage: str, message: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "no config":
        config.unlink()
    elif damage == "bad config":
        config.write_text('{"model_type": ')
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "empty":
        weights.write_bytes(b"")
    else:
        weights.unlink()
        if damage == "pickle":
            (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelLoadError, match=message):
        resolve_model(str(folder))


def test_a_sharded_checkpoint_needs_every_shard_of_its_index(tmp_path: Path) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path, max_shard_size="200KB")
    assert validate_checkpoint(tmp_path) == []
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert validate_checkpoint(tmp_path) == [
        f"weight files are missing: ['{shard.name}']; still downloading? 'hf download' resumes"
    ]

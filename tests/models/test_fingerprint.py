"""Fingerprints follow content and nothing else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pipeline.models.fingerprint import config_fingerprint, tokenizer_fingerprint, weights_fingerprint
from tests.checkpoints import byte_tokenizer, lay_out_hub_cache, save_checkpoint, tiny_model


def test_equal_weights_have_equal_fingerprints_wherever_they_lie(tmp_path: Path) -> None:
    first = save_checkpoint(tmp_path / "first", seed=1)
    commit = lay_out_hub_cache(tmp_path / "home", "some/model", first)
    snapshot = tmp_path / "home/hub/models--some--model/snapshots" / commit
    assert weights_fingerprint(snapshot) == weights_fingerprint(first)
    assert weights_fingerprint(save_checkpoint(tmp_path / "again", seed=1)) == weights_fingerprint(first)


def test_one_changed_weight_changes_the_fingerprint(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "model")
    before = weights_fingerprint(checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert weights_fingerprint(checkpoint) != before


def test_a_hub_snapshot_is_not_read_to_fingerprint_it(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "model")
    expected = weights_fingerprint(checkpoint)
    commit = lay_out_hub_cache(tmp_path, "some/model", checkpoint)
    repository = tmp_path / "hub/models--some--model"
    blob = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    (repository / "blobs" / blob).write_bytes(b"never read")
    assert weights_fingerprint(repository / "snapshots" / commit) == expected


def test_every_file_of_a_sharded_checkpoint_counts_and_no_other(tmp_path: Path) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path, max_shard_size="200KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    before = weights_fingerprint(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"another copy in another format")
    assert weights_fingerprint(tmp_path) == before
    shards[-1].write_bytes(shards[0].read_bytes())
    assert weights_fingerprint(tmp_path) != before


@pytest.mark.parametrize(
    ("field", "value", "same"),
    [
        pytest.param("transformers_version", "4.0.0", True, id="library-version"),
        pytest.param("_name_or_path", "/elsewhere", True, id="name"),
        pytest.param("rope_parameters", {"rope_theta": 2.0}, False, id="rope"),
        pytest.param("num_key_value_heads", 1, False, id="heads"),
    ],
)
def test_a_config_fingerprint_ignores_only_what_saving_again_changes(
    tmp_path: Path, field: str, value: object, same: bool
) -> None:
    checkpoint = save_checkpoint(tmp_path / "model")
    before = config_fingerprint(checkpoint)
    file = checkpoint / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    assert (config_fingerprint(checkpoint) == before) is same


def test_using_a_tokenizer_does_not_change_its_fingerprint() -> None:
    tokenizer = byte_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["some text", "more"], truncation=True, max_length=4, padding=True)
    assert tokenizer.backend_tokenizer.truncation is not None
    assert tokenizer_fingerprint(tokenizer) == before


def test_another_vocabulary_or_special_token_changes_the_fingerprint() -> None:
    before = tokenizer_fingerprint(byte_tokenizer())
    added, special = byte_tokenizer(), byte_tokenizer()
    added.add_tokens(["word"])
    special.eos_token = "<|pad|>"
    assert len({before, tokenizer_fingerprint(added), tokenizer_fingerprint(special)}) == 3

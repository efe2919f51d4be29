"""Records: canonical JSON, seals, create-once, differences, layer lists."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstore import FingerprintMismatchError, StoreFormatError
from kvstore.manifest import refuse_mismatch
from kvstore.records import canonical_json, create_sealed, differences, fingerprint, read_sealed, write_sealed
from kvstore.spec import KVSpec, format_layers, parse_layers
from kvstore.storage import locate
from tests.stores import small_spec


def test_the_fingerprint_ignores_key_order_and_is_pinned() -> None:
    record = {"b": [1, 2.5, None, True], "a": {"é": "ü", "x": 1e-7}}
    assert canonical_json(record) == '{"a":{"x":1e-07,"é":"ü"},"b":[1,2.5,null,true]}'
    assert fingerprint(record) == fingerprint(json.loads(json.dumps(record)))
    assert fingerprint({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"


def test_nan_cannot_enter_a_record(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        write_sealed(locate(tmp_path), "record.json", {"x": float("nan")})


def test_of_many_writers_exactly_one_creates(tmp_path: Path) -> None:
    def create(number: int) -> bool:
        return create_sealed(locate(tmp_path), "record.json", {"writer": number})

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(create, range(32)))
    assert outcomes.count(True) == 1
    assert read_sealed(locate(tmp_path), "record.json") == {"writer": outcomes.index(True)}
    assert [entry.key for entry in locate(tmp_path).entries("")] == ["record.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"a": 1}', b'{"a": 1, "sha256": "00"}', b"\xff\xfe"])
def test_anything_that_is_not_a_sealed_record_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(StoreFormatError, match=r"record\.json: (not a sealed|sha256)"):
        read_sealed(locate(tmp_path), "record.json")


def test_a_record_is_whole_or_absent_whenever_its_writer_is_killed(tmp_path: Path) -> None:
    script = (
        "from kvstore.records import create_sealed; from kvstore.storage import locate; import itertools, sys\n"
        "for n in itertools.count(): create_sealed(locate(sys.argv[1]), f'{n}.json', {'n': n, 'pad': 'x' * 100_000})"
    )
    for delay in (0.05, 0.1, 0.2):
        writer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
        while not any(tmp_path.glob("*.json")):
            time.sleep(0.01)
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert list(tmp_path.glob("*.json"))
        for file in tmp_path.glob("*.json"):
            assert read_sealed(locate(tmp_path), file.name)["n"] == int(file.stem)
            file.unlink()


def test_differences_name_the_leaves() -> None:
    found = list(differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}))
    assert [str(difference) for difference in found] == [
        "a.c: got 2, expected 4",
        "d: got 3, expected null",
        "e: got null, expected 5",
    ]
    assert [str(difference) for difference in differences([1, {"a": 2}], [1, {"a": 3}], "list")] == [
        "list[1].a: got 2, expected 3"
    ]
    assert [str(difference) for difference in differences([1], [1, 2], "list")] == ["list: got [1], expected [1, 2]"]


def test_a_mismatch_names_every_field_and_the_next_step() -> None:
    refuse_mismatch("s", stored={"a": 1}, wanted={"a": 1}, what="the signal")
    with pytest.raises(
        FingerprintMismatchError, match=r"(?s)the signal .* 2 field.*codec: got .q8., expected .mix.*layers.*Nothing was"
    ):
        refuse_mismatch("s", stored={"codec": "mix", "layers": "0-3"}, wanted={"codec": "q8", "layers": "0"}, what="the signal")


def test_a_spec_survives_json() -> None:
    spec = small_spec()
    assert KVSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    with pytest.raises(StoreFormatError, match="key_domain"):
        KVSpec.from_json({"layers": [], "ropes": [], "dtype": "float32"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("all", (0, 1, 2, 5)), ("0", (0,)), ("0-2", (0, 1, 2)), ("-1", (5,)), ("0,-1", (0, 5)), ("2, 0", (0, 2))],
)
def test_layer_lists_parse(text: str, expected: tuple[int, ...]) -> None:
    assert parse_layers(text, [0, 1, 2, 5]) == expected


@pytest.mark.parametrize("text", ["", "x", "3", "0-5", "-9", "2-0", "1.5"])
def test_bad_layer_lists_say_which_layers_there_are(text: str) -> None:
    with pytest.raises(ValueError, match=r"0-2,5"):
        parse_layers(text, [0, 1, 2, 5])


def test_layer_numbers_are_written_as_people_do() -> None:
    assert format_layers([5, 0, 1, 2, 9, 10]) == "0-2,5,9-10"
    assert format_layers([]) == "none"

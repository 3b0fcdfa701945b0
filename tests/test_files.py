"""Files are whole or absent, digests depend on content alone, and a folder has one writer."""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from rdpm_cli import files
from rdpm_cli.errors import DataError, RunError


def test_write_atomic_writes_the_bytes_and_makes_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.bin"
    files.write_atomic(path, lambda file: file.write(b"\x00\x01"))
    assert path.read_bytes() == b"\x00\x01"
    assert os.listdir(path.parent) == ["file.bin"]


@pytest.mark.parametrize("before", [None, b"old"])
def test_write_atomic_that_fails_leaves_what_was_there(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "file.bin"
    if before is not None:
        path.write_bytes(before)

    def write(file: BinaryIO) -> None:
        file.write(b"half of the new content")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(path, write)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({} if before is None else {"file.bin": before})


def test_write_atomic_shows_nothing_before_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    seen: list[bytes] = []

    def write(file: BinaryIO) -> None:
        file.write(b"new")
        file.flush()
        seen.append(path.read_bytes())

    files.write_atomic(path, write)
    assert (seen, path.read_bytes()) == ([b"old"], b"new")


def test_canonical_json_depends_on_content_not_on_order() -> None:
    one, other = {"b": [1, 2.5, None], "a": {"y": True, "x": "é"}}, {"a": {"x": "é", "y": True}, "b": [1, 2.5, None]}
    assert files.canonical_json(one) == files.canonical_json(other) == '{"a":{"x":"\\u00e9","y":true},"b":[1,2.5,null]}'
    assert files.canonical_json((1, 2)) == files.canonical_json([1, 2]) == "[1,2]"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_know_are_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.canonical_json({"score": value})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "result.json", {"score": value})
    assert list(tmp_path.iterdir()) == []


def test_digest_is_the_sha256_of_the_canonical_json() -> None:
    assert files.digest({"b": 1, "a": 2}) == hashlib.sha256(b'{"a":2,"b":1}').hexdigest()
    assert files.digest({"a": 2}) != files.digest({"a": "2"})


def test_sha256_file_is_that_of_the_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert files.sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"name": "é", "list": [1, 2.5, None, True], "nested": {"z": 1, "a": 2}}
    files.write_json(tmp_path / "value.json", value)
    assert files.read_json(tmp_path / "value.json") == value
    assert (tmp_path / "value.json").read_text().endswith("}\n")


@pytest.mark.parametrize("content", [b'{"half": ', b"", b"\xff\xfe\x00{"])
def test_broken_json_is_a_data_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.json cannot be read as JSON") as caught:
        files.read_json(path)
    assert (caught.value.exit_code, bool(caught.value.hint)) == (3, True)


@pytest.mark.parametrize(("folder", "text"), [(False, "does not exist"), (True, "cannot be read")])
def test_absent_json_is_a_data_error(tmp_path: Path, folder: bool, text: str) -> None:
    path = tmp_path / "absent.json"
    if folder:
        path.mkdir()
    with pytest.raises(DataError, match=rf"absent\.json {text}"):
        files.read_json(path)


HOLD = """
import sys
from pathlib import Path
from rdpm_cli import files
with files.only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_second_writer_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=rf"pid {first.pid} on ") as caught, files.only_writer(folder):
            pass
        assert (caught.value.exit_code, str(folder) in caught.value.message) == (1, True)
        first.communicate("go on\n")
    with files.only_writer(folder):  # the first is gone
        assert folder.is_dir()


def test_a_writer_that_was_killed_does_not_hold_the_folder(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        first.kill()
    with files.only_writer(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock.owner").read_text()


def test_a_refused_writer_leaves_the_first_ones_name(tmp_path: Path) -> None:
    with files.only_writer(tmp_path):
        for _ in range(2):
            with pytest.raises(RunError, match=f"pid {os.getpid()}"), files.only_writer(tmp_path):
                pass


def test_the_lock_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), files.only_writer(tmp_path):
        raise KeyError
    with files.only_writer(tmp_path):
        assert (tmp_path / ".lock.owner").exists()
    assert {p.name for p in tmp_path.iterdir()} <= {".lock"}


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ({"a": 1, "b": {"c": 2}}, {"b": {"c": 2}, "a": 1}, []),
        ({"a": 1}, {"a": 2}, ["a: 1 -> 2"]),
        ({"b": {"c": {"d": 1}, "e": 2}}, {"b": {"c": {"d": 3}, "e": 2}}, ["b.c.d: 1 -> 3"]),
        ({"a": 1}, {"b": 1}, ["a: 1 -> (absent)", "b: (absent) -> 1"]),
        ({"a": {"b": 1}}, {"a": None}, ["a: {'b': 1} -> None"]),
        ({"z": [1, 2], "a": 0}, {"z": [2, 1], "a": 1}, ["a: 0 -> 1", "z: [1, 2] -> [2, 1]"]),
    ],
)
def test_differences_names_every_leaf_that_differs(old: dict[str, Any], new: dict[str, Any], found: list[str]) -> None:
    assert files.differences(old, new) == found


def test_differences_ignores_what_json_does_to_a_dict() -> None:
    value = {"a": [1, 2], "b": {"c": 0.1, "d": None}}
    assert files.differences(json.loads(json.dumps(value)), value) == []

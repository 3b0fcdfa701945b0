"""Files are whole or absent, digests depend only on content, and a folder has one writer."""

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
from rdpm_cli.errors import DataError, RunError, UsageError


def test_write_atomic_writes_the_bytes_and_makes_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.bin"
    files.write_atomic(path, lambda file: file.write(b"\x00\x01"))
    assert path.read_bytes() == b"\x00\x01"
    assert os.listdir(path.parent) == ["file.bin"]


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, old: bytes | None) -> None:
    path = tmp_path / "file.bin"
    if old is not None:
        path.write_bytes(old)

    def write(file: BinaryIO) -> None:
        file.write(b"half of the new content")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(path, write)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({} if old is None else {"file.bin": old})


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    visible: list[bytes] = []

    def write(file: BinaryIO) -> None:
        file.write(b"new")
        file.flush()
        visible.append(path.read_bytes())

    files.write_atomic(path, write)
    assert (visible, path.read_bytes()) == ([b"old"], b"new")


def test_canonical_json_depends_on_content_not_on_order() -> None:
    one, other = {"b": [1, 2.5, None], "a": {"y": True, "x": "é"}}, {"a": {"x": "é", "y": True}, "b": [1, 2.5, None]}
    assert files.canonical_json(one) == files.canonical_json(other) == '{"a":{"x":"\\u00e9","y":true},"b":[1,2.5,null]}'
    assert files.canonical_json((1, 2)) == files.canonical_json([1, 2]) == "[1,2]"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_outside_json_are_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.canonical_json({"score": value})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "result.json", {"score": value})
    assert list(tmp_path.iterdir()) == []


def test_digest_is_the_sha256_of_the_canonical_json() -> None:
    assert files.digest({"b": 1, "a": 2}) == hashlib.sha256(b'{"a":2,"b":1}').hexdigest()
    assert files.digest({"a": 2}) != files.digest({"a": "2"})


def test_sha256_file_reads_all_bytes(tmp_path: Path) -> None:
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
    with pytest.raises(DataError, match=r"broken\.json") as caught:
        files.read_json(path)
    assert (caught.value.exit_code, bool(caught.value.hint)) == (3, True)


@pytest.mark.parametrize("folder", [False, True])
def test_absent_json_is_a_data_error(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "absent.json"
    if folder:
        path.mkdir()
    with pytest.raises(DataError, match=r"absent\.json"):
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
    ("old", "new", "lines"),
    [
        ({"a": 1, "b": {"c": 2}}, {"b": {"c": 2}, "a": 1}, []),
        ({"a": 1}, {"a": 2}, ["a: 1 -> 2"]),
        ({"b": {"c": {"d": 1}, "e": 2}}, {"b": {"c": {"d": 3}, "e": 2}}, ["b.c.d: 1 -> 3"]),
        ({"a": 1}, {"b": 1}, ["a: 1 -> (absent)", "b: (absent) -> 1"]),
        ({"a": {"b": 1}}, {"a": None}, ["a: {'b': 1} -> None"]),
        ({"z": [1, 2], "a": 0}, {"z": [2, 1], "a": 1}, ["a: 0 -> 1", "z: [1, 2] -> [2, 1]"]),
    ],
)
def test_differences_names_every_leaf_that_differs(old: dict[str, Any], new: dict[str, Any], lines: list[str]) -> None:
    assert files.differences(old, new) == lines


def test_differences_compares_values_as_json_reads_them_back() -> None:
    value = {"a": [1, 2], "b": {"c": 0.1, "d": None}}
    assert files.differences(json.loads(json.dumps(value)), value) == []


@pytest.mark.parametrize("blocked", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_a_usage_error(tmp_path: Path, blocked: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file") as caught:
        files.make_folder(tmp_path / blocked)
    assert caught.value.exit_code == 2


# ---- full disks ----------------------------------------------------------------------------------------------------


def test_space_is_checked_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda _: 1000)
    files.need_space(tmp_path, 1000)
    with pytest.raises(RunError, match=str(tmp_path)) as caught:
        files.need_space(tmp_path, 1001)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(("missing", "text"), [(2_000_000, "2.00 MB"), (10, "0.00 MB")], ids=["full", "quota"])
def test_a_full_disk_is_one_clear_error(
    missing: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda _: 1000)
    with pytest.raises(RunError, match=text), files.report_full_disk(tmp_path, lambda: missing):
        raise OSError(28, "No space left on device")


def test_another_failure_of_the_disk_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="I/O"), files.report_full_disk(tmp_path, lambda: 0):
        raise OSError(5, "I/O error")


def test_free_space_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert files.free_bytes(tmp_path / "not" / "yet") > 0

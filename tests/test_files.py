"""Files are whole or absent, digests depend only on content, and a folder has one writer."""

import errno
import hashlib
import io
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
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
        file.flush()
        assert path.exists() == (old is not None)  # readers see the old file
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(path, write)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({} if old is None else {"file.bin": old})


def test_writers_of_one_file_that_have_the_same_pid_do_not_disturb_each_other(tmp_path: Path) -> None:
    """As the first processes of two containers have, of which one begins while the other writes."""
    path = tmp_path / "file.bin"

    def write(file: BinaryIO) -> None:
        files.write_atomic(path, lambda other: other.write(b"whole"))
        file.write(b"whole")

    files.write_atomic(path, write)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file.bin": b"whole"}


def test_canonical_json_depends_on_content_not_on_order() -> None:
    one, other = {"b": [1, 2.5, None], "a": {"y": True, "x": "é"}}, {"a": {"x": "é", "y": True}, "b": [1, 2.5, None]}
    assert files.canonical_json(one) == files.canonical_json(other) == '{"a":{"x":"\\u00e9","y":true},"b":[1,2.5,null]}'
    assert files.canonical_json((1, 2)) == files.canonical_json([1, 2]) == "[1,2]"


def test_numbers_outside_json_are_refused(tmp_path: Path) -> None:
    for write in (files.canonical_json, lambda value: files.write_json(tmp_path / "result.json", value)):
        with pytest.raises(ValueError, match="JSON"):
            write({"score": math.nan})
    assert list(tmp_path.iterdir()) == []


def test_digests_are_the_sha256_of_the_canonical_json_and_of_all_bytes(tmp_path: Path) -> None:
    assert files.digest({"b": 1, "a": 2}) == hashlib.sha256(b'{"a":2,"b":1}').hexdigest()
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert files.sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"name": "é", "list": [1, 2.5, None, True], "nested": {"z": 1, "a": 2}}
    files.write_json(tmp_path / "value.json", value)
    assert files.read_json(tmp_path / "value.json") == value
    assert (tmp_path / "value.json").read_text().endswith("}\n")


@pytest.mark.parametrize("content", [b'{"half": ', b"", b"\xff\xfe\x00{", None])
def test_broken_or_absent_json_is_a_data_error_that_names_the_file(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "broken.json").write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.json"):
        files.read_json(tmp_path / "broken.json")


HOLD = """
import sys
from pathlib import Path
from rdpm_cli import files
with files.only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_folder_has_one_writer_at_a_time_even_after_a_kill(tmp_path: Path) -> None:
    for last in ("go on", "killed"):
        with subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as first:
            assert first.stdout is not None
            assert first.stdout.readline() == "held\n"
            for _ in range(2):
                with pytest.raises(RunError, match=rf"{tmp_path} .* pid {first.pid} on "), files.only_writer(tmp_path):
                    pass
            if last == "killed":
                first.kill()
            else:
                first.communicate("go on\n")
        with files.only_writer(tmp_path):
            assert str(os.getpid()) in (tmp_path / ".lock.owner").read_text()


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


@pytest.mark.parametrize("blocked", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_a_usage_error(tmp_path: Path, blocked: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file") as caught:
        files.make_folder(tmp_path / blocked)
    assert caught.value.exit_code == 2


def test_space_is_checked_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.free_bytes(tmp_path / "not" / "yet") > 0
    monkeypatch.setattr(files, "free_bytes", lambda _: 1000)
    files.need_space(tmp_path, 1000)
    with pytest.raises(RunError, match=str(tmp_path)):
        files.need_space(tmp_path, 1001)


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.ENOSPC, RunError), (errno.EDQUOT, RunError), (errno.EFBIG, RunError), (errno.EIO, OSError)],
)
def test_a_full_disk_is_one_clear_error_and_another_failure_is_passed_on(
    number: int, expected: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(expected, match=os.strerror(number)), files.report_full_disk(tmp_path):
        raise OSError(number, os.strerror(number))


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    pipe, content = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: content.append(pipe.read_bytes()))
    reader.start()
    files.write_atomic(pipe, lambda file: np.savez(file, a=np.arange(3)))  # it seeks where it can
    reader.join()
    assert np.load(io.BytesIO(content[0]))["a"].tolist() == [0, 1, 2]
    assert pipe.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]


def test_an_open_file_is_written_into_where_it_stands(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        log.write(b"before, ")
        log.flush()
        for name in (f"/dev/fd/{log.fileno()}", f"/proc/self/fd/{log.fileno()}"):
            files.write_atomic(Path(name), lambda file: file.write(b"new, "))
        log.write(b"after")
    assert (tmp_path / "log").read_bytes() == b"before, new, new, after"
    files.write_atomic(Path("/dev/null"), lambda file: file.write(b"new"))
    assert Path("/dev/null").is_char_device()
    with pytest.raises(OSError, match="/dev/full"):
        files.write_atomic(Path("/dev/full"), lambda file: file.write(b"new"))


@pytest.mark.parametrize("old", [None, b"old"])
def test_the_file_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path, old: bytes | None) -> None:
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "target", tmp_path / "link"
    link.symlink_to("disk/target")
    if old is not None:
        target.write_bytes(old)
    files.write_atomic(link, lambda file: file.write(b"new"))
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert os.listdir(target.parent) == ["target"]


def test_a_name_may_be_as_long_as_the_system_takes_it(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127):
        files.check_name(tmp_path / name)
        files.write_atomic(tmp_path / name, lambda file: file.write(b"new"))
        assert (tmp_path / name).read_bytes() == b"new"
        with pytest.raises(UsageError):
            files.check_name(tmp_path / f"{name}yz")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("~", "/home/me"), ("~/a b", "/home/me/a b"), ("a/~", "a/~"), ("~no-such-user/x", "~no-such-user/x"),
        ("digits:heldout", "digits:heldout"), ("C:/x", "C:/x"), ("x-{00..99}.tar", "x-{00..99}.tar"), ("", ""),
    ],
)  # fmt: skip
def test_paths_of_this_machine_are_taken(text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert files.local_path(text) == expected


@pytest.mark.parametrize("url", ["s3://b/x", "https://b/x", "file:///x", "hf://b"])
def test_urls_are_refused_as_text_and_as_paths_unless_they_exist(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for text in (url, str(Path(url))):
        with pytest.raises(UsageError, match="://"):
            files.local_path(text)
    Path(url).mkdir(parents=True)
    assert files.local_path(url) == url

"""Code stores at a URL: the same bytes from several machines, gone on with, refetched where they have changed."""

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from rdpm_cli.cli.app import run
from rdpm_cli.engine.mirror import Mirror

URL = "memory://bucket/codes"


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


class Machines:
    """Machines that share nothing but the bucket: each has a cache of its own."""

    def __init__(self, tmp_path: Path, images: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tmp_path, self.images, self.tokenizer, self.monkeypatch = tmp_path, images, tokenizer, monkeypatch
        self.use("a")

    def use(self, name: str) -> None:
        self.monkeypatch.setenv("XDG_CACHE_HOME", str(self.tmp_path / name))

    def tokenize(self, out: str | Path = URL, *words: str) -> int:
        fixed = (
            "--tokenizer",
            str(self.tokenizer),
            "--shard-size",
            "8",
            "--workers",
            "1",
            "--device",
            "cpu",
            "--quiet",
        )
        return run(["tokenize", str(self.images), str(out), *fixed, *words])


@pytest.fixture
def machines(
    tmp_path: Path, image_folder: Path, tiny_tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> Machines:
    return Machines(tmp_path, image_folder, tiny_tokenizer_file, monkeypatch)


def at_url() -> dict[str, bytes]:
    """The files of the store there, but for how each was started."""
    files = {
        name.rpartition("/")[2]: MemoryFileSystem().cat_file(name)
        for name in MemoryFileSystem().ls("/bucket/codes", False)
    }
    files.pop("run.json")
    return files


def in_folder(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "run.json" and not p.name.startswith(".")}


def test_shards_of_several_machines_are_the_store_that_one_writes_in_a_folder(
    machines: Machines, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for machine, shards in (("a", "0-1"), ("b", "2-99")):
        machines.use(machine)
        assert machines.tokenize(URL, "--shards", shards) == 0
    machines.use("c")
    capsys.readouterr()
    assert machines.tokenize(URL, "--finish", "--json") == 0
    assert json.loads(capsys.readouterr().out)["store"] == URL
    assert machines.tokenize(tmp_path / "codes") == 0
    assert at_url() == in_folder(tmp_path / "codes")


def test_commands_read_a_store_at_a_url(machines: Machines, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert machines.tokenize() == 0
    machines.use("b")
    capsys.readouterr()
    assert run(["inspect", URL, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "code store"
    assert run(["reconstruct", URL, str(tmp_path / "recon"), "--limit", "2", "--device", "cpu"]) == 0
    assert run(["train-gen", URL, "--recipe", "digits", "--dry-run"]) == 0


def test_another_machine_goes_on_from_the_shards_there(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machines.tokenize(URL, "--shards", "0-1") == 0
    written: list[str] = []
    send = MemoryFileSystem.pipe_file

    def listen(system: MemoryFileSystem, path: str, value: bytes, **options: object) -> None:
        written.append(path.rpartition("/")[2])
        send(system, path, value, **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", listen)
    machines.use("b")
    assert machines.tokenize() == 0
    assert not [name for name in written if "-00000" in name or "-00001" in name]
    last = [name for name in written if not name.startswith("run")]
    assert last[-1] == "manifest.json"
    note = written.index("note-00002.json")
    assert {name for name in written[note:] if "-00002" in name} == {"note-00002.json"}


def test_a_copy_that_is_older_than_the_url_is_not_sent_over_it(machines: Machines) -> None:
    assert machines.tokenize(URL, "--shards", "0") == 0
    machines.use("b")
    assert machines.tokenize(URL, "--shards", "1-99") == 0
    there = at_url()
    stale = next((machines.tmp_path / "a" / "rdpm").iterdir()) / "codes-00000.npy"
    stale.write_bytes(stale.read_bytes()[:-2])
    machines.use("a")
    assert machines.tokenize(URL, "--shards", "1") == 0
    assert at_url() == there


def test_emptying_the_copy_while_it_is_written_removes_nothing_at_the_url(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert machines.tokenize(URL, "--shards", "0-1") == 0
    there, send = at_url(), Mirror.send

    def empty_and_send(mirror: Mirror) -> None:
        for path in mirror.folder.glob("[!.]*"):
            path.unlink()
        send(mirror)

    monkeypatch.setattr(Mirror, "send", empty_and_send)
    assert machines.tokenize() == 1
    assert at_url() == there


def test_a_store_may_lie_at_the_url_of_a_folder(machines: Machines, tmp_path: Path) -> None:
    (tmp_path / "codes").mkdir()
    assert machines.tokenize(f"file://{tmp_path}/codes") == 0
    assert run(["verify", str(tmp_path / "codes")]) == 0
    assert run(["inspect", f"file://{machines.images}"]) == 0


def test_a_copy_is_fetched_again_where_the_store_there_is_another_one(
    machines: Machines, capsys: pytest.CaptureFixture[str]
) -> None:
    digests = []
    for seed in ("0", "1"):
        if MemoryFileSystem().exists("/bucket/codes"):
            fsspec.filesystem("memory").rm("/bucket/codes", recursive=True)
        machines.use("a")
        assert machines.tokenize(URL, "--seed", seed) == 0
        machines.use("b")
        capsys.readouterr()
        assert run(["inspect", URL, "--json"]) == 0
        digests.append(json.loads(capsys.readouterr().out)["digest"])
        copy = next((machines.tmp_path / "b" / "rdpm").iterdir())
        assert run(["verify", str(copy)]) == 0
        assert in_folder(copy) == at_url()
    assert digests[0] != digests[1]
    assert machines.tokenize(URL, "--seed", "0") == 2
    assert f"{URL} " in capsys.readouterr().err


@pytest.mark.parametrize(("files", "code"), [({}, 3), ({"cat.png": b""}, 3), ({"run.json": b"{"}, 3)])
def test_what_is_no_finished_store_is_not_read(files: dict[str, bytes], code: int, machines: Machines) -> None:
    for name, content in files.items():
        MemoryFileSystem().pipe_file(f"/bucket/codes/{name}", content)
    assert run(["train-gen", URL, "--recipe", "digits", "--dry-run"]) == code


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("cat.png", b"x", 2), ("cats/1.png", b"x", 2), ("run.json", b"{", 3), ("run.json", b"[1]", 3),
        ("manifest.json", b'{"name": "x"}', 3),
    ],
)  # fmt: skip
def test_a_store_is_not_written_among_other_files(name: str, content: bytes, code: int, machines: Machines) -> None:
    MemoryFileSystem().pipe_file(f"/bucket/codes/{name}", content)
    assert machines.tokenize() == code
    assert MemoryFileSystem().cat_file(f"/bucket/codes/{name}") == content
    assert len(MemoryFileSystem().ls("/bucket/codes")) == 1


def test_a_bucket_that_refuses_is_an_error_of_the_run(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **options: object) -> None:
        raise PermissionError("Forbidden")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "pipe_file", refuse)
        assert machines.tokenize() == 1
    assert machines.tokenize() == 0
    assert "manifest.json" in at_url()

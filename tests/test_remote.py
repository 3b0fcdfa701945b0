"""Images by URL: the same as from local files, read by ranges, in forked workers, in stores; errors of services."""

import json
import pickle
import sys
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pictures import encoded, make_tar, random_image, write_parquet

from rdpm_cli.cli.app import run
from rdpm_cli.codes.store import Manifest, source_of
from rdpm_cli.data.open import is_there, open_item, open_source
from rdpm_cli.errors import DataError, RunError, UsageError
from rdpm_cli.workers import in_order

SPECS = ("set.zip", "tars", "tars/x-*.tar", "tars/x-{0..2}.tar", "tars/x-0.tar", "set.parquet", "images")


@pytest.fixture
def packed(image_folder: Path, tmp_path: Path) -> Path:
    """The images as a zip, as three tars with a classes.txt, as parquet, and as a folder."""
    images = {path.relative_to(image_folder).as_posix(): path.read_bytes() for path in image_folder.glob("?/*")}
    root = tmp_path / "packed"
    for number, name in enumerate("abc"):
        members: dict[str, bytes] = {}
        for path in sorted((image_folder / name).iterdir()):
            members |= {path.name: path.read_bytes(), f"{path.stem}.cls": str(number).encode()}
        make_tar(root / "tars" / f"x-{number}.tar", members)
    (root / "tars" / "classes.txt").write_text("a\nb\nc\n")
    with zipfile.ZipFile(root / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in images.items():
            archive.writestr(name, raw)
            (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "images" / name).write_bytes(raw)
    numbers = ["abc".index(name[0]) for name in images]
    write_parquet(root / "set.parquet", list(images.values()), numbers, list("abc"), group=10)
    return root


def upload(folder: Path, url: str) -> str:
    fsspec.core.url_to_fs(url)[0].put(f"{folder}/", f"{url}/", recursive=True)
    return url


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://bucket/data"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def assert_the_same(packed: Path, url: str) -> None:
    for name in SPECS:
        local, remote = open_source(str(packed / name)), open_source(f"{url}/{name}")
        assert is_there(remote.spec), name
        for source in (remote, open_source(remote.spec), pickle.loads(pickle.dumps(remote))):
            assert (source.spec, source.digest()) == (f"{url}/{name}", local.digest())
            assert (source.names, source.labels, source.class_names) == (local.names, local.labels, local.class_names)
        pixels = [local.pixels(index, 16) for index in range(len(local))]
        drawn = in_order(partial(remote.pixels, size=16), range(len(local)), 2, "--workers 1")
        assert all(map(np.array_equal, drawn, pixels)), name


def test_images_by_url_are_those_of_the_same_local_files_also_in_forked_workers(packed: Path, memory: str) -> None:
    assert_the_same(packed, upload(packed, memory))
    item = open_item(f"{memory}/set.zip#3")
    assert np.array_equal(np.asarray(item), np.asarray(open_source(str(packed / "set.zip")).image(3)))


class Traffic(list[int]):
    """The bytes of every request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = MemoryFileSystem.cat_file

        def counting(system: MemoryFileSystem, path: str, start: Any = None, end: Any = None, **options: Any) -> Any:
            content = whole(system, path, start=start, end=end, **options)
            self.append(len(content))
            return content

        def refuse(*_: Any, **options: Any) -> None:
            raise AssertionError("read past the counter")

        monkeypatch.setattr(MemoryFileSystem, "cat_file", counting)
        monkeypatch.setattr(MemoryFileSystem, "get_file", refuse)


def test_listing_a_tar_reads_its_headers_and_an_image_its_own_bytes(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request for a pair of members, wherever the images are larger than a request."""
    image, count = random_image(400, 400, 0), 12
    members: dict[str, bytes] = {}
    for number in range(count):
        members |= {f"{number}.png": encoded(image), f"{number}.cls": b"0"}
    size = make_tar(tmp_path / "set" / "x.tar", members).stat().st_size
    upload(tmp_path / "set", memory)
    traffic = Traffic(monkeypatch)
    source = open_source(f"{memory}/x.tar")
    assert len(source) == count
    assert len(traffic) <= count + 4
    assert sum(traffic) < size / 50
    traffic.clear()
    source.image(7)
    assert traffic == [len(members["7.png"])]


def test_a_tar_of_small_images_is_listed_by_few_requests(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = encoded(random_image(8, 8, 0))
    size = make_tar(tmp_path / "set" / "x.tar", {f"{n}.png": image for n in range(2000)}).stat().st_size
    upload(tmp_path / "set", memory)
    traffic = Traffic(monkeypatch)
    assert len(open_source(f"{memory}/x.tar")) == 2000
    assert size > 2e6
    assert len(traffic) < 16


def test_an_image_of_a_zip_or_of_parquet_does_not_read_the_file(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [encoded(random_image(200, 200, seed)) for seed in range(20)]
    write_parquet(tmp_path / "set" / "x.parquet", images, [0] * 20, group=2)
    with zipfile.ZipFile(tmp_path / "set" / "x.zip", "w") as archive:
        for number, raw in enumerate(images):
            archive.writestr(f"a/{number:02d}.png", raw)
    upload(tmp_path / "set", memory)
    traffic = Traffic(monkeypatch)
    for name, most in (("x.zip", 2), ("x.parquet", 4)):  # parquet: a row group of 2 images, and the footer
        source = open_source(f"{memory}/{name}")
        source.image(7)
        assert sum(traffic) < most * len(images[0]) + 2e5, name
        traffic.clear()


@pytest.mark.parametrize(
    "name", ["gone.tar", "gone-*.tar", "tars/x-{0..3}.tar", "gone", "gone.zip", "gone.parquet", "gone.zip#3"]
)
def test_what_is_not_there_is_an_error_of_usage(name: str, packed: Path, memory: str, tmp_path: Path) -> None:
    url = upload(packed, memory)
    assert not is_there(f"{url}/{name}")
    assert run(["inspect", f"{url}/{name}"]) == 2
    with pytest.raises(UsageError):
        open_source(f"{url}/{name}")


def test_an_object_that_is_deleted_or_cut_short_is_no_bad_image_to_be_skipped(packed: Path, memory: str) -> None:
    source = open_source(f"{upload(packed, memory)}/tars")
    MemoryFileSystem().rm("/bucket/data/tars/x-0.tar")
    with pytest.raises(DataError) as caught:
        source.image(0)
    assert type(caught.value) is DataError
    assert "x-0.tar" in caught.value.message


@pytest.mark.parametrize("error", [PermissionError("Forbidden"), OSError(5, "reset"), TimeoutError(), Exception("429")])
def test_a_service_that_fails_is_an_error_of_the_run(
    error: Exception, packed: Path, memory: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = upload(packed, memory)
    sources = [open_source(f"{url}/{name}") for name in SPECS]

    def fail(*_: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fail)
    for source in sources:
        with pytest.raises(RunError):
            source.image(0)
        if not source.spec.endswith("images"):
            assert run(["inspect", source.spec]) == 1
    monkeypatch.setattr(MemoryFileSystem, "info", fail)
    monkeypatch.setattr(MemoryFileSystem, "glob", fail)
    for name in SPECS:
        capsys.readouterr()
        assert run(["inspect", f"{url}/{name}"]) == 1
        assert "memory://" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "package"),
    [("s3://b/x.tar", "rdpm[remote]"), ("gs://b/x.tar", "gcsfs"), ("hf://datasets/o/n/x.tar", "rdpm[hub]")],
)
def test_a_url_without_its_package_names_what_to_install(
    url: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("s3fs", "gcsfs", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, name, None)
    for scheme in ("s3", "gs", "hf"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    assert run(["inspect", url]) == 2
    assert package in capsys.readouterr().err


def test_names_of_data_and_of_models_of_the_hub_are_not_taken_for_each_other(
    image_folder: Path, tiny_tokenizer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for args in (
        ["tokenize", "hf://owner/name", str(tmp_path / "out"), "--tokenizer", str(tiny_tokenizer_file)],
        ["sample", "--ckpt", "hf://datasets/owner"],
        ["sample", "--ckpt", "hf://datasets/owner/name"],
        ["tokenize", str(image_folder), str(tmp_path / "out"), "--tokenizer", "hf://datasets/owner/name"],
    ):
        assert run(args) == 2
        assert "hf:/" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def stores_are_the_same(packed: Path, url: str, tokenizer: Path, out: Path) -> None:
    """By two workers, from a pattern of shards; the names of the two sources may differ, and nothing else."""
    manifests = []
    for name, spec in (("local", f"{packed}/tars/x-{{0..2}}.tar"), ("remote", f"{url}/tars/x-{{0..2}}.tar")):
        args = ["tokenize", spec, str(out / name), "--tokenizer", str(tokenizer), "--workers", "2"]
        assert run([*args, "--shard-size", "9", "--device", "cpu", "--quiet"]) == 0
        manifests.append(Manifest.load(out / name))
    assert manifests[1].data.source == f"{url}/tars/x-{{0..2}}.tar"
    contents = [{path.name: path.read_bytes() for path in (out / name).iterdir()} for name in ("local", "remote")]
    notes = [json.loads(content.pop("manifest.json")) for content in contents]
    for content, note in zip(contents, notes, strict=True):
        content.pop("run.json")
        note["data"].pop("source")
        note.pop("sha256")  # of the manifest itself
    assert contents[0] == contents[1]
    assert notes[0] == notes[1]
    source = source_of(manifests[1])
    assert source is not None
    assert source.spec.startswith(url)
    assert run(["reconstruct", str(out / "remote"), str(out / "recon"), "--limit", "2", "--device", "cpu"]) == 0


def test_a_store_from_a_url_has_the_bytes_of_one_from_local_files(
    packed: Path, memory: str, tiny_tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores_are_the_same(packed, upload(packed, memory), tiny_tokenizer_file, tmp_path)
    monkeypatch.setattr(MemoryFileSystem, "info", lambda *_: (_ for _ in ()).throw(OSError("offline")))
    assert source_of(Manifest.load(tmp_path / "remote")) is None
    assert run(["verify", str(tmp_path / "remote")]) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of botocore and moto
def test_s3_has_the_same_images_and_gives_the_same_store(
    packed: Path, tiny_tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a server of moto on this machine: uv pip install 'moto[server]' s3fs."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        fsspec.filesystem("s3").mkdir("bucket")
        url = upload(packed, "s3://bucket/data")
        assert_the_same(packed, url)
        stores_are_the_same(packed, url, tiny_tokenizer_file, tmp_path)
        for name in ("data/gone.tar", "data/gone-*.tar", "data/tars/x-{0..3}.tar"):
            assert run(["inspect", f"s3://bucket/{name}"]) == 2
        assert run(["inspect", "s3://another/x.tar"]) == 2
        args = ["tokenize", f"{packed}/images", "s3://bucket/codes", "--tokenizer", str(tiny_tokenizer_file)]
        for machine in "ab":
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
            assert run([*args, "--shard-size", "9", "--device", "cpu", "--quiet"]) == 0
            assert run(["verify", *map(str, (tmp_path / machine / "rdpm").iterdir())]) == 0
        assert run(["tokenize", *args[1:2], "s3://another/codes", *args[3:]]) == 2
    finally:
        server.stop()

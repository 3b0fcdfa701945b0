"""Files of tensors: they run no code, are verified on loading, and are whole or absent; published weights are found."""

import contextlib
import enum
import functools
import hashlib
import http.server
import pickle
import random
import threading
import zipfile
from argparse import Namespace
from collections import OrderedDict, deque
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CPU, assert_same
from injection import Disk
from processes import touch
from torch import nn

from rdpm_cli import checkpoint, files
from rdpm_cli.checkpoint import Inert, Published, WeightFile, find_weights, read_tensors
from rdpm_cli.errors import AbsentWeightsError, CheckpointError, RunError
from rdpm_cli.schema import Section


def flip(path: Path, position: int) -> None:
    """Flip the bits of one byte."""
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def test_tensors_come_back(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3), "b": {"c": 1.5}}, tmp_path / "file.pt")
    assert_same(read_tensors(tmp_path / "file.pt"), {"a": torch.arange(3), "b": {"c": 1.5}})


def test_a_file_of_anything_else_is_refused(tmp_path: Path) -> None:
    draw, path = random.Random(0), tmp_path / "file.pt"
    contents = [b"", b"hello world, this is text", b"access denied", bytes(range(256))]
    contents += [bytes(draw.choice(range(32, 127)) for _ in range(60)) for _ in range(300)]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"file\.pt"):
            read_tensors(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(1000)}, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    for size in range(1, len(content), 97):
        (tmp_path / "cut.pt").write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"cut\.pt"):
            read_tensors(tmp_path / "cut.pt")


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.pt"):
        with pytest.raises(CheckpointError, match=path.name) as caught:
            read_tensors(path, hint="the hint")
        assert (caught.value.exit_code, caught.value.hint) == (3, "the hint")


class Trap:
    """Its pickle makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return touch, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_pickled_code_runs(tmp_path: Path) -> None:
    for name, write in {"torch.pt": torch.save, "plain.pt": lambda x, f: f.write_bytes(pickle.dumps(x))}.items():
        write({"a": Trap(tmp_path / "made")}, tmp_path / name)
        with pytest.raises(CheckpointError, match=name) as caught:
            read_tensors(tmp_path / name)
        assert "weights_only" not in caught.value.message  # torch's advice to run the code
    assert not (tmp_path / "made").exists()


class Slots:
    """Pickled with keyword arguments for __new__, and with a state of slots."""

    __slots__ = ("side",)
    side: int

    class Inner:
        """Pickled by its outer class's name."""

    def __new__(cls, *, side: int) -> "Slots":
        made = super().__new__(cls)
        made.side = side
        return made

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, int]]:
        return (), {"side": self.side}


class Color(enum.Enum):
    RED = 1


class Names(dict[str, int]):
    """A mapping that is filled item by item."""


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_objects_of_any_class_are_inert_next_to_tensors(protocol: int, zipped: bool, tmp_path: Path) -> None:
    objects = [
        Trap(tmp_path / "made"), Slots(side=3), Slots.Inner(), Names(a=1), deque([1, 2]), {Slots: 1, Slots.Inner: 2},
        {Color.RED: 1, frozenset([1]): Slots}, np.float64(3), np.ones(3), np.dtype("f4"), {1, 2}, tmp_path, 1 << 3000,
        functools.partial(touch, "x"), tmp_path.exists, Namespace(lr=1), datetime(2020, 1, 1), range(3), b"bytes", len,
    ]  # fmt: skip
    tensors = {"a": nn.Parameter(torch.ones(2, 3).T), "b": torch.arange(3).bfloat16(), "c": torch.ones(2)[1:]}
    content = {"state_dict": OrderedDict(tensors), Slots: torch.ones(1), "objects": objects}
    path = tmp_path / "file.pt"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"file\.pt"):
        read_tensors(path)
    read = read_tensors(path, foreign=True)
    assert_same(dict(read["state_dict"]), tensors)
    assert read["objects"][:3] == [Inert] * 3
    assert not (tmp_path / "made").exists()


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
STATE = b"N}X\x0c\x00\x00\x00__defaults__Ns\x86"  # (None, {"__defaults__": None})
HOSTILE = {
    "a call": b"cos\nsystem\nX\x0a\x00\x00\x00touch made\x85R.",
    "a call by an instance": b"(X\x0a\x00\x00\x00touch madeios\nsystem\n.",
    "a name of names": b"\x8c\x02osX\x0b\x00\x00\x00path.exists\x93)R.",
    "an attribute of torch's function": REBUILD + STATE + b"b.",
    "an attribute of a class": b"ccollections\nOrderedDict\n" + STATE + b"b.",
    "an attribute of ours": b"crdpm_cli.checkpoint\nInert\n" + STATE + b"b.",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pickle_is_inert_or_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("file.pt", "w") as archive:
        archive.writestr("file/data.pkl", b"\x80\x02" + HOSTILE[kind])
        archive.writestr("file/version", "3\n")
    with contextlib.suppress(CheckpointError):
        assert read_tensors(Path("file.pt"), foreign=True) is Inert
    assert not Path("made").exists()
    assert torch._utils._rebuild_tensor_v2.__defaults__ == (None,)
    assert "__defaults__" not in vars(OrderedDict) | vars(Inert)


def model_file(path: Path, **changes: Any) -> dict[str, Any]:
    """Save a small judge-like model file."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        content = checkpoint.pack("rdpm-judge", {"width": 3}, nn.Linear(3, 2), class_names=["a"], provenance={})
    content |= changes
    checkpoint.save(path, content)
    return content


def test_a_model_file_comes_back_and_its_bytes_do_not_depend_on_its_name(tmp_path: Path) -> None:
    content = model_file(tmp_path / "judge.pt")
    assert_same(checkpoint.load(tmp_path / "judge.pt", "rdpm-judge"), content)
    assert_same(checkpoint.load(tmp_path / "judge.pt"), content)
    model_file(tmp_path / "other" / "two.pt")
    assert (tmp_path / "judge.pt").read_bytes() == (tmp_path / "other" / "two.pt").read_bytes()


def test_the_digest_covers_weights_and_config_only(tmp_path: Path) -> None:
    weights = {"a": torch.ones(2, 3), "b": torch.zeros(4)}
    digest = checkpoint.model_digest(weights, {"x": 1})
    assert digest == checkpoint.model_digest(dict(reversed(weights.items())), {"x": 1})
    variants = [{**weights, "a": torch.ones(3, 2)}, {**weights, "a": torch.ones(2, 3).double()}, {"b": weights["b"]}]
    digests = {checkpoint.model_digest(variant, {"x": 1}) for variant in variants}
    digests |= {checkpoint.model_digest(weights, {"x": 2}), digest}
    assert len(digests) == 5
    assert model_file(tmp_path / "a.pt")["digest"] == model_file(tmp_path / "b.pt", provenance={"x": 1})["digest"]


@pytest.mark.parametrize(
    ("changes", "kind", "token"),
    [
        ({"format": "other"}, "", "checkpoint"), ({}, "rdpm-tokenizer", "tokenizer"), ({"version": 9}, "", "9"),
        ({"digest": "0" * 64}, "", "digest"), ({"config": {"width": 4}}, "", "digest"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_or_damaged_is_refused(
    changes: dict[str, Any], kind: str, token: str, tmp_path: Path
) -> None:
    content = model_file(tmp_path / "judge.pt", **changes)
    with pytest.raises(CheckpointError, match=rf"judge\.pt.*{token}") as caught:
        checkpoint.load(tmp_path / "judge.pt", kind)
    assert (caught.value.exit_code, bool(caught.value.hint)) == (3, True)
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        checkpoint.check({name: value for name, value in content.items() if name != "weights"}, "x.pt")


def test_a_flipped_weight_is_found(tmp_path: Path) -> None:
    content = model_file(tmp_path / "judge.pt")
    raw = (tmp_path / "judge.pt").read_bytes()
    flip(tmp_path / "judge.pt", raw.index(content["weights"]["weight"].numpy().tobytes()) + 5)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(tmp_path / "judge.pt")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = model_file(tmp_path / "out" / "judge.pt")
    with monkeypatch.context() as patch:
        Disk(tmp_path / "out", 6_000, patch)
        with pytest.raises(RunError, match="out"):
            checkpoint.save(tmp_path / "out" / "judge.pt", {**content, "more": torch.zeros(10_000)})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["judge.pt"]
    assert_same(checkpoint.load(tmp_path / "out" / "judge.pt"), content)


class Small(Section):
    width: int


def test_a_config_of_another_version_is_a_data_error() -> None:
    assert checkpoint.config_of(Small, {"width": 3}, "x.pt") == Small(width=3)
    with pytest.raises(CheckpointError, match="height") as caught:
        checkpoint.config_of(Small, {"width": 3, "height": 4}, "x.pt")
    assert caught.value.exit_code == 3


def test_weights_are_filled_in_strictly(tmp_path: Path) -> None:
    content = model_file(tmp_path / "judge.pt")
    linear = nn.Linear(3, 2)
    checkpoint.fill(linear, content, "judge.pt")
    assert torch.equal(linear.weight, content["weights"]["weight"])
    for misfit, first in ((nn.Linear(3, 4), "[2, 3]"), (nn.Sequential(nn.Linear(3, 2)), '"0.weight"')):
        with pytest.raises(CheckpointError, match=r"judge\.pt") as refused:
            checkpoint.fill(misfit, content, "judge.pt")
        assert first in refused.value.message


def state(step: int) -> dict[str, Any]:
    weights = torch.full((100,), float(step))
    return {"step": step, "skipped": 0, "threads": 1, "players": {"tokenizer": {"weights": weights}}, "ema": None}


def test_the_newest_states_are_kept_with_their_sha256_and_the_newest_is_loaded(tmp_path: Path) -> None:
    assert checkpoint.load_newest_state(tmp_path, CPU) is None
    for step in (3, 7, 20, 100):
        path = checkpoint.save_state(tmp_path, step, state(step), keep=2)
    assert [step for step, _ in checkpoint.states(tmp_path)] == [20, 100]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"step-{step:09d}.pt{suffix}" for step in (20, 100) for suffix in ("", ".sha256")
    ]
    assert_same(checkpoint.load_newest_state(tmp_path, CPU), state(100))
    # In the format of `sha256sum --check`.
    assert path.with_name(f"{path.name}.sha256").read_text() == f"{files.sha256_file(path)}  {path.name}\n"


def test_a_flip_of_any_byte_of_a_state_is_found(tmp_path: Path) -> None:
    path = checkpoint.save_state(tmp_path, 3, state(3), keep=2)
    size, draw = path.stat().st_size, random.Random(0)
    for position in [0, size - 1, *draw.sample(range(size), 40)]:
        flip(path, position)
        with pytest.raises(CheckpointError, match=path.name):
            checkpoint.load_newest_state(tmp_path, CPU)
        flip(path, position)
    assert checkpoint.load_newest_state(tmp_path, CPU)


def published(content: bytes, url: str = "https://example.org/net.pth") -> Published:
    return Published(f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth", url)


def test_weights_are_found_in_the_environments_folder_then_in_torch_hubs(no_weights: Path) -> None:
    net = published(b"weights")
    hub = no_weights / "torch" / "hub" / "checkpoints" / net.file
    hub.parent.mkdir(parents=True)
    for path in (hub, no_weights / "weights" / net.file):
        path.write_bytes(b"weights")
        assert find_weights(net, None, "--weights FILE") == WeightFile(path, files.sha256_file(path), published=True)


def test_absent_weights_name_the_file_its_folders_and_its_address(no_weights: Path) -> None:
    net = published(b"weights")
    with pytest.raises(AbsentWeightsError, match=net.file) as caught:
        find_weights(net, None, "--weights FILE")
    for folder in (no_weights / "weights", no_weights / "torch" / "hub" / "checkpoints"):
        assert str(folder / net.file) in caught.value.message
    assert caught.value.exit_code == 3
    assert all(token in caught.value.hint for token in (net.url, "$RDPM_WEIGHTS", "--weights FILE"))


def test_a_looked_up_file_must_be_the_published_one_a_named_one_need_not(no_weights: Path) -> None:
    net = published(b"weights")
    other = no_weights / "weights" / net.file
    other.write_bytes(b"other weights")
    with pytest.raises(CheckpointError, match=net.file):
        find_weights(net, None, "--weights FILE")
    assert find_weights(net, other, "") == WeightFile(other, files.sha256_file(other), published=False)
    with pytest.raises(CheckpointError, match=r"mine\.pth"):  # an absent one is not replaced by another
        find_weights(net, no_weights / "mine.pth", "--weights FILE")


@pytest.fixture
def server() -> Iterator[str]:
    """The address of a server on loopback whose every file is b"weights"."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"weights")

        def log_message(self, format: str, *args: Any) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}/net.pth"
        listening.shutdown()


def test_a_download_is_whole_and_the_published_file_or_absent(no_weights: Path, server: str) -> None:
    net = published(b"weights", server)
    target = no_weights / "weights" / net.file
    assert find_weights(net, None, "--weights FILE", download=True).path == target
    assert target.read_bytes() == b"weights"
    for content, url in ((b"other", server), (b"third", "http://127.0.0.1:9/net.pth")):
        with pytest.raises(RunError, match=url):
            find_weights(published(content, url), None, "--weights FILE", download=True)
    assert [path.name for path in (no_weights / "weights").iterdir()] == [net.file]

"""`rdpm verify`: a flipped byte, a truncation or a missing file of a store or model file is found and named."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rows import Rows
from stores import NOT_THE_STORE, Making, MemoryImages

from rdpm_cli import checkpoint
from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.engine import look
from rdpm_cli.errors import CheckpointError, DataError

FLIPS, CUTS = 200, 25


@pytest.fixture
def store(tmp_path: Path, tiny_tokenizer_file: Path) -> Path:
    """36 images in shards of 10, two of them left out; 2 views, latents."""
    root = tmp_path / "codes"
    Making(root, MemoryImages(36, bad=(4, 30)), tiny_tokenizer_file, on_bad="skip", max_bad=0.1).finish()
    return root


def store_files(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name not in NOT_THE_STORE)


def message_of(path: Path, kind: type[DataError] = DataError) -> str:
    """The error of verifying a damaged store or file."""
    with pytest.raises(kind) as caught:
        look.verify(path)
    assert (caught.value.exit_code, bool(caught.value.hint)) == (3, True)
    return caught.value.message


def flip(content: bytes, random: np.random.Generator) -> bytes:
    """One byte changed into another."""
    offset, by = int(random.integers(len(content))), int(random.integers(1, 256))
    return content[:offset] + bytes([content[offset] ^ by]) + content[offset + 1 :]


def test_every_flipped_byte_of_a_store_is_found_and_named(store: Path, rows: Rows) -> None:
    random, names = np.random.default_rng(0), store_files(store)
    assert len(names) == 4 * 4 + 4
    for number in range(FLIPS):
        path = store / names[number % len(names)]
        content = path.read_bytes()
        path.write_bytes(flip(content, random))
        with rows.count("flipped bytes of a store found and named"):
            assert path.name in message_of(store)
        path.write_bytes(content)
    values = look.verify(store).values
    assert (values["images"], values["bad"], values["rows"], values["shards"]) == (34, 2, 68, 4)
    assert values["files"] == len(names)


def test_every_truncated_or_missing_file_of_a_store_is_named(store: Path, rows: Rows) -> None:
    random, names = np.random.default_rng(0), [name for name in store_files(store) if name != "manifest.json"]
    for number in range(2 * CUTS):
        path = store / names[number % len(names)]
        content = path.read_bytes()
        path.write_bytes(content[: random.integers(len(content))])
        with rows.count("truncations of a store found and named"):
            assert path.name in message_of(store)
        if path.suffix == ".npy":
            with pytest.raises(DataError, match=path.name):
                CodeStore(store)
        path.unlink()
        assert path.name in message_of(store)
        path.write_bytes(content)


def test_train_gen_refuses_a_damaged_shard(
    digits_codes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(digits_codes, tmp_path / "codes"))
    path = root / "codes-00000.npy"
    path.write_bytes(flip(path.read_bytes(), np.random.default_rng(1)))
    command = ["train-gen", str(root), "--recipe", "digits", "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert run_cli([*command, "--quiet", "network.depth=1", "train.batch=16"]) == 3
    assert path.name in capsys.readouterr().err


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A training state, as a run saves it."""
    players = {f"layer {n}": torch.randn(20, 30) for n in range(4)}
    return checkpoint.save_state(tmp_path, 7, {"step": 7, "threads": 1, "players": players, "ema": None}, keep=2)


def test_every_flipped_byte_of_a_training_state_is_found(state: Path, rows: Rows) -> None:
    content, random = state.read_bytes(), np.random.default_rng(0)
    assert look.verify(state).values["step"] == 7
    for _ in range(FLIPS):
        state.write_bytes(flip(content, random))
        with rows.count("flipped bytes of a training state found and named"):
            assert state.name in message_of(state, CheckpointError)


def test_a_flipped_byte_of_a_model_file_is_found_or_changes_nothing(
    tiny_tokenizer_file: Path, tmp_path: Path, rows: Rows
) -> None:
    """The digest covers weights and config; padding and headers that nobody reads may change."""
    path = Path(shutil.copy(tiny_tokenizer_file, tmp_path))
    content, random, undamaged = path.read_bytes(), np.random.default_rng(0), checkpoint.load(path)
    messages = []
    for _ in range(FLIPS):
        path.write_bytes(flip(content, random))
        with rows.count("flipped bytes of a model file found, or without effect"):
            try:
                look.verify(path)
            except CheckpointError as error:
                messages.append(error.message)
                continue
            loaded = checkpoint.load(path)
            assert (loaded["digest"], loaded["config"]) == (undamaged["digest"], undamaged["config"])
            assert all(torch.equal(loaded["weights"][k], value) for k, value in undamaged["weights"].items())
    assert len(messages) > FLIPS / 2
    assert all(path.name in message for message in messages)


def test_every_truncation_of_a_file_of_tensors_is_found(
    tiny_tokenizer_file: Path, state: Path, tmp_path: Path, rows: Rows
) -> None:
    for path in (state, Path(shutil.copy(tiny_tokenizer_file, tmp_path))):
        content = path.read_bytes()
        for keep in np.random.default_rng(0).integers(0, len(content), CUTS):
            path.write_bytes(content[:keep])
            with rows.count("truncations of a file of tensors found"):
                assert path.name in message_of(path, CheckpointError)

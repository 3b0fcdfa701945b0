"""`rdpm verify`: one flipped byte of a store or model file is found and named."""

import json
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import NOT_THE_STORE, Making, MemoryImages
from rows import Rows

from rdpm_cli import engine, files, modelfile
from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.codes import check
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.errors import CheckpointError, DataError, UsageError
from rdpm_cli.training import checkpoint

FLIPS, CUTS = 200, 25


@pytest.fixture(scope="module")
def whole_store(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> Path:
    """36 images in shards of 10, two of them left out; 2 views, latents. Read only."""
    root = tmp_path_factory.mktemp("whole") / "codes"
    wanted = {"on_bad": "skip", "max_bad": 0.1, "micro_batch": 4}
    Making(root, MemoryImages(36, bad=(4, 30)), tiny_tokenizer_file, **wanted).finish()
    return root


@pytest.fixture
def store(whole_store: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(whole_store, tmp_path / "copy"))


def damaged(root: Path) -> str:
    with pytest.raises(DataError) as caught:
        engine.verify(root)
    assert (caught.value.exit_code, bool(caught.value.hint)) == (3, True)
    return caught.value.message


def flip(content: bytes, random: np.random.Generator) -> bytes:
    """One byte changed into another."""
    place, by = int(random.integers(len(content))), int(random.integers(1, 256))
    return content[:place] + bytes([content[place] ^ by]) + content[place + 1 :]


def test_a_whole_store_is_whole(whole_store: Path) -> None:
    values = engine.verify(whole_store).values
    assert (values["images"], values["bad"], values["rows"], values["shards"]) == (34, 2, 68, 4)
    assert values["files"] == len([p for p in whole_store.iterdir() if p.name not in NOT_THE_STORE])


def test_every_flipped_byte_of_a_store_is_found_and_named(store: Path, rows: Rows) -> None:
    random = np.random.default_rng(0)
    names = sorted(p.name for p in store.iterdir() if p.name not in NOT_THE_STORE)
    assert len(names) == 4 * 4 + 4
    for number in range(FLIPS):
        path = store / names[number % len(names)]
        before = path.read_bytes()
        path.write_bytes(flip(before, random))
        with rows.count("flipped bytes of a store found and named"):
            assert path.name in damaged(store)
        path.write_bytes(before)
    engine.verify(store)


@pytest.mark.parametrize(
    "name", ["codes-00001.npy", "latents-00003.npy", "index-00000.npy", "names.jsonl", "bad.jsonl"]
)
@pytest.mark.parametrize("keep", [None, 0, 100, -1])
def test_a_truncated_or_missing_file_is_named(store: Path, name: str, keep: int | None) -> None:
    content = (store / name).read_bytes()
    if keep is None:
        (store / name).unlink()
    else:
        (store / name).write_bytes(content[:keep])
    assert name in damaged(store)


def test_every_damaged_file_is_named(store: Path) -> None:
    (store / "labels-00000.npy").unlink()
    (store / "names.jsonl").write_text("")
    (store / "codes-00002.npy").write_bytes(b"\0")
    message = damaged(store)
    assert "names.jsonl differs from its checksum" in message
    assert "labels-00000.npy is missing" in message
    assert "codes-00002.npy holds 1 bytes of " in message


def reseal(root: Path, change: Callable[[dict[str, Any]], object] = dict) -> None:
    """A manifest that vouches for the files as they are: what remains to be found is their content."""
    m = json.loads((root / "manifest.json").read_text())
    for table in (m["files"], *(shard["sha256"] for shard in m["shards"])):
        table.update({name: files.sha256_file(root / name) for name in table})
    change(m)
    m["sha256"] = files.digest({key: value for key, value in m.items() if key != "sha256"})
    files.write_json(root / "manifest.json", m)


@pytest.mark.parametrize(
    ("name", "place", "value", "text"),
    [
        ("codes-00001.npy", 3, 64, "holds code 64, and there are 64"),
        ("labels-00002.npy", 0, 3, "holds labels"),
        ("labels-00002.npy", 0, -1, "holds labels"),
        ("index-00000.npy", 0, 7, "not in the order"),
        ("index-00003.npy", -1, 36, "not in the order"),
        ("latents-00000.npy", 0, np.nan, "not finite"),
    ],
)
def test_content_out_of_range_is_found_under_fitting_checksums(
    store: Path, name: str, place: int, value: float, text: str
) -> None:
    array = np.load(store / name)
    array.reshape(-1)[place] = value
    np.save(store / name, array)
    reseal(store)
    message = damaged(store)
    assert name in message
    assert text in message


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.update(images=35), "manifest.json counts"),
        (lambda m: m.update(rows=70), "manifest.json counts"),
        (lambda m: m.update(tokenizer="0" * 64), "tokenizer.pt is tokenizer"),
        (lambda m: m["shards"].pop(), "manifest.json counts"),
        (lambda m: m["shards"][1]["sha256"].pop("codes-00001.npy"), "manifest.json lists"),
        (lambda m: m["files"].pop("names.jsonl"), "manifest.json lists"),
    ],
)
def test_a_manifest_that_does_not_fit_is_found(
    store: Path, change: Callable[[dict[str, Any]], object], text: str
) -> None:
    reseal(store, change)
    assert text in damaged(store)


@pytest.mark.parametrize("name", ["labels-00001.npy", "names.jsonl", "bad.jsonl"])
@pytest.mark.parametrize("text", [b"", b"[]\n", b"\x93NUMPY"])
def test_files_of_another_kind_are_found_under_fitting_checksums(store: Path, name: str, text: bytes) -> None:
    (store / name).write_bytes(text)
    reseal(store)
    assert name in damaged(store)


def test_names_and_bad_images_are_compared_with_the_shards(store: Path) -> None:
    lines = (store / "names.jsonl").read_text().splitlines(keepends=True)
    (store / "names.jsonl").write_text("".join(lines[1:]))
    bad = (store / "bad.jsonl").read_text().splitlines(keepends=True)
    (store / "bad.jsonl").write_text(bad[0])
    reseal(store)
    message = damaged(store)
    assert "names.jsonl does not name" in message
    assert "bad.jsonl does not name the 2 images" in message


def test_what_is_damaged_is_made_again_by_the_same_command(
    store: Path, whole_store: Path, tiny_tokenizer_file: Path
) -> None:
    for name in ("codes-00001.npy", "tokenizer.pt"):
        (store / name).write_bytes(b"\0")
        assert name in damaged(store)
        (store / name).unlink()
    again = Making(store, MemoryImages(36, bad=(4, 30)), tiny_tokenizer_file, micro_batch=4, on_bad="skip", max_bad=0.1)
    again.finish()
    assert engine.verify(store).values["digest"] == engine.verify(whole_store).values["digest"]


def test_train_gen_refuses_a_damaged_shard(
    digits_codes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(digits_codes, tmp_path / "codes"))
    content = (root / "codes-00000.npy").read_bytes()
    (root / "codes-00000.npy").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    command = ["train-gen", str(root), "--recipe", "digits", "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert run_cli([*command, "--quiet", "network.depth=1", "train.batch=16"]) == 3
    assert "codes-00000.npy differs from its checksum" in capsys.readouterr().err


# ---- decoding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 16])
def test_decoded_samples_have_the_recorded_psnr(digits_codes: Path, count: int) -> None:
    values = engine.verify(digits_codes, decode=count, device="cpu").values
    assert values["decoded"] == count
    assert values["psnr"] == values["recorded"]


def test_codes_that_decode_to_something_else_are_found(digits_codes: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(digits_codes, tmp_path / "codes"))
    codes = np.load(root / "codes-00000.npy")
    np.save(root / "codes-00000.npy", (codes + 1) % 64)
    reseal(root)
    engine.verify(root)
    with pytest.raises(DataError, match=r"image 0 \(a/00.png\) decodes at .* dB was recorded"):
        engine.verify(root, decode=2, device="cpu")


def test_without_the_images_nothing_is_compared_silently(whole_store: Path) -> None:
    with pytest.raises(UsageError, match="which are not here"):
        engine.verify(whole_store, decode=1)


# ---- model files ---------------------------------------------------------------------------------------------------


def complaint(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        engine.verify(path)
    assert (caught.value.exit_code, bool(caught.value.hint)) == (3, True)
    return caught.value.message


def _state(step: int, players: Any) -> dict[str, Any]:
    return {"step": step, "skipped": 0, "threads": 1, "players": players, "ema": None}


@pytest.fixture(scope="module")
def state_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state of training, as a run saves it."""
    tensors = {f"layer {n}": torch.randn(20, 30) for n in range(4)}
    return checkpoint.save(tmp_path_factory.mktemp("checkpoints"), 7, _state(7, tensors), keep=2)


@pytest.fixture(params=["tokenizer.pt", "step-000000007.pt"])
def model_file(request: pytest.FixtureRequest, tiny_tokenizer_file: Path, state_file: Path, tmp_path: Path) -> Path:
    """A copy of a file of tensors that a test may damage."""
    whole = {path.name: path for path in (tiny_tokenizer_file, state_file)}[request.param]
    return Path(shutil.copy(whole, tmp_path))


def test_every_flipped_byte_of_a_checkpoint_is_found_and_named(model_file: Path, rows: Rows) -> None:
    """Headers, padding and the seal itself among them."""
    content, random = model_file.read_bytes(), np.random.default_rng(0)
    engine.verify(model_file)
    for _ in range(FLIPS):
        model_file.write_bytes(flip(content, random))
        with rows.count(f"flipped bytes of {model_file.name} found and named"):
            assert model_file.name in complaint(model_file)


def test_every_flipped_byte_of_its_end_is_found(model_file: Path) -> None:
    content = model_file.read_bytes()
    for place in range(len(content) - 100, len(content)):
        model_file.write_bytes(content[:place] + bytes([content[place] ^ 32]) + content[place + 1 :])
        assert model_file.name in complaint(model_file)


def test_every_truncation_is_found_with_its_bytes(model_file: Path, store: Path, whole_store: Path, rows: Rows) -> None:
    """25 of a file of tensors, whose own end says how long it was, and 25 of the arrays of a store."""
    content, random = model_file.read_bytes(), np.random.default_rng(0)
    for keep in random.integers(0, len(content), CUTS):
        model_file.write_bytes(content[:keep])
        with rows.count("truncations found with file and bytes"):
            assert f"{model_file} is damaged, or no checkpoint: its end is missing" in (said := complaint(model_file))
            assert f"after {keep:,} bytes" in said
    names = sorted(path.name for path in whole_store.glob("*.npy"))
    for number in range(CUTS):
        path = store / names[number % len(names)]
        before = path.read_bytes()
        keep = int(random.integers(len(before)))
        path.write_bytes(before[:keep])
        with rows.count("truncations found with file and bytes"):
            assert f"{path.name} holds {keep:,} bytes of {len(before):,}" in damaged(store)
            with pytest.raises(DataError, match=rf"{path.name} holds {keep:,} bytes of {len(before):,}"):
                CodeStore(store)
        path.write_bytes(before)


def test_a_file_without_a_seal_is_compared_by_its_members(tiny_tokenizer_file: Path, tmp_path: Path) -> None:
    """As older versions wrote them: each flip in a member's content is found, those between them are not."""
    path = tmp_path / "tokenizer.pt"
    with path.open("wb") as file:
        torch.save(modelfile.load(tiny_tokenizer_file), file)
    content, random = path.read_bytes(), np.random.default_rng(1)
    assert engine.verify(path).values["digest"] == modelfile.load(tiny_tokenizer_file)["digest"]
    with zipfile.ZipFile(path) as archive:
        members = [archive.read(info) for info in archive.infolist() if info.file_size > 8]
    for member in members:
        start = content.index(member)
        path.write_bytes(content[:start] + flip(member, random) + content[start + len(member) :])
        assert f"{path} is damaged" in complaint(path)


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        ({"players": {}}, "step-000000007.pt", "is not a state of training"),
        (_state(8, {}), "step-000000007.pt", "not of the step in its name"),
        ({"step": Path("x")}, "step-000000007.pt", "it names pathlib"),
    ],
)
def test_a_file_is_no_state_of_training_by_its_name_alone(
    content: Any, name: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / name)  # without a seal, as an older rdpm or anybody writes it
    assert run_cli(["verify", str(tmp_path / name)]) == 3
    said = capsys.readouterr().err
    assert says in said
    assert "weights_only" not in said
    torch.save(_state(7, {}), tmp_path / name)
    assert str(engine.verify(tmp_path / name).values["seal"]).startswith("absent")


@pytest.mark.parametrize("name", ["demo", "samples"])
def test_a_folder_that_is_no_store_is_told_what_can_be_verified(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).mkdir()
    assert run_cli(["verify", str(tmp_path / name)]) == 3
    assert "name a code store of `rdpm tokenize`, or a tokenizer.pt" in capsys.readouterr().err


@pytest.mark.long
def test_how_fast_a_store_is_verified(tmp_path: Path, rows: Rows) -> None:
    """Megabytes a second of one core: CPU time, for other work may go on beside."""
    path = tmp_path / "codes.npy"
    path.write_bytes(bytes(range(256)) * (1 << 20))
    files.sha256_file(path)
    started = time.process_time()
    files.sha256_file(path)
    rate = path.stat().st_size / 1e6 / (time.process_time() - started)
    rows.note("verify", f"{rate:,.0f} MB a second of a core")
    assert rate > 500


@pytest.mark.parametrize("text", [b"", b"no zip", b"PK\x03\x04"])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(text)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        engine.verify(tmp_path / "x.pt")


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_answers_in_json_and_by_its_exit_code(
    digits_codes: Path, store: Path, tiny_tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(["verify", str(digits_codes), "--decode", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decoded"] == 2
    assert run_cli(["verify", str(tiny_tokenizer_file), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["kind"], answer["digest"]) == ("tokenizer", modelfile.load(tiny_tokenizer_file)["digest"])
    (store / "index-00002.npy").unlink()
    assert run_cli(["verify", str(store)]) == 3
    assert "index-00002.npy is missing" in capsys.readouterr().err
    assert run_cli(["verify", str(tiny_tokenizer_file), "--decode", "1"]) == 2
    assert run_cli(["verify", str(store.parent / "nothing")]) == 2


def test_codes_are_looked_at_in_parts(digits_codes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "ROWS_AT_ONCE", 7)
    engine.verify(digits_codes)

"""The code store: the meaning of its rows, the bytes of its files, and what a reader refuses.

Legend: N rows, T steps, C channels, S flattened positions; a row is one (image, view), view fastest."""

import json
import math
import os
import resource
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from stores import Making, content, latent_store
from torch import Tensor

from rdpm_cli import files, noise
from rdpm_cli.codes import store
from rdpm_cli.codes.store import CodeStore, Manifest, read_names, source_of, verify
from rdpm_cli.codes.write import StoreOptions
from rdpm_cli.data.open import open_source
from rdpm_cli.data.pixels import chw, to_model
from rdpm_cli.data.source import Source
from rdpm_cli.distributed import one_thread
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.config import QuantizerConfig, ScheduleConfig
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.tokenizer.quantizer import Quantizer


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_file: Path) -> Tokenizer:
    return model.load(tiny_tokenizer_file)[0]


@pytest.fixture(scope="module")
def source(image_folder: Path) -> Source:
    return open_source(str(image_folder))


MakeWork = Callable[..., Making]


@pytest.fixture
def work(tmp_path: Path, source: Source, tiny_tokenizer_file: Path) -> MakeWork:
    """work(name="codes", **settings): a store to be written under tmp_path."""

    def make(name: str = "codes", **settings: Any) -> Making:
        return Making(tmp_path / name, source, tiny_tokenizer_file, **settings)

    return make


def all_rows(codes: CodeStore) -> NDArray[np.int64]:
    return np.arange(len(codes), dtype=np.int64)


def step_noise(m: Manifest, index: int, view: int) -> Tensor:
    """eps_1..eps_T of one row by its address, (T, C, S)."""
    shape = (m.channels, math.prod(m.grid))
    steps = [noise.normal("encode", m.seed, index, view, t, shape) for t in range(1, m.steps + 1)]
    return torch.from_numpy(np.stack(steps))


def stored_latents_and_noise(codes: CodeStore) -> tuple[Tensor, Tensor]:
    """z (N, C, S) and eps (N, T, C, S) of all rows."""
    rows = all_rows(codes)
    eps = [step_noise(codes.manifest, int(codes.index[row]), int(row) % codes.manifest.views) for row in rows]
    return torch.from_numpy(codes.latents(rows).astype(np.float32)), torch.stack(eps)


# ---- rows ----------------------------------------------------------------------------------------------------------


def test_a_row_is_an_image_and_a_view_with_the_view_fastest(digits_codes: Path, source: Source) -> None:
    codes = CodeStore(digits_codes)
    rows = all_rows(codes)
    assert len(codes) == 72
    assert np.array_equal(codes.index, np.repeat(np.arange(36), 2))
    assert np.array_equal(codes.columns["labels"], np.repeat(source.need_labels(), 2))
    assert (codes.codes(rows).shape, codes.latents(rows).shape) == ((72, 4, 16), (72, 4, 16))
    assert codes.codes(rows).max() < 64
    assert read_names(digits_codes) == list(source.names)


def test_files_have_the_promised_names_types_and_shapes(digits_codes: Path, tiny_tokenizer_file: Path) -> None:
    arrays = {p.name: np.load(p, allow_pickle=False) for p in digits_codes.glob("*.npy")}
    assert {name: (array.dtype.str, array.shape) for name, array in arrays.items()} == {
        "codes-00000.npy": ("<u2", (72, 4, 4, 4)),
        "labels-00000.npy": ("<i4", (72,)),
        "index-00000.npy": ("<i8", (72,)),
        "latents-00000.npy": ("<f2", (36, 4, 4, 4)),
    }
    assert (digits_codes / "tokenizer.pt").read_bytes() == tiny_tokenizer_file.read_bytes()


@pytest.mark.parametrize("settings", [{"micro_batch": 128}, {"views": 4, "flip": True, "micro_batch": 10}])
@torch.no_grad()
def test_stored_codes_and_latents_equal_a_fresh_encode_with_odd_views_mirrored(
    work: MakeWork, tokenizer: Tokenizer, source: Source, settings: dict[str, Any]
) -> None:
    codes = work(**settings).finish()
    m = codes.manifest
    pixels = np.stack([source.pixels(i, 16) for i in range(10)])
    # Padded with black ones: convolutions move by 1e-7 with the batch's shape, not with its content.
    padded = np.concatenate([pixels, np.zeros((m.micro_batch - 10, 16, 16, 3), np.uint8)])
    with one_thread():
        plain = tokenizer.latents(to_model(chw(padded)))
        mirrored = tokenizer.latents(to_model(chw(padded[:, :, ::-1]))) if m.flip else plain
    for index in range(10):
        rows = np.flatnonzero(codes.index == index)
        z = torch.stack([plain[index], mirrored[index]] * (m.views // 2))
        eps = torch.stack([step_noise(m, index, view) for view in range(m.views)])
        assert np.array_equal(codes.codes(rows), tokenizer.quantizer.encode(z, eps).numpy())
        assert np.array_equal(codes.latents(rows), z.numpy())


@torch.no_grad()
def test_prefixes_rebuilt_from_codes_equal_what_the_tokenizer_saw(digits_codes: Path, tokenizer: Tokenizer) -> None:
    codes = CodeStore(digits_codes)
    rows, quantizer = all_rows(codes), tokenizer.quantizer
    z, eps = stored_latents_and_noise(codes)
    assert np.array_equal(quantizer.encode(z, eps).numpy(), codes.codes(rows))
    assert float(z.mean(1).abs().max()) < 1e-3  # LayerNorm over channels, rounded to fp16
    chain = quantizer(z, eps)
    stored = torch.from_numpy(codes.codes(rows).astype(np.int64))
    prefixes = [quantizer.prefix(stored, torch.full((len(rows),), t)) for t in range(1, 5)]
    for prefix, error in zip(prefixes, chain.error_T.tolist(), strict=True):
        assert float(F.mse_loss(prefix, z)) == pytest.approx(error, rel=1e-5)
    assert torch.allclose(chain.z_BCS, prefixes[-1], atol=1e-5)


def test_views_and_seeds_draw_different_codes(digits_codes: Path, work: MakeWork) -> None:
    codes = CodeStore(digits_codes)
    rows = all_rows(codes)
    assert np.array_equal(codes.latents(rows[0::2]), codes.latents(rows[1::2]))
    assert (codes.codes(rows[0::2]) != codes.codes(rows[1::2])).mean() > 0.3
    assert (work(seed=1).finish().codes(rows) != codes.codes(rows)).mean() > 0.3


@pytest.mark.parametrize("mirrored", [False, True])
def test_rows_are_gathered_across_shards_in_any_order(work: MakeWork, mirrored: bool) -> None:
    codes = work(flip=mirrored).finish()
    assert sorted(p.name for p in codes.root.glob("codes-*")) == [f"codes-{s:05d}.npy" for s in range(4)]
    whole = np.concatenate([np.load(p) for p in sorted(codes.root.glob("codes-*"))])
    latents = np.concatenate([np.load(p) for p in sorted(codes.root.glob("latents-*"))])
    rows = np.random.default_rng(0).integers(0, len(codes), 200)
    latent_rows = rows // 2 * 2 + rows % 2 if mirrored else rows // 2
    assert np.array_equal(codes.codes(rows), whole[rows].reshape(200, 4, 16))
    assert np.array_equal(codes.latents(rows), latents[latent_rows].reshape(200, 4, 16))
    assert codes.codes(rows[:0]).shape == (0, 4, 16)


def test_shards_do_not_change_the_rows_and_more_than_open_files_are_allowed(digits_codes: Path, work: MakeWork) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    made = work(shard_images=1, micro_batch=128).finish()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
        one, many = CodeStore(digits_codes), CodeStore(made.root)
        rows = all_rows(one)
        assert np.array_equal(one.codes(rows), many.codes(rows))
        assert np.array_equal(one.latents(rows), many.latents(rows))
        assert np.array_equal(one.columns["labels"], many.columns["labels"])
        assert np.array_equal(one.index, many.index)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("grid", [(7,), (2, 3, 4)])
@torch.no_grad()
def test_a_store_has_any_number_of_axes(grid: tuple[int, ...], tmp_path: Path) -> None:
    """Random latents: flat in memory, with their axes on disk, and codes that are Q of what is stored."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        quantizer = Quantizer(QuantizerConfig(codes=32, steps=3), ScheduleConfig(), 5, grid).eval()
    codes = latent_store(tmp_path / "codes", quantizer, 5)
    assert verify(codes.root).grid == grid
    on_disk = np.load(codes.root / "codes-00000.npy"), np.load(codes.root / "latents-00000.npy")
    assert [array.shape for array in on_disk] == [(50, 3, *grid), (25, 5, *grid)]
    assert np.array_equal(codes.codes(np.arange(50)), on_disk[0].reshape(50, 3, -1))
    z, eps = stored_latents_and_noise(codes)
    assert np.array_equal(quantizer.encode(z, eps).numpy(), codes.codes(all_rows(codes)))
    assert codes.columns["labels"].tolist() == [index % 3 for index in range(60) for _ in range(2)]


# ---- the manifest --------------------------------------------------------------------------------------------------


def test_manifest_holds_what_a_later_stage_needs(digits_codes: Path, source: Source) -> None:
    m = json.loads((digits_codes / "manifest.json").read_text())
    assert m.pop("sha256") == files.digest(m)
    digest = torch.load(digits_codes / "tokenizer.pt", weights_only=True)["digest"]
    sums = {p.name: files.sha256_file(p) for p in sorted(digits_codes.glob("*.npy"))}
    assert m.pop("shards") == [{"images": 36, "rows": 72, "sha256": sums}]
    names = ("tokenizer.pt", "names.jsonl")
    assert m.pop("files") == {name: files.sha256_file(digits_codes / name) for name in names}
    samples = m.pop("samples")
    assert [s["index"] for s in samples] == [number * 36 // 16 for number in range(16)]
    assert all(3 < s["psnr"] < 30 for s in samples)
    assert m.pop("noise") == pytest.approx(noise.normal("encode", 0, 0, 0, 1, (16,)).tolist())
    assert m == {
        "format": "rdpm-codes", "version": 2, "tokenizer": digest, "steps": 4, "grid": [4, 4], "codes": 64,
        "channels": 4, "views": 2, "flip": False, "latents": True, "seed": 0, "transform": "adm-center-crop",
        "resolution": 16, "class_names": ["a", "b", "c"], "dtype": "uint16", "device": "cpu", "precision": "fp32",
        "data": {"source": source.spec, "count": 36, "digest": source.digest()}, "micro_batch": 128,
        "shard_images": StoreOptions().shard_images, "images": 36, "rows": 72, "bad": 0,
    }  # fmt: skip


def test_the_store_knows_neither_its_folder_nor_the_host_nor_the_threads(
    digits_codes: Path, image_folder: Path, work: MakeWork
) -> None:
    with one_thread():
        elsewhere = work("elsewhere", shard_images=4096).finish()
    assert content(elsewhere.root) == content(digits_codes)
    manifest = (digits_codes / "manifest.json").read_text()
    assert str(digits_codes) not in manifest
    assert socket.gethostname() not in manifest.replace(str(image_folder), "")


def test_the_source_of_a_store_is_opened_while_it_is_the_same(digits_codes: Path, source: Source) -> None:
    m = Manifest.load(digits_codes)
    opened = source_of(m)
    assert opened is not None
    assert opened.digest() == source.digest()
    for change in ({"digest": "0" * 64}, {"source": "/gone"}):
        assert source_of(m.model_copy(update={"data": m.data.model_copy(update=change)})) is None
    assert source_of(m.model_copy(update={"transform": "adm-center-crop-jpeg-draft"})) is None


# ---- what a reader refuses -----------------------------------------------------------------------------------------


@pytest.fixture
def copied(digits_codes: Path, tmp_path: Path) -> Path:
    """A copy of the store that a test may damage."""
    return Path(shutil.copytree(digits_codes, tmp_path / "copy"))


def edit_manifest(root: Path, **changes: Any) -> None:
    manifest = {**json.loads((root / "manifest.json").read_text()), **changes}
    manifest["sha256"] = files.digest({key: value for key, value in manifest.items() if key != "sha256"})
    (root / "manifest.json").write_text(json.dumps(manifest))


def refused(root: Path, token: str, **options: Any) -> str:
    """The message of the DataError, with a hint, that opening the store raises."""
    with pytest.raises(DataError) as caught:
        CodeStore(root, **options)
    assert (caught.value.exit_code, bool(caught.value.hint)) == (3, True)
    assert token in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"format": "rdpm-codes"}'])
def test_an_absent_or_broken_manifest_is_named(copied: Path, text: str | None) -> None:
    (copied / "manifest.json").unlink()
    if text is not None:
        (copied / "manifest.json").write_text(text)
    refused(copied, "manifest.json")
    with pytest.raises(UsageError, match="nothing"):
        CodeStore(copied / "nothing")


def test_a_manifest_that_changed_or_of_another_format_is_refused(copied: Path) -> None:
    text = (copied / "manifest.json").read_text()
    (copied / "manifest.json").write_text(text.replace('"views": 2', '"views": 1'))
    refused(copied, "manifest.json")  # by its own checksum
    for change in ({"version": 1}, {"version": 3}, {"format": "rdpm-signals"}, {"unheard_of": 1}):
        (copied / "manifest.json").write_text(text)
        edit_manifest(copied, **change)
        refused(copied, "manifest.json")


def test_another_noise_stream_is_refused_under_the_seed_of_the_store(copied: Path) -> None:
    values = Manifest.load(copied).noise
    edit_manifest(copied, noise=[values[0] + 1e-7, *values[1:]])
    assert len(CodeStore(copied)) == 72
    for change in ({"noise": [values[0] + 1e-3, *values[1:]]}, {"noise": values, "seed": 1}):
        edit_manifest(copied, **change)
        refused(copied, "numpy")


def test_another_tokenizer_is_refused_with_both_digests(digits_codes: Path) -> None:
    digest = Manifest.load(digits_codes).tokenizer
    assert len(CodeStore(digits_codes, tokenizer=digest)) == 72
    assert "0" * 12 in refused(digits_codes, digest[:12], tokenizer="0" * 64)


@pytest.mark.parametrize("kind", ["codes", "labels", "index", "latents"])
@pytest.mark.parametrize("keep", [0, 60, -1, None])
def test_a_truncated_or_absent_file_is_named(copied: Path, kind: str, keep: int | None) -> None:
    path = copied / f"{kind}-00000.npy"
    data = path.read_bytes()[:keep]
    path.unlink()
    if keep is not None:
        path.write_bytes(data)
    refused(copied, path.name)


@pytest.mark.parametrize("array", [np.zeros((72, 4, 4, 4), np.int32), np.zeros((71, 4, 4, 4), np.uint16)])
def test_a_file_of_another_type_or_shape_is_named(copied: Path, array: NDArray[Any]) -> None:
    np.save(copied / "codes-00000.npy", array)
    refused(copied, "codes-00000.npy")


# ---- held-out images -----------------------------------------------------------------------------------------------


def test_about_two_percent_of_images_are_held_out_by_the_source_index_only() -> None:
    assert store.held_out(np.arange(1_000_000)).mean() == pytest.approx(0.02, abs=0.001)
    held, order = store.held_out(np.arange(10_000)), np.random.default_rng(0).permutation(10_000)
    assert np.array_equal(store.held_out(order), held[order])


@pytest.mark.parametrize("images", [2000, 36, 12])
@pytest.mark.parametrize("views", [1, 4])
def test_split_is_disjoint_complete_and_by_image(
    digits_codes: Path, monkeypatch: pytest.MonkeyPatch, images: int, views: int
) -> None:
    codes = CodeStore(digits_codes)
    codes.index = np.repeat(np.arange(images), views)
    monkeypatch.setattr(CodeStore, "__len__", lambda self: images * views)
    training, held_out = codes.split()
    assert np.array_equal(np.sort(np.concatenate([training, held_out])), np.arange(images * views))
    assert not set(codes.index[training]) & set(codes.index[held_out])
    assert 0 < len(held_out) < len(training)
    if images == 2000:
        assert np.array_equal(np.unique(codes.index[held_out]), np.flatnonzero(store.held_out(np.arange(2000))))

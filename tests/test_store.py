"""The code store: what its rows mean, which bytes it holds, and what it refuses.

Legend: N rows, T steps, C h w latent shape; a row is one (image, view), view fastest.
"""

import json
import os
import resource
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Making, content, encoded
from numpy.typing import NDArray
from torch import Tensor

from rdpm_cli import engine, files, noise
from rdpm_cli.codes import store, writing
from rdpm_cli.codes.manifest import Manifest
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.errors import DataError, RdpmError, RunError, UsageError
from rdpm_cli.images.sources import ImageSource, open_source
from rdpm_cli.images.tensors import chw, to_model
from rdpm_cli.threads import one_thread
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.model import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_file: Path) -> Tokenizer:
    return model.load(tiny_tokenizer_file)[0]


@pytest.fixture(scope="module")
def source(image_folder: Path) -> ImageSource:
    return open_source(str(image_folder))


MakeWork = Callable[..., Making]


@pytest.fixture
def work(tmp_path: Path, source: ImageSource, tiny_tokenizer_file: Path) -> MakeWork:
    """work(name="codes", **settings): a store to be written under tmp_path."""

    def make(name: str = "codes", **settings: Any) -> Making:
        return Making(tmp_path / name, source, tiny_tokenizer_file, **settings)

    return make


def all_rows(codes: CodeStore) -> NDArray[np.int64]:
    return np.arange(len(codes), dtype=np.int64)


def step_noise(m: Manifest, index: int, view: int) -> Tensor:
    """eps_1..eps_T of one row by its address, (T, C, h, w)."""
    shape = (m.channels, *m.grid)
    return torch.stack(
        [torch.from_numpy(noise.normal("encode", m.seed, index, view, t, shape)) for t in range(1, m.steps + 1)]
    )


def stored_latents_and_noise(codes: CodeStore) -> tuple[Tensor, Tensor]:
    """z (N, C, h, w) and eps (N, T, C, h, w) of all rows."""
    rows = all_rows(codes)
    eps = [step_noise(codes.manifest, int(codes.index[r]), int(codes.view(r))) for r in rows]
    return torch.from_numpy(codes.latents(rows).astype(np.float32)), torch.stack(eps)


def one_batch_shape(images: list[NDArray[np.uint8]], rows: int) -> Tensor:
    """The images padded with black ones: convolutions move by 1e-7 with the batch's shape, not with its content."""
    black = np.zeros((rows - len(images), *images[0].shape), dtype=np.uint8)
    return to_model(chw(np.concatenate([np.stack(images), black])))


# ---- what a row is ------------------------------------------------------------------------------------------------


def test_a_row_is_an_image_and_a_view_with_the_view_fastest(digits_codes: Path, source: ImageSource) -> None:
    codes = CodeStore(digits_codes)
    rows = all_rows(codes)
    assert len(codes) == 72
    assert np.array_equal(codes.index, np.repeat(np.arange(36), 2))
    assert np.array_equal(codes.view(rows), np.tile([0, 1], 36))
    assert np.array_equal(codes.labels, np.repeat(source.need_labels(), 2))
    assert codes.codes(rows).shape == (72, 4, 4, 4)
    assert codes.codes(rows).max() < 64
    assert codes.latents(rows).shape == (72, 4, 4, 4)


def test_files_have_the_promised_names_types_and_shapes(digits_codes: Path, tiny_tokenizer_file: Path) -> None:
    arrays = {p.name: np.load(p, allow_pickle=False) for p in digits_codes.glob("*.npy")}
    assert {name: (array.dtype.str, array.shape) for name, array in arrays.items()} == {
        "codes-00000.npy": ("<u2", (72, 4, 4, 4)),
        "labels-00000.npy": ("<i4", (72,)),
        "index-00000.npy": ("<i8", (72,)),
        "latents-00000.npy": ("<f2", (36, 4, 4, 4)),
    }
    assert (digits_codes / "tokenizer.pt").read_bytes() == tiny_tokenizer_file.read_bytes()


def test_names_say_which_image_an_index_is(digits_codes: Path, source: ImageSource) -> None:
    lines = [json.loads(line) for line in (digits_codes / "names.jsonl").read_text().splitlines()]
    assert lines == [{"index": index, "name": name} for index, name in enumerate(source.names)]


@torch.no_grad()
def test_stored_codes_and_latents_equal_a_fresh_encode(
    digits_codes: Path, tokenizer: Tokenizer, source: ImageSource
) -> None:
    codes = CodeStore(digits_codes)
    m = codes.manifest
    x = one_batch_shape([source.pixels(i, 16) for i in range(36)], m.micro_batch)
    with one_thread():
        z = tokenizer.latents(x)
    for index in range(36):
        rows = np.flatnonzero(codes.index == index)
        eps = torch.stack([step_noise(m, index, int(view)) for view in codes.view(rows)])
        fresh = tokenizer.quantizer.encode(z[[index, index]], eps)
        assert np.array_equal(codes.codes(rows), fresh.numpy())
        assert np.array_equal(codes.latents(rows), z[[index, index]].numpy())


@torch.no_grad()
def test_codes_are_q_of_the_stored_latent_its_seed_and_view(digits_codes: Path, tokenizer: Tokenizer) -> None:
    codes = CodeStore(digits_codes)
    rows = all_rows(codes)
    z, eps = stored_latents_and_noise(codes)
    assert np.array_equal(tokenizer.quantizer.encode(z, eps).numpy(), codes.codes(rows))
    assert float(z.mean(1).abs().max()) < 1e-3  # LayerNorm over channels, rounded to fp16


@torch.no_grad()
def test_prefixes_rebuilt_from_codes_equal_what_the_tokenizer_saw(
    digits_codes: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = CodeStore(digits_codes)
    rows, quantizer = all_rows(codes), tokenizer.quantizer
    z, eps = stored_latents_and_noise(codes)
    chosen: list[Tensor] = []
    bias = quantizer.bias

    def spy(q_BCHW: Tensor) -> Tensor:
        chosen.append(bias(q_BCHW))
        return chosen[-1]

    monkeypatch.setattr(quantizer, "bias", spy)
    chain = quantizer(z, eps)
    assert len(chosen) == 4
    stored = torch.from_numpy(codes.codes(rows).astype(np.int64))
    total = torch.zeros_like(z)
    for t in range(5):
        prefix = quantizer.prefix(stored, torch.full((len(rows),), t))
        assert torch.allclose(prefix, total, atol=1e-5)
        if t > 0:
            assert float(F.mse_loss(prefix, z)) == pytest.approx(float(chain.error_T[t - 1]), rel=1e-5)
        total = total + chosen[t] if t < 4 else total
    assert torch.allclose(chain.z_BCHW, total, atol=1e-6)


def test_views_and_seeds_draw_different_codes(digits_codes: Path, work: MakeWork) -> None:
    codes = CodeStore(digits_codes)
    rows = all_rows(codes)
    first, second = codes.codes(rows[0::2]), codes.codes(rows[1::2])
    assert np.array_equal(codes.latents(rows[0::2]), codes.latents(rows[1::2]))
    other = work(seed=1).finish().codes(rows)
    assert (first != second).mean() > 0.3
    assert (other != codes.codes(rows)).mean() > 0.3


@torch.no_grad()
def test_odd_views_of_a_flipped_store_are_mirrored(work: MakeWork, tokenizer: Tokenizer, source: ImageSource) -> None:
    codes = work(views=4, flip=True).finish()
    m = codes.manifest
    assert (len(codes), np.load(codes.root / "latents-00000.npy").shape) == (144, (20, 4, 4, 4))
    pixels = [source.pixels(i, 16) for i in range(10)]
    with one_thread():
        plain = tokenizer.latents(one_batch_shape(pixels, m.micro_batch))
        mirrored = tokenizer.latents(one_batch_shape([p[:, ::-1] for p in pixels], m.micro_batch))
    for index in range(10):
        mine = np.flatnonzero(codes.index == index)
        assert codes.view(mine).tolist() == [0, 1, 2, 3]
        z = torch.stack([plain[index], mirrored[index]] * 2)
        eps = torch.stack([step_noise(m, index, view) for view in range(4)])
        assert np.array_equal(codes.latents(mine), z.numpy())
        assert np.array_equal(codes.codes(mine), tokenizer.quantizer.encode(z, eps).numpy())


@pytest.mark.parametrize("flip", [False, True])
def test_rows_are_gathered_across_shards_in_any_order(work: MakeWork, flip: bool) -> None:
    codes = work(flip=flip).finish()
    assert sorted(p.name for p in codes.root.glob("codes-*")) == [f"codes-{s:05d}.npy" for s in range(4)]
    whole = np.concatenate([np.load(p) for p in sorted(codes.root.glob("codes-*"))])
    latents = np.concatenate([np.load(p) for p in sorted(codes.root.glob("latents-*"))])
    rows = np.random.default_rng(0).integers(0, len(codes), 200)
    own = rows // 2 * 2 + rows % 2 if flip else rows // 2
    assert np.array_equal(codes.codes(rows), whole[rows])
    assert np.array_equal(codes.latents(rows), latents[own])
    assert codes.codes(rows[:0]).shape == (0, 4, 4, 4)


def test_more_shards_than_open_files_are_allowed(work: MakeWork) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    made = work(shard_images=1).finish()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
        codes = CodeStore(made.root)
        assert np.array_equal(codes.codes(all_rows(codes)), made.codes(all_rows(made)))
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 72
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_store_beyond_memory_is_read_at_random_and_reads_the_same(
    digits_codes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = CodeStore(digits_codes)
    monkeypatch.setattr(files, "memory_bytes", lambda: 1000)
    beyond = CodeStore(digits_codes)
    assert (plain.exceeds_memory, beyond.exceeds_memory) == (False, True)
    flags = [line for line in Path("/proc/self/smaps").read_text().splitlines() if line.startswith("VmFlags")]
    assert sum(" rr" in line for line in flags) >= 2  # advised: codes and latents
    rows = all_rows(plain)
    assert np.array_equal(plain.codes(rows), beyond.codes(rows))
    assert np.array_equal(plain.latents(rows), beyond.latents(rows))


def test_shards_do_not_change_the_rows(digits_codes: Path, work: MakeWork) -> None:
    one, many = CodeStore(digits_codes), work(shard_images=7, micro_batch=128).finish()
    rows = all_rows(one)
    assert np.array_equal(one.codes(rows), many.codes(rows))
    assert np.array_equal(one.latents(rows), many.latents(rows))
    assert np.array_equal(one.labels, many.labels)
    assert np.array_equal(one.index, many.index)


# ---- the manifest -------------------------------------------------------------------------------------------------


def test_manifest_holds_what_a_later_stage_needs(digits_codes: Path, source: ImageSource) -> None:
    m = json.loads((digits_codes / "manifest.json").read_text())
    assert m.pop("sha256") == files.digest(m)
    digest = torch.load(digits_codes / "tokenizer.pt", weights_only=True)["digest"]
    assert m.pop("shards") == [
        {
            "images": 36,
            "rows": 72,
            "sha256": {p.name: files.sha256_file(p) for p in sorted(digits_codes.glob("*.npy"))},
        }
    ]
    beside = ("tokenizer.pt", "names.jsonl")
    assert m.pop("files") == {name: files.sha256_file(digits_codes / name) for name in beside}
    samples = m.pop("samples")
    assert [s["index"] for s in samples] == [place * 36 // 16 for place in range(16)]
    assert all(3 < s["psnr"] < 30 for s in samples)
    assert m.pop("noise") == pytest.approx(noise.normal("encode", 0, 0, 0, 1, (16,)).tolist())
    assert m == {
        "format": "rdpm-codes",
        "version": 2,
        "tokenizer": digest,
        "steps": 4,
        "grid": [4, 4],
        "codes": 64,
        "channels": 4,
        "views": 2,
        "flip": False,
        "latents": True,
        "seed": 0,
        "transform": "adm-center-crop",
        "resolution": 16,
        "class_names": ["a", "b", "c"],
        "data": {"source": source.spec, "count": 36, "digest": source.digest()},
        "dtype": "uint16",
        "device": "cpu",
        "precision": "fp32",
        "micro_batch": 128,
        "shard_images": engine.tokenizing.SHARD_IMAGES,
        "images": 36,
        "rows": 72,
        "bad": 0,
    }


def test_the_store_knows_neither_its_place_nor_the_host_nor_the_threads(
    digits_codes: Path, image_folder: Path, tiny_tokenizer_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "elsewhere"
    with one_thread():
        engine.tokenize(
            str(image_folder), out, tiny_tokenizer_file, engine.StoreOptions(views=2, latents=True), device="cpu"
        )
    assert content(out) == content(digits_codes)
    manifest = (digits_codes / "manifest.json").read_text()
    assert str(digits_codes) not in manifest
    assert socket.gethostname() not in manifest.replace(str(image_folder), "")


def test_tokenize_reports_the_store_it_wrote(image_folder: Path, tiny_tokenizer_file: Path, tmp_path: Path) -> None:
    result = engine.tokenize(str(image_folder), tmp_path / "codes", tiny_tokenizer_file, device="cpu")
    m = Manifest.load(tmp_path / "codes")
    assert result.values["digest"] == m.digest()
    assert (result.values["images"], result.values["views"], result.values["shape"]) == (36, 1, [4, 4, 4])
    assert (m.latents, m.views, (tmp_path / "codes" / "latents-00000.npy").exists()) == (False, 1, False)
    assert result.values["bytes"] == sum(p.stat().st_size for p in (tmp_path / "codes").glob("*.npy"))


def test_images_without_classes_are_refused(image_folder: Path, tiny_tokenizer_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no classes") as caught:
        engine.tokenize(str(image_folder / "a"), tmp_path / "codes", tiny_tokenizer_file, device="cpu")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "codes").exists()


# ---- interrupted and resumed --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, source: ImageSource, tiny_tokenizer_file: Path
) -> dict[str, bytes]:
    """The files of a store in micro-batches of 4 and shards of 10, written at one go."""
    work = Making(tmp_path_factory.mktemp("whole") / "codes", source, tiny_tokenizer_file, micro_batch=4)
    work.finish()
    return content(work.root)


@pytest.mark.parametrize("pieces", [1, 2, 4, 6])
def test_bytes_do_not_depend_on_an_interruption(work: MakeWork, uninterrupted: dict[str, bytes], pieces: int) -> None:
    """One piece: before the first image; two: inside the first shard; four: between shards; six: inside the second."""
    cut = work(micro_batch=4)
    running = cut.run()
    for _ in range(pieces):
        next(running)
    running.close()
    assert writing.missing_shards(cut.root, cut.plan) == ([0, 1, 2, 3] if pieces < 4 else [1, 2, 3])
    assert not (cut.root / "manifest.json").exists()
    cut.finish()
    assert content(cut.root) == uninterrupted


def test_bytes_do_not_depend_on_a_kill_in_the_middle_of_a_write(
    work: MakeWork, uninterrupted: dict[str, bytes]
) -> None:
    """What SIGKILL leaves: a temporary file of a process that is no more, and shards without their index."""
    cut = work(micro_batch=4)
    running = cut.run()
    for _ in range(5):
        next(running)
    running.close()
    (cut.root / "codes-00001.npy").write_bytes(b"of a shard without index")
    (cut.root / ".labels-00001.npy.4194999.tmp").write_bytes(b"half")
    cut.finish()
    assert content(cut.root) == uninterrupted


def test_finished_shards_are_not_encoded_again(work: MakeWork, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = work()
    running = cut.run()
    assert [next(running), next(running)] == [0, 10]
    running.close()
    assert writing.missing_shards(cut.root, cut.plan) == [1, 2, 3]
    seen = encoded(monkeypatch)
    assert next(cut.run()) == 10
    cut.finish()
    assert seen == list(range(10, 36))


def test_a_shard_without_its_index_is_written_again(work: MakeWork, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = work()
    cut.finish()
    before = content(cut.root)
    (cut.root / "index-00002.npy").unlink()  # the last of a shard's files to be renamed
    (cut.root / "codes-00002.npy").write_bytes(b"half")
    seen = encoded(monkeypatch)
    cut.finish()
    assert seen == list(range(20, 30))
    assert content(cut.root) == before


def test_a_finished_store_is_left_alone(work: MakeWork, monkeypatch: pytest.MonkeyPatch) -> None:
    done = work()
    done.finish()
    before = content(done.root)
    seen = encoded(monkeypatch)
    assert list(done.run()) == [36]
    assert (seen, content(done.root)) == ([], before)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"views": 3}, r"views: 2 -> 3"),
        ({"seed": 7}, r"seed: 0 -> 7"),
        ({"flip": True}, r"flip: False -> True"),
        ({"latents": False}, r"latents: True -> False"),
        ({"shard_images": 9}, r"shard_images: 10 -> 9"),
    ],
)
def test_other_settings_are_refused_by_name(work: MakeWork, settings: dict[str, Any], key: str, finished: bool) -> None:
    first = work()
    running = first.run()
    next(running)
    running.close()
    if finished:
        first.finish()
    before = content(first.root)
    with pytest.raises(UsageError, match=rf"was begun with other settings: .*{key}") as caught:
        next(work(**settings).run())
    assert (caught.value.exit_code, bool(caught.value.hint)) == (2, True)
    assert content(first.root) == before


def test_other_images_and_another_tokenizer_are_refused_by_name(work: MakeWork) -> None:
    first = work()
    next(first.run())
    other_images = work()
    data = other_images.plan.data.model_copy(update={"digest": "0" * 64})
    other_images.plan = other_images.plan.model_copy(update={"data": data})
    with pytest.raises(UsageError, match=r"data\.digest: "):
        next(other_images.run())
    other_tokenizer = work()
    other_tokenizer.plan = other_tokenizer.plan.model_copy(update={"tokenizer": "0" * 64})
    with pytest.raises(UsageError, match=r"tokenizer: "):
        next(other_tokenizer.run())


def test_a_folder_of_something_else_is_refused_and_left_alone(work: MakeWork) -> None:
    foreign = work()
    foreign.root.mkdir()
    (foreign.root / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="is not empty and not a code store") as caught:
        next(foreign.run())
    assert caught.value.exit_code == 2
    assert content(foreign.root) == {"thesis.tex": b"precious"}


def test_a_second_writer_is_refused_and_the_first_goes_on(work: MakeWork) -> None:
    first, second = work(), work()
    running = first.run()
    done = next(running)
    with pytest.raises(RunError, match=rf"pid {os.getpid()}\b") as caught:
        next(second.run())
    assert caught.value.exit_code == 1
    assert done + sum(running) == 36
    assert len(CodeStore(first.root)) == 72


def disk_with(free_bytes: int) -> Callable[[object], Any]:
    return lambda path: SimpleNamespace(f_bavail=free_bytes, f_frsize=1)


def test_a_full_disk_is_noticed_before_the_first_image(work: MakeWork, monkeypatch: pytest.MonkeyPatch) -> None:
    tight = work()
    size = sum(map(len, content(work("other").finish().root).values()))
    seen = encoded(monkeypatch)
    monkeypatch.setattr(os, "statvfs", disk_with(size // 2))
    with pytest.raises(RunError, match="disk full") as caught:
        next(tight.run())
    assert (caught.value.exit_code, seen) == (1, [])
    monkeypatch.setattr(os, "statvfs", disk_with(2 * size))
    assert len(tight.finish()) == 72


def test_resuming_needs_room_for_what_is_missing_only(work: MakeWork, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = work()
    running = cut.run()
    for _ in range(4):
        next(running)
    running.close()
    assert writing.missing_shards(cut.root, cut.plan) == [3]
    shard = sum(p.stat().st_size for p in cut.root.glob("*-00000.npy"))
    beside = sum((cut.root / name).stat().st_size for name in ("tokenizer.pt", "names.jsonl"))
    monkeypatch.setattr(os, "statvfs", disk_with(shard + beside + 4 * writing.MANIFEST_BYTES))
    assert len(cut.finish()) == 72


# ---- what a reader refuses ----------------------------------------------------------------------------------------


@pytest.fixture
def copied(digits_codes: Path, tmp_path: Path) -> Path:
    """A copy of the store that a test may damage."""
    return Path(shutil.copytree(digits_codes, tmp_path / "copy"))


def edit_manifest(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    change(manifest)
    manifest["sha256"] = files.digest({key: value for key, value in manifest.items() if key != "sha256"})
    (root / "manifest.json").write_text(json.dumps(manifest))


def refused(root: Path, text: str, **options: Any) -> RdpmError:
    """The DataError, with a hint, that opening the store raises."""
    with pytest.raises(DataError, match=text) as caught:
        CodeStore(root, **options)
    assert caught.value.exit_code == 3
    return caught.value


def test_a_path_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no code store .*nothing") as caught:
        CodeStore(tmp_path / "nothing")
    assert (caught.value.exit_code, "rdpm tokenize" in caught.value.hint) == (2, True)


def test_a_store_without_manifest_says_to_run_again(work: MakeWork, tmp_path: Path) -> None:
    begun = work()
    next(begun.run())
    assert "run the same `rdpm tokenize` again" in refused(begun.root, "has no manifest").hint
    (tmp_path / "empty").mkdir()
    assert "make one with `rdpm tokenize`" in refused(tmp_path / "empty", "has no manifest").hint


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "rdpm-codes"}'])
def test_a_broken_manifest_is_named(copied: Path, text: str) -> None:
    (copied / "manifest.json").write_text(text)
    refused(copied, r"manifest\.json")


@pytest.mark.parametrize(
    ("key", "value"), [("version", 1), ("version", 3), ("format", "rdpm-signals"), ("unheard_of", 1)]
)
def test_a_manifest_of_another_format_is_refused(copied: Path, key: str, value: object) -> None:
    edit_manifest(copied, lambda manifest: manifest.update({key: value}))
    refused(copied, r"manifest")


def test_another_noise_stream_is_refused(copied: Path) -> None:
    def nudge(by: float) -> Callable[[dict[str, Any]], object]:
        return lambda manifest: manifest["noise"].__setitem__(3, manifest["noise"][3] + by)

    edit_manifest(copied, nudge(1e-7))
    assert len(CodeStore(copied)) == 72
    edit_manifest(copied, nudge(1e-3))
    assert "rdpm tokenize" in refused(copied, "draws other noise").hint


def test_the_noise_is_compared_under_the_seed_of_the_store(copied: Path) -> None:
    edit_manifest(copied, lambda manifest: manifest.update(seed=1))
    refused(copied, "draws other noise")


def test_another_tokenizer_is_refused_with_both_digests(digits_codes: Path) -> None:
    own = Manifest.load(digits_codes).tokenizer
    assert len(CodeStore(digits_codes, tokenizer=own)) == 72
    error = refused(digits_codes, rf"coded by tokenizer {own[:12]}, not 000000000000", tokenizer="0" * 64)
    assert "rdpm tokenize" in error.hint


@pytest.mark.parametrize("kind", ["codes", "labels", "index", "latents"])
@pytest.mark.parametrize("keep", [0, 60, -1])
def test_a_truncated_shard_is_named(copied: Path, kind: str, keep: int) -> None:
    path = copied / f"{kind}-00000.npy"
    path.write_bytes(path.read_bytes()[:keep])
    refused(copied, rf"{kind}-00000\.npy")


@pytest.mark.parametrize("kind", ["codes", "labels", "index", "latents"])
def test_an_absent_shard_is_named(copied: Path, kind: str) -> None:
    (copied / f"{kind}-00000.npy").unlink()
    refused(copied, rf"{kind}-00000\.npy cannot be read")


@pytest.mark.parametrize("array", [np.zeros((72, 4, 4, 4), np.int32), np.zeros((71, 4, 4, 4), np.uint16)])
def test_a_shard_of_another_type_or_shape_is_named(copied: Path, array: NDArray[Any]) -> None:
    np.save(copied / "codes-00000.npy", array)
    refused(copied, rf"codes-00000\.npy holds {array.dtype} \({len(array)}, ")


# ---- held-out images ----------------------------------------------------------------------------------------------


def test_about_two_percent_of_source_indices_are_held_out() -> None:
    assert store.held_out(np.arange(1_000_000)).mean() == pytest.approx(0.02, abs=0.001)
    assert store.held_out(np.arange(1500)).sum() == pytest.approx(30, abs=12)


def test_holding_out_depends_on_the_source_index_alone() -> None:
    index = np.arange(10_000)
    held = store.held_out(index)
    order = np.random.default_rng(0).permutation(10_000)
    assert np.array_equal(store.held_out(index[order]), held[order])
    assert np.array_equal(store.held_out(np.repeat(index, 3)), np.repeat(held, 3))
    assert np.array_equal(store.held_out(index[5000:]), held[5000:])


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
    assert len(held_out) > 0
    assert len(training) > len(held_out)
    if images == 2000:
        assert np.array_equal(np.unique(codes.index[held_out]), np.flatnonzero(store.held_out(np.arange(2000))))

"""Extractors and their weight files; the features of sets as arrays, saved and reused by `--features`."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extractors import CPU, Blocks, image_set, make_judge, pixels, save_judge
from torch import Tensor

from rdpm_cli import checkpoint, files
from rdpm_cli.checkpoint import Published
from rdpm_cli.data.pixels import chw, to_model
from rdpm_cli.device import one_thread
from rdpm_cli.errors import CheckpointError, DataError, RunError, UsageError
from rdpm_cli.evaluation import features
from rdpm_cli.evaluation.features import Activations, collect, collect_shared, open_extractor

# ---- features of sets ----------------------------------------------------------------------------------------------


def test_features_are_in_order_whatever_the_batches() -> None:
    images = pixels(10)
    whole = collect(Blocks(), [images])
    assert len(whole) == 10
    assert np.array_equal(whole.features_ND, Blocks()(chw(images)).features_BD.numpy())
    assert whole.predicted.tolist() == images.astype(np.float64).mean((1, 2)).argmax(1).tolist()
    for size in (1, 3, 7):
        parts = collect(Blocks(), [images[i : i + size] for i in range(0, 10, size)])
        assert np.array_equal(parts.features_ND, whole.features_ND)
        assert parts.sha256 == whole.sha256
    assert np.array_equal(collect(Blocks(), image_set(images)).features_ND, whole.features_ND)


def test_pieces_do_not_change_features(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = collect_shared(Blocks(), image_set(pixels(40)), spatial=True)
    assert whole is not None
    for piece, batch in ((7, 64), (40, 3), (1, 1)):
        monkeypatch.setattr(features, "PIECE", piece)
        monkeypatch.setattr(features, "BATCH", batch)
        parts = collect_shared(Blocks(), image_set(pixels(40)), spatial=True)
        assert parts is not None
        assert parts.sha256 == whole.sha256
        for name in ("features_ND", "logits_NK", "spatial_NP"):
            assert np.allclose(getattr(parts, name), getattr(whole, name), rtol=1e-6), name


@pytest.mark.parametrize("count", [0, 1, 5, 6])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_pieces_of_all_ranks_are_put_in_order(count: int, size: int) -> None:
    numbers = list(range(count))
    assert features.in_order([numbers[rank::size] for rank in range(size)]) == numbers


def test_the_identity_of_a_set_follows_its_pixels_and_their_order() -> None:
    images = pixels(4)
    changed = images.copy()
    changed[3, 0, 0, 0] ^= 1
    sets = [images, images[::-1], images[:3], changed, images.reshape(4, 8, 32, 3)]
    assert len({features.set_digest(features.image_digests(one)) for one in sets}) == 5


def test_no_images_and_values_that_are_not_finite_are_refused() -> None:
    class Broken(Blocks):
        def __call__(self, pixels_BCHW: Tensor) -> Activations:
            activations = super().__call__(pixels_BCHW)
            return activations._replace(logits_BK=activations.logits_BK * torch.nan)

    for extractor, images in ((Blocks(), pixels(0)), (Broken(), pixels(3))):
        with pytest.raises(DataError):
            collect_shared(extractor, image_set(images))


# ---- --features ----------------------------------------------------------------------------------------------------


def test_saved_features_are_reused_for_the_same_images_and_extractor(tmp_path: Path) -> None:
    extractor, path = Blocks(), tmp_path / "features.npz"
    first = collect_shared(extractor, image_set(pixels(40)), file=path)
    again = collect_shared(extractor, image_set(pixels(40)), spatial=True, file=path)
    assert extractor.extracted == 40
    assert first is not None
    assert again is not None
    assert again.spatial_NP is not None, "kept for every metric, asked for or not"
    assert np.array_equal(again.features_ND, first.features_ND)
    assert np.array_equal(again.logits_NK, first.logits_NK)
    assert again.sha256 == first.sha256


def test_features_of_other_images_or_another_extractor_are_refused(tmp_path: Path) -> None:
    path, judge = tmp_path / "features.npz", open_extractor(save_judge(tmp_path / "judge.pt"), None, CPU)
    collect_shared(Blocks(), image_set(pixels(40)), file=path)
    before = path.read_bytes()
    for extractor, images in ((Blocks(), pixels(40, 1)), (Blocks(), pixels(40)[::-1]), (judge, pixels(40))):
        with pytest.raises(DataError, match=r"features\.npz") as refused:
            collect_shared(extractor, image_set(images), file=path)
        assert refused.value.exit_code == 3
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b"PK\x03\x04 half"),
        lambda path: np.savez(path, features=np.zeros((40, 12))),
        lambda path: np.savez(path, rdpm_features=np.array("{}")),
        lambda path: np.savez(path, rdpm_features=np.array("[")),
    ],
)
def test_a_damaged_file_of_features_is_named(write: Callable[[Path], object], tmp_path: Path) -> None:
    write(tmp_path / "features.npz")
    with pytest.raises(DataError, match=r"features\.npz"):
        collect_shared(Blocks(), image_set(pixels(40)), file=tmp_path / "features.npz")


# ---- Inception -----------------------------------------------------------------------------------------------------


def test_inception_gives_2048_features_and_names_its_weights(random_inception: Path) -> None:
    extractor = open_extractor("inception", random_inception, CPU)
    assert extractor.sha256 == files.sha256_file(random_inception)
    assert extractor.sha256[:8] in extractor.name
    assert not features.is_published_inception(extractor)
    assert str(random_inception) in extractor.note
    images = chw(pixels(2))
    with one_thread():
        activations = extractor(images)
        alone = extractor(images[1:]).features_BD
    assert activations.spatial_BP is not None
    shapes = [tuple(one.shape) for one in activations if one is not None]
    assert (
        shapes == [(2, extractor.width), (2, 1008), (2, extractor.spatial_width)] == [(2, 2048), (2, 1008), (2, 2023)]
    )
    values = activations.features_BD
    scale = float(values.abs().max())
    assert float((values[0] - values[1]).abs().max()) > 0.01 * scale, "the image does nothing"
    assert float((alone[0] - values[1]).abs().max()) < 1e-4 * scale


def test_spatial_features_and_logits_are_adms(random_inception: Path) -> None:
    """mixed_6/conv:0[..., :7] of NHWC: position (y, x, c) is number (17 y + x) · 7 + c. Logits have no bias."""
    extractor = open_extractor(None, random_inception, CPU)
    assert isinstance(extractor, features.Inception)
    outputs: list[Tensor] = []
    layer = extractor.network.get_submodule("Mixed_6d.branch1x1.conv")
    norm = extractor.network.get_submodule("Mixed_6d.branch1x1.bn")
    layer.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    with one_thread():
        activations = extractor(chw(pixels(2)))
        by_hand = torch.relu(norm(outputs[0]))  # (B, 192, 17, 17)
    spatial, weight = activations.spatial_BP, extractor.network.get_submodule("fc").weight
    assert spatial is not None
    for y, x, c in ((0, 0, 0), (0, 0, 6), (0, 1, 0), (1, 0, 0), (16, 16, 6), (5, 11, 3)):
        assert torch.equal(spatial[:, (17 * y + x) * 7 + c], by_hand[:, c, y, x])
    assert bool((spatial > 0).any())
    assert isinstance(weight, Tensor)
    assert torch.allclose(activations.logits_BK, activations.features_BD @ weight.T, rtol=1e-5)


def test_absent_weights_name_the_file_and_the_folders(no_weights: Path) -> None:
    with pytest.raises(CheckpointError) as refused:
        open_extractor(None, None, CPU)
    for token in (features.INCEPTION.file, no_weights / "weights", no_weights / "torch" / "hub" / "checkpoints"):
        assert str(token) in refused.value.message
    assert all(option in refused.value.hint for option in ("RDPM_WEIGHTS", "--weights", "--download"))
    (no_weights / "weights" / features.INCEPTION.file).write_bytes(b"another")
    with pytest.raises(CheckpointError, match=r"mine\.pth"):  # a file that is named is not replaced by another
        open_extractor(None, no_weights / "mine.pth", CPU)


def pickled(value: object) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(pickle.dumps(value, protocol=2))


def saved(value: object) -> Callable[[Path], object]:
    return lambda path: torch.save(value, path)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04 half a zip"),
        pickled({"a": 1}),
        saved({"fc.weight": torch.zeros(3)}),
        saved([torch.zeros(3)]),
    ],
)
def test_a_file_without_inception_is_refused_by_name(no_weights: Path, write: Callable[[Path], object]) -> None:
    path = no_weights / "weights.pth"
    write(path)
    with pytest.raises(CheckpointError, match=r"weights\.pth") as refused:
        open_extractor(None, path, CPU)
    assert (refused.value.exit_code, "\n" in refused.value.message) == (3, False)


@pytest.mark.parametrize("form", [pickled, saved])
def test_a_malicious_pickle_is_refused_and_not_run(
    tmp_path: Path, form: Callable[[object], Callable[[Path], object]]
) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    form({"fc.weight": Bomb()})(tmp_path / "weights.pth")
    form({"format": "rdpm-judge", "weights": Bomb()})(tmp_path / "judge.pt")
    with pytest.raises(CheckpointError, match=r"weights\.pth"):
        open_extractor(None, tmp_path / "weights.pth", CPU)
    with pytest.raises(CheckpointError, match=r"judge\.pt"):
        open_extractor(tmp_path / "judge.pt", None, CPU)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def published(random_inception: Path, no_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Inception's weights at a local address, under a name that has their sha256."""
    name = f"weights-inception-2015-12-05-{files.sha256_file(random_inception)[:8]}.pth"
    monkeypatch.setattr(features, "INCEPTION", Published(name, random_inception.as_uri()))
    return no_weights / "weights" / name


def test_weights_are_fetched_only_on_request_and_looked_up_later(published: Path) -> None:
    with pytest.raises(CheckpointError):
        open_extractor(None, None, CPU)
    extractor = open_extractor(None, None, CPU, download=True)
    assert features.is_published_inception(extractor)
    assert list(published.parent.iterdir()) == [published]
    assert open_extractor(None, None, CPU).sha256 == files.sha256_file(published)


def test_a_failed_download_leaves_nothing(published: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("sign in first")
    for file, error in (("page.html", CheckpointError), ("nothing", RunError)):
        monkeypatch.setattr(features, "INCEPTION", Published(published.name, (tmp_path / file).as_uri()))
        with pytest.raises(error, match=file):
            open_extractor(None, None, CPU, download=True)
        assert list(published.parent.iterdir()) == []


# ---- judges --------------------------------------------------------------------------------------------------------


def test_a_judge_as_extractor_names_itself(tmp_path: Path) -> None:
    path = save_judge(tmp_path / "judge.pt")
    extractor = open_extractor(path, None, CPU)
    images = chw(pixels(2))
    activations, expected = extractor(images), make_judge()(to_model(images))
    assert activations.spatial_BP is None
    assert torch.equal(activations.features_BD, expected[0])
    assert torch.equal(activations.logits_BK, expected[1])
    assert (extractor.name, extractor.class_names, extractor.width) == ("judge judge.pt", ["a", "b", "c"], 6)
    assert features.identity(extractor) == {
        "name": "judge judge.pt", "sha256": checkpoint.load(path)["digest"], "heldout_accuracy": 0.25,
    }  # fmt: skip


def test_other_files_are_no_judge_and_two_extractors_are_refused(
    tiny_tokenizer_file: Path, random_inception: Path, tmp_path: Path
) -> None:
    for path in (tiny_tokenizer_file, tmp_path / "nothing.pt"):
        with pytest.raises(CheckpointError, match=path.name) as refused:
            open_extractor(path, None, CPU)
        assert (refused.value.exit_code, "rdpm eval judge" in refused.value.hint) == (3, True)
    judge = save_judge(tmp_path / "judge.pt")
    with pytest.raises(UsageError, match="--weights"):
        open_extractor(judge, random_inception, CPU)
    with pytest.raises(UsageError, match="--download"):
        open_extractor(judge, None, CPU, download=True)

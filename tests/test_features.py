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
from rdpm_cli.distributed import one_thread
from rdpm_cli.errors import CheckpointError, DataError, UsageError
from rdpm_cli.evaluation import features
from rdpm_cli.evaluation.backbones import open_extractor
from rdpm_cli.evaluation.features import PUBLISHED, Activations, Features, collect, collect_shared


def shared(*args: Any, **options: Any) -> Features:
    values = collect_shared(*args, **options)
    assert values is not None
    return values


def test_features_are_in_order_whatever_batches_and_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    images, extractor = pixels(40), Blocks()
    whole = shared(extractor, image_set(images), spatial=True)
    assert np.array_equal(whole.features_ND, Blocks()(chw(images)).features_BD.numpy())
    assert np.array_equal(collect(extractor, [images[:7], images[7:]]).features_ND, whole.features_ND)
    for piece, batch in ((7, 64), (40, 3), (1, 1)):
        monkeypatch.setattr(features, "PIECE", piece)
        monkeypatch.setattr(features, "BATCH", batch)
        parts = shared(extractor, image_set(images), spatial=True)
        assert parts.sha256 == whole.sha256
        for name in ("features_ND", "logits_NK", "spatial_NP"):
            assert np.allclose(getattr(parts, name), getattr(whole, name), rtol=1e-6), name


@pytest.mark.parametrize("count", [0, 1, 5, 6])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_pieces_of_all_ranks_are_put_in_order(count: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "PIECE", 1)
    by_rank = [features.pieces(count, rank, size) for rank in range(size)]
    assert features.in_order(by_rank) == features.pieces(count) == [range(i, i + 1) for i in range(count)]


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


def test_saved_features_are_reused_only_for_the_same_images_and_extractor(tmp_path: Path) -> None:
    extractor, path, images = Blocks(), tmp_path / "features.npz", image_set(pixels(40))
    first, again = (shared(extractor, images, file=path) for _ in range(2))
    assert extractor.extracted == 40
    assert again.spatial_NP is not None, "kept for every metric, asked for or not"
    assert np.array_equal(again.features_ND, first.features_ND)
    assert np.array_equal(again.logits_NK, first.logits_NK)
    assert again.sha256 == first.sha256
    before, judge = path.read_bytes(), open_extractor(save_judge(tmp_path / "judge.pt"), None, CPU)
    for other, others in ((extractor, pixels(40, 1)), (extractor, pixels(40)[::-1]), (judge, pixels(40))):
        with pytest.raises(DataError, match=r"features\.npz"):
            collect_shared(other, image_set(others), file=path)
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


def test_inceptions_features_are_adms_and_named_by_their_weights(random_inception: Path) -> None:
    """mixed_6/conv:0[..., :7] of NHWC: position (y, x, c) is number (17 y + x) · 7 + c. Logits have no bias."""
    extractor = open_extractor(None, random_inception, CPU)
    assert isinstance(extractor, features.Inception)
    assert extractor.sha256 == files.sha256_file(random_inception)
    assert extractor.sha256[:8] in extractor.name != PUBLISHED
    assert str(random_inception) in extractor.note
    outputs: list[Tensor] = []
    branch, images = extractor.network.get_submodule("Mixed_6d.branch1x1"), chw(pixels(2))
    branch.get_submodule("conv").register_forward_hook(lambda _, inputs, output: outputs.append(output))
    with one_thread():
        values, logits, spatial = extractor(images)
        by_hand = torch.relu(branch.get_submodule("bn")(outputs[0]))  # (B, 192, 17, 17)
        alone = extractor(images[1:]).features_BD
    assert spatial is not None
    widths = [extractor.width, 1008, extractor.spatial_width]
    assert [x.shape[1] for x in (values, logits, spatial)] == widths == [2048, 1008, 2023]
    scale = float(values.abs().max())
    assert float((values[0] - values[1]).abs().max()) > 0.01 * scale, "the image does nothing"
    assert float((alone[0] - values[1]).abs().max()) < 1e-4 * scale
    for y, x, c in ((0, 0, 0), (0, 0, 6), (0, 1, 0), (1, 0, 0), (16, 16, 6), (5, 11, 3)):
        assert torch.equal(spatial[:, (17 * y + x) * 7 + c], by_hand[:, c, y, x])
    assert bool((spatial > 0).any())
    weight = extractor.network.get_submodule("fc").weight
    assert isinstance(weight, Tensor)
    assert torch.allclose(logits, values @ weight.T, rtol=1e-5)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("name", ["weights.pth", "judge.pt"])
@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04 half a zip"),
        lambda path: path.write_bytes(pickle.dumps({"fc.weight": Bomb()}, protocol=2)),
        lambda path: torch.save({"format": "rdpm-judge", "weights": Bomb()}, path),
        lambda path: torch.save({"fc.weight": torch.zeros(3)}, path),
        lambda path: torch.save([torch.zeros(3)], path),
    ],
)
def test_a_file_without_an_extractor_is_refused_by_name_and_not_run(
    name: str, write: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as refused:
        open_extractor(None if name == "weights.pth" else name, Path(name) if name == "weights.pth" else None, CPU)
    assert (refused.value.exit_code, "\n" in refused.value.message) == (3, False)
    assert not (tmp_path / "ran").exists()


def test_inceptions_weights_are_taken_out_of_a_training_checkpoint_and_nothing_else_is(
    random_inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = torch.load(random_inception, weights_only=True)
    wrapped = {f"module._orig_mod.{name}": value for name, value in weights.items()}
    torch.save({"state_dict": wrapped, "callbacks": {Bomb: Bomb()}}, "last.ckpt")
    extractor = open_extractor(None, Path("last.ckpt"), CPU)
    assert isinstance(extractor, features.Inception)
    weight = extractor.network.state_dict()["Conv2d_1a_3x3.conv.weight"]
    assert torch.equal(weight, weights["Conv2d_1a_3x3.conv.weight"])
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["fc.weight", "Mixed_6d.branch1x1.conv.weight", "x" * 150])
@pytest.mark.parametrize("change", ["missing", "shape"])
def test_weights_that_do_not_fit_are_named(change: str, name: str, random_inception: Path, tmp_path: Path) -> None:
    weights = torch.load(random_inception, weights_only=True)
    removed = weights.pop(name, None)  # a name that is no Inception's is unexpected in either case
    if change == "shape" or removed is None:
        weights[name] = torch.zeros(7, 5)
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"weights\.pth") as refused:
        open_extractor(None, tmp_path / "weights.pth", CPU)
    assert name in refused.value.message
    assert change == "missing" or removed is None or "[7, 5]" in refused.value.message


def test_weights_are_fetched_only_on_request_and_looked_up_later(
    random_inception: Path, no_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"weights-inception-2015-12-05-{files.sha256_file(random_inception)[:8]}.pth"
    monkeypatch.setattr(features, "INCEPTION", Published(name, random_inception.as_uri()))
    with pytest.raises(CheckpointError, match=name) as refused:
        open_extractor(None, None, CPU)
    assert all(option in refused.value.hint for option in ("RDPM_WEIGHTS", "--weights", "--download"))
    assert open_extractor(None, None, CPU, download=True).name == PUBLISHED
    assert list((no_weights / "weights").iterdir()) == [no_weights / "weights" / name]
    assert open_extractor(None, None, CPU).sha256 == files.sha256_file(random_inception)


def test_a_judge_as_extractor_names_itself(tmp_path: Path) -> None:
    path, images = save_judge(tmp_path / "judge.pt"), chw(pixels(2))
    extractor = open_extractor(path, None, CPU)
    activations, expected = extractor(images), make_judge()(to_model(images))
    assert activations.spatial_BP is None
    assert torch.equal(activations.features_BD, expected[0])
    assert torch.equal(activations.logits_BK, expected[1])
    assert (extractor.name, extractor.class_names, extractor.width) == ("judge judge.pt", ["a", "b", "c"], 6)
    identity = {"name": "judge judge.pt", "sha256": checkpoint.load(path)["digest"], "heldout_accuracy": 0.25}
    assert features.identity(extractor) == identity
    for weights, download in ((tmp_path / "weights.pth", False), (None, True)):
        with pytest.raises(UsageError, match="--weights"):
            open_extractor(path, weights, CPU, download)


def test_other_checkpoints_are_no_judge(tiny_tokenizer_file: Path, tmp_path: Path) -> None:
    for path in (tiny_tokenizer_file, tmp_path / "nothing.pt"):
        with pytest.raises(CheckpointError, match=path.name) as refused:
            open_extractor(path, None, CPU)
        assert "rdpm eval judge" in refused.value.hint

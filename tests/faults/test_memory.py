"""A GPU's memory that is too small: less at once where no result depends on it, else a stop.

Sampling is in test_sample.py; there is no GPU here, so the error is raised by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import metrics, newest_state, tiny_config, tiny_players, train
from rows import Rows
from stores import Making, MemoryImages
from torch import Tensor

from rdpm_cli.codes import write
from rdpm_cli.distributed import one_thread
from rdpm_cli.evaluation import features
from rdpm_cli.evaluation.features import Activations

OUT_OF_MEMORY = "out of memory: less at once, or a stop"
TOO_SMALL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Small:
    """An extractor on a device that holds 10 images."""

    name, sha256, note, width, spatial_width, device = "small", "0" * 64, "", 4, 0, torch.device("cpu")
    accuracy: float | None = None
    classes = 2
    resolution: int | None = None
    factor_layer: torch.nn.Module | None = None

    def __init__(self, room: int) -> None:
        self.room, self.sizes, self.class_names = room, list[int](), list[str]()

    def __call__(self, pixels_BCHW: Tensor) -> Activations:
        self.sizes.append(len(pixels_BCHW))
        if len(pixels_BCHW) > self.room:
            raise TOO_SMALL
        flat = pixels_BCHW.flatten(1).float()
        return Activations(flat[:, :4], flat[:, 4:6])


def test_scoring_goes_on_with_fewer_images_at_once(capsys: pytest.CaptureFixture[str], rows: Rows) -> None:
    with rows.count(OUT_OF_MEMORY):
        pixels = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), dtype=np.uint8)
        small = Small(20)
        pieces = features.extract(small, pixels), features.extract(Small(100), pixels)
        assert small.sizes == [64, 32, 16, 16, 16, 16, 16, 16, 4]
        assert np.array_equal(pieces[0].features_ND, pieces[1].features_ND)
        assert np.array_equal(pieces[0].logits_NK, pieces[1].logits_NK)
        assert "16 images" in capsys.readouterr().err
        with pytest.raises(torch.OutOfMemoryError):
            features.extract(Small(0), pixels)


def test_tokenising_stops_and_never_changes_the_micro_batch(
    tmp_path: Path, tiny_tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch, rows: Rows
) -> None:
    """The codes of a GPU depend on the micro-batch, so it is a field of the store and never halved in its middle."""

    def fail(*_: object) -> None:
        raise TOO_SMALL

    with rows.count(OUT_OF_MEMORY):
        making = Making(tmp_path / "codes", MemoryImages(20), tiny_tokenizer_file, micro_batch=8)
        making.plan = making.plan.model_copy(update={"device": "cuda"})
        monkeypatch.setattr(write, "encode", fail)
        with pytest.raises(torch.OutOfMemoryError):  # the command line turns it into exit 1
            list(making.run())
        assert not (making.root / "manifest.json").exists()


@pytest.mark.parametrize("micro", [None, 16])
def test_training_stops_and_never_changes_the_batch(micro: int | None, tmp_path: Path, rows: Rows) -> None:
    with rows.count(OUT_OF_MEMORY):
        players = tiny_players(cfg := tiny_config(train={"batch": 64, "micro_batch": micro, "save_every": 1}))
        plain, seen = players[0].loss, list[int]()

        def loss(images: Tensor, step: Any) -> Any:
            seen.append(len(images))
            if step.step == 2:
                raise TOO_SMALL
            return plain(images, step)

        setattr(players[0], "loss", loss)  # noqa: B010
        with one_thread(), pytest.raises(torch.OutOfMemoryError):  # the command line turns it into exit 1
            train(players, cfg, tmp_path)
        assert set(seen) == {micro or 64}
        assert [row["step"] for row in metrics(tmp_path)] == [1, 2]
        assert newest_state(tmp_path)["step"] == 2

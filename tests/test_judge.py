"""The judge: its network and file, its batches and training, its held-out share, best of n."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from extractors import CPU, Images, make_judge, pixels, save_judge
from PIL import Image

from rdpm_cli import checkpoint, files, noise
from rdpm_cli.cli.app import run
from rdpm_cli.data.open import open_source
from rdpm_cli.data.pixels import chw, hwc, to_model
from rdpm_cli.data.source import Source, Subset
from rdpm_cli.distributed import TrainStep
from rdpm_cli.errors import CheckpointError, DataError
from rdpm_cli.evaluation import factors, judge
from rdpm_cli.evaluation.backbones import open_extractor
from rdpm_cli.evaluation.features import collect
from rdpm_cli.evaluation.judge import ClassJudge, Judge, JudgeBatches, JudgeConfig, JudgeTask
from rdpm_cli.evaluation.reference import open_images
from rdpm_cli.evaluation.score import class_accuracy
from rdpm_cli.training.config import TrainConfig

SMALL = ["width=8", "blocks=1", "features=6", "train.batch=16", "train.epochs=null", "train.steps=3"]


@pytest.fixture(scope="module")
def source(image_folder: Path) -> Source:
    return open_source(str(image_folder))


def judge_batches(source: Source, seed: int = 0, batch: int = 18, flip: bool = False) -> JudgeBatches:
    cfg = JudgeConfig(width=8, features=6, flip=flip, train=TrainConfig(batch=batch, steps=4))
    return JudgeBatches(source, cfg, 16, seed)


@pytest.mark.parametrize(("side", "halvings"), [(16, 2), (20, 2), (32, 2), (64, 3), (256, 5)])
def test_larger_images_are_halved_more_often(side: int, halvings: int) -> None:
    network = Judge(side, 8, 6, 5, blocks=1)
    strides = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d) and m.stride == (2, 2)]
    assert len(strides) == halvings
    assert [tuple(x.shape) for x in network(torch.zeros(1, 3, side, side))] == [(1, 6), (1, 5)]


def test_a_file_gives_the_same_judge_also_without_blocks_in_its_config(tmp_path: Path) -> None:
    loaded, content = judge.load(save_judge(tmp_path / "judge.pt"))
    x = to_model(chw(pixels(2)))
    assert all(torch.equal(a, b) for a, b in zip(loaded(x), make_judge()(x), strict=True))
    assert (content["class_names"], content["format"]) == (["a", "b", "c"], "rdpm-judge")
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    old = Judge(**{name: value for name, value in content["config"].items() if name != "blocks"})
    old.load_state_dict(content["weights"])
    assert torch.equal(old.eval()(x)[1], loaded(x)[1])


def test_a_batch_depends_only_on_seed_and_step_and_a_rank_takes_its_rows(source: Source) -> None:
    first, second = (judge_batches(source, batch=32) for _ in range(2))
    first.batch_at(0, range(32))
    for step in (3, 1):
        a, b = first.batch_at(step, range(32)), second.batch_at(step, range(32))
        assert torch.equal(a.pixels_BCHW, b.pixels_BCHW)
        assert not torch.equal(a.pixels_BCHW, second.batch_at(step + 1, range(32)).pixels_BCHW)
        other = judge_batches(source, seed=1, batch=32)
        assert not torch.equal(a.pixels_BCHW, other.batch_at(step, range(32)).pixels_BCHW)
        parts = [first.batch_at(step, range(0, 16)), first.batch_at(step, range(16, 32))]
        assert torch.equal(torch.cat([part.pixels_BCHW for part in parts]), a.pixels_BCHW)
        assert torch.equal(torch.cat([part.labels_B for part in parts]), a.labels_B)


def shift_of(source: Source, pixels_HWC: Images) -> tuple[int, int, int] | None:
    """(index, y, x) of the source image that, shifted within a border of one pixel, gives these pixels."""
    for index in range(len(source)):
        padded = np.pad(source.pixels(index, 16), ((1, 1), (1, 1), (0, 0)), "edge")
        for y, x in np.ndindex(3, 3):
            if np.array_equal(padded[y : y + 16, x : x + 16], pixels_HWC):
                return index, y, x
    return None


def test_every_image_comes_once_an_epoch_shifted_by_at_most_a_pixel(source: Source) -> None:
    batches, shifts = judge_batches(source), []
    for step in range(2):
        batch = batches.batch_at(step, range(18))
        for image, label in zip(hwc(batch.pixels_BCHW), batch.labels_B.tolist(), strict=True):
            shift = shift_of(source, image)
            assert shift is not None
            assert source.need_labels()[shift[0]] == label
            shifts.append(shift)
    assert sorted(index for index, _, _ in shifts) == list(range(36))
    assert {step for _, *steps in shifts for step in steps} == {0, 1, 2}, "the shift does nothing"


def test_mirroring_is_an_option(source: Source) -> None:
    images = hwc(judge_batches(source, flip=True).batch_at(0, range(18)).pixels_BCHW)
    straight = [shift_of(source, image) is not None for image in images]
    assert 0 < sum(straight) < 18
    assert all(shift_of(source, image[:, ::-1]) for image, whole in zip(images, straight, strict=True) if not whole)


def test_the_loss_is_cross_entropy_of_the_true_class(source: Source) -> None:
    network = make_judge()
    batch = judge_batches(source).batch_at(0, range(18))
    loss, logs = JudgeTask(network).loss(batch, TrainStep(0, 0, range(18), 18, CPU))
    logits = network(to_model(batch.pixels_BCHW))[1].detach().double()
    p = torch.softmax(logits, 1)[torch.arange(18), batch.labels_B]
    assert loss.item() == pytest.approx(float(-p.log().mean()), rel=1e-5)
    assert float(logs["accuracy"]) == pytest.approx(float((logits.argmax(1) == batch.labels_B).float().mean()))


def test_images_with_factors_are_neither_shifted_nor_mirrored() -> None:
    source = open_source("shapes:heldout")
    batches = judge_batches(source, flip=True)
    batch, indices = batches.batch_at(0, range(18)), noise.epoch_rows(0, 0, 18, len(source)).tolist()
    assert np.array_equal(hwc(batch.pixels_BCHW), np.stack([source.pixels(index, 16) for index in indices]))
    assert batch.targets_BP is not None
    assert source.factors is not None
    assert np.allclose(factors.decode(batch.targets_BP.numpy()), source.factors[indices], atol=1e-5)


def test_the_loss_adds_the_squared_error_of_the_factors() -> None:
    batch = judge_batches(open_source("shapes:heldout")).batch_at(0, range(18))
    network = Judge(16, 8, 6, 10, factors=True)
    loss, logs = JudgeTask(network).loss(batch, TrainStep(0, 0, range(18), 18, CPU))
    features_BD, logits_BK = network(to_model(batch.pixels_BCHW))
    assert network.factors is not None
    assert batch.targets_BP is not None
    error = ((network.factors(features_BD) - batch.targets_BP) ** 2).mean().item()
    entropy = -torch.log_softmax(logits_BK, 1)[torch.arange(18), batch.labels_B].mean().item()
    assert logs["factor_mse"].item() == pytest.approx(error, rel=1e-5)
    assert loss.item() == pytest.approx(entropy + judge.FACTOR_WEIGHT * error, rel=1e-5)


def test_a_judge_without_factors_is_what_it_was_before_there_were_any() -> None:
    network, with_factors = Judge(16, 8, 6, 5), Judge(16, 8, 6, 5, factors=True)
    assert set(network.config) == {"resolution", "width", "features", "classes", "blocks"}
    names = set(with_factors.state_dict()) - set(network.state_dict())
    assert names == {"factors.weight", "factors.bias"}
    assert Judge(**with_factors.config).factors is not None


def test_a_judge_records_its_accuracy_on_held_out_images_and_is_trained_once(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training, held_out = judge.split(open_source(str(image_folder)))
    named = open_source("digits:heldout")
    for name, images, option in (
        ("share", str(image_folder), []),
        ("named", "digits", ["--heldout", "digits:heldout", "--recipe", "digits"]),
    ):
        command = ["eval", "judge", images, str(tmp_path / name), *SMALL, "--resolution", "16", "--quiet", "--json"]
        assert run([*command, *option]) == 0
        values = json.loads(capsys.readouterr().out)
        unseen = named if option else held_out
        extractor, target = open_extractor(values["judge"], None, CPU), open_images(unseen, 16)
        accuracy, _ = class_accuracy(extractor, target.labels, target.class_names, collect(extractor, target))
        assert values["heldout_accuracy"] == pytest.approx(accuracy)
        assert (values["images"], values["heldout_images"]) == (1500 if option else len(training), len(unseen))
        data = files.read_json(tmp_path / name / "run.json")["settings"]["data"]
        assert (data["heldout_digest"], data["resolution"]) == (unseen.digest(), 16)
        before = (tmp_path / name / "judge.pt").read_bytes()
        assert run([*command, *option]) == 0
        assert json.loads(capsys.readouterr().out) == values
        assert (tmp_path / name / "judge.pt").read_bytes() == before


def test_the_held_out_share_is_a_function_of_the_index() -> None:
    whole = open_source("digits")
    training, held_out = judge.split(whole)
    assert isinstance(held_out, Subset)
    assert held_out.names == judge.split(open_source("digits"))[1].names
    assert sorted([*training.names, *held_out.names]) == sorted(whole.names)
    assert 0.07 < len(held_out) / len(whole) < 0.13
    assert held_out.labels == [whole.need_labels()[i] for i in held_out.indices]
    assert np.array_equal(held_out.pixels(3, 16), whole.pixels(held_out.indices[3], 16))


@pytest.mark.parametrize(
    ("args", "code", "token"),
    [
        ("{images} {out} --heldout {flat}", 3, "flat"), ("{few} {out}", 3, "--heldout"),
        ("{images} {out} --heldout digits:heldout", 3, "digits:heldout"), ("{images} {out}/judge.pt", 2, "judge.pt"),
        ("{images} {out} width=12", 2, "width"), ("{images} {out} --recipe imagenet256-d16", 2, "judge"),
    ],
)  # fmt: skip
def test_a_judge_that_cannot_be_trained_is_refused(
    args: str, code: int, token: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(image_folder / "a", tmp_path / "flat")
    for name in "ab":
        shutil.copytree(image_folder / name, tmp_path / "few" / name, ignore=lambda _, names: sorted(names)[1:])
    paths = {"images": image_folder, "out": tmp_path / "out", "flat": tmp_path / "flat", "few": tmp_path / "few"}
    assert run(["eval", "judge", *args.format(**paths).split(), "--quiet"]) == code
    assert token in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_class_judge_gives_log_probabilities_by_class_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "BATCH", 4)
    path, images, labels = save_judge(tmp_path / "judge.pt"), pixels(10), [0, 1, 0, 1, 1, 0, 1, 0, 0, 1]
    scores = ClassJudge(path, ["c", "a"], 16, CPU)(images, labels)
    log_p = torch.log_softmax(make_judge()(to_model(chw(images)))[1].detach().double(), 1)
    assert scores == pytest.approx([float(log_p[row, [2, 0][label]]) for row, label in enumerate(labels)])
    assert ClassJudge(str(path), "abc", 16, CPU).sha256 == checkpoint.load(path)["digest"]
    with pytest.raises(CheckpointError, match="'d'"):
        ClassJudge(path, ["a", "d"], 16, CPU)


def test_classes_of_one_name_agree_by_number_and_are_refused_in_other_lists(tmp_path: Path) -> None:
    names = ["crane", "stork", "crane"]
    path, images, labels = save_judge(tmp_path / "judge.pt", names=names), pixels(6), [0, 1, 2, 2, 1, 0]
    log_p = torch.log_softmax(make_judge()(to_model(chw(images)))[1].detach().double(), 1)
    assert ClassJudge(path, names, 16, CPU)(images, labels) == pytest.approx(log_p[range(6), labels].tolist())
    assert judge.class_outputs(names, ["heron", "stork"], [1]) == {1: 1}
    for other in (["stork", "crane"], ["crane", "crane", "stork"]):
        with pytest.raises(CheckpointError, match="crane"):
            ClassJudge(path, other, 16, CPU)


def test_a_judge_of_another_size_than_the_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"32×32.*16×16"):
        ClassJudge(save_judge(tmp_path / "judge.pt"), "abc", 32, CPU)


def test_training_images_of_several_sizes_are_refused_unless_a_size_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, images in {"images": pixels(60, side=20), "heldout": pixels(4, side=24)}.items():
        for index, image in enumerate(images):
            path = tmp_path / name / "ab"[index % 2] / f"{index:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    command = ["eval", "judge", str(tmp_path / "images"), str(tmp_path / "judge"), *SMALL, "--quiet", "--json"]
    assert run([*command, "--heldout", str(tmp_path / "heldout")]) == 3
    assert "60 of 20×20, 4 of 24×24: a/00.png" in capsys.readouterr().err
    assert run(command) == 0
    assert json.loads(capsys.readouterr().out)["resolution"] == 20

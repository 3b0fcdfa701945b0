"""The built-in shapes: pictures by factors, a judge that reads them, and what its scores see."""

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extractors import Blocks, image_set
from torch import nn

from rdpm_cli.data.open import open_source
from rdpm_cli.data.pictures import save_npz
from rdpm_cli.data.shapes import FACTORS, KINDS, draw
from rdpm_cli.data.source import Subset
from rdpm_cli.engine.judge import eval_judge
from rdpm_cli.engine.score import eval_images
from rdpm_cli.errors import UsageError
from rdpm_cli.evaluation import factors, score
from rdpm_cli.evaluation.features import Features

MIDDLE = np.full(len(FACTORS), 0.5, np.float32)
HUE, ANGLE = FACTORS.index("hue"), FACTORS.index("angle")


def with_factor(name: str, value: float) -> Any:
    changed = MIDDLE.copy()
    changed[FACTORS.index(name)] = value
    return changed


@pytest.mark.parametrize(("part", "count"), [("train", 20_000), ("heldout", 2_000)])
def test_classes_are_balanced_and_factors_uniform(part: str, count: int) -> None:
    source = open_source(f"shapes:{part}")
    assert np.bincount(source.need_labels()).tolist() == [count // 10] * 10
    assert source.class_names == sorted(source.class_names) == list(KINDS)
    assert source.factors is not None
    assert source.factors.shape == (count, len(FACTORS))
    assert (source.factors >= 0).all()
    assert (source.factors < 1).all()
    for values in source.factors.T:  # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed by one set in a thousand
        gap = np.abs(np.sort(values) - (np.arange(count) + 0.5) / count).max()
        assert gap < 1.95 / math.sqrt(count)


def test_train_and_heldout_share_no_picture() -> None:
    train, heldout = (open_source(f"shapes:{part}").factors for part in ("train", "heldout"))
    assert train is not None
    assert heldout is not None
    assert not {tuple(row) for row in train.tolist()} & {tuple(row) for row in heldout.tolist()}


@pytest.mark.parametrize(
    ("size", "digest"),
    [(32, "1906fabd120262c8"), (64, "ec7aea3a99fdbf6d")],
)
def test_pictures_are_the_same_bytes_everywhere(size: int, digest: str) -> None:
    source = open_source("shapes:heldout")
    pictures = b"".join(source.pixels(index, size).tobytes() for index in range(0, 2000, 50))
    assert hashlib.sha256(pictures).hexdigest()[:16] == digest


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_a_shape_is_not_cut_at_the_edge(kind: int) -> None:
    def area(position: float) -> int:
        factors_F = np.array([position, position, 0.999, 0.3, 0.5, 0.0], np.float32)
        return int((draw(kind, factors_F, 32).astype(int) - 16).sum())

    assert area(0.0) == pytest.approx(area(0.5), rel=0.02)
    assert area(0.999) == pytest.approx(area(0.5), rel=0.02)


@pytest.mark.parametrize("name", FACTORS)
def test_every_factor_changes_the_picture(name: str) -> None:
    assert not np.array_equal(draw(0, with_factor(name, 0.3), 32), draw(0, with_factor(name, 0.7), 32))


def test_no_shape_looks_the_same_after_a_turn() -> None:
    for kind in range(len(KINDS)):
        for turn in np.linspace(0.1, 0.9, 9):
            difference = draw(kind, with_factor("angle", 0.0), 32).astype(int) - draw(
                kind, with_factor("angle", turn), 32
            )
            assert np.sqrt(np.mean(difference**2)) > 12, (KINDS[kind], turn)


def test_a_larger_picture_shows_the_same() -> None:
    source = open_source("shapes:heldout")
    small, large = source.pixels(7, 32), source.pixels(7, 64)
    reduced = large.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(reduced - small).mean() < 2


def test_a_part_keeps_its_factors_and_an_unknown_part_is_refused() -> None:
    source = open_source("shapes:heldout")
    part = Subset(source, [3, 5], "two")
    assert part.factors is not None
    assert source.factors is not None
    assert np.array_equal(part.factors, source.factors[[3, 5]])
    assert np.array_equal(part.pixels(1, 48), source.pixels(5, 48))
    with pytest.raises(UsageError, match="test") as caught:
        open_source("shapes:test")
    assert "shapes:train" in caught.value.hint


# ---- scores by factors -----------------------------------------------------------------------------------------------


def test_factors_come_back_from_what_a_judge_predicts() -> None:
    source = open_source("shapes:heldout")
    assert source.factors is not None
    read = factors.decode(factors.encode(source.factors))
    assert max(factors.errors(read, source.factors).values()) < 1e-5
    wild = factors.decode(np.full((1, len(FACTORS) + 2), 3, np.float32))
    assert (wild >= 0).all()
    assert (wild < 1).all()


def test_a_circular_error_is_at_most_half_a_turn() -> None:
    a, b = np.full((1, 6), 0.01, np.float32), np.full((1, 6), 0.99, np.float32)
    errors = factors.errors(a, b)
    assert errors["hue"] == pytest.approx(0.02, abs=1e-6)
    assert errors["x"] == pytest.approx(0.98, abs=1e-6)


def test_coverage_is_small_for_uniform_factors_and_large_for_one_value() -> None:
    source = open_source("shapes:train")
    assert source.factors is not None
    fixed = source.factors.copy()
    fixed[:, HUE] = 0.2
    fixed[:, ANGLE] /= 2
    coverage = factors.coverage(fixed)
    assert coverage["x"] < 0.02
    assert coverage["hue"] == pytest.approx(15 / 16)
    assert coverage["angle"] == pytest.approx(0.5, abs=0.02)


def test_validity_tells_a_picture_from_noise_and_from_another_class() -> None:
    source = open_source("shapes:heldout")
    assert source.factors is not None
    rows = list(range(0, 2000, 100))
    kinds, read = [source.need_labels()[i] for i in rows], source.factors[rows]
    pictures = np.stack([source.pixels(i, 32) for i in rows])
    noise = np.random.default_rng(0).integers(0, 256, pictures.shape, dtype=np.uint8)
    others = [(kind + 1) % 10 for kind in kinds]
    exact, other, random = (
        factors.validity([images], np.array(labels), read)
        for images, labels in ((pictures, kinds), (pictures, others), (noise, kinds))
    )
    assert exact > 60 > 25 > other > 10 > random


class Oracle(Blocks):
    """An extractor of shapes that knows the factors: its features are what a perfect judge predicts."""

    def __init__(self) -> None:
        super().__init__(class_names=KINDS)
        self.factor_layer = nn.Identity()


def oracle_scores(rows: list[int], labels: list[int] | None = None, **changes: float) -> dict[str, Any]:
    """Scores of these held-out shapes, drawn with some factors set; labels: what they were drawn for."""
    source = open_source("shapes:heldout")
    assert source.factors is not None
    values, kinds = source.factors[rows], np.array(source.need_labels())[rows]
    for name, value in changes.items():
        values[:, FACTORS.index(name)] = value
    pictures = np.stack([draw(*row, 32) for row in zip(kinds, values, strict=True)])
    known = Features([], factors.encode(values), np.eye(len(KINDS), dtype=np.float32)[kinds])
    return score.factor_scores(Oracle(), image_set(pictures, labels, KINDS[::-1]), known)


def test_coverage_sees_a_fixed_hue_and_validity_does_not() -> None:
    rows = list(range(0, 2000, 5))
    free, fixed = oracle_scores(rows), oracle_scores(rows, hue=0.3)
    assert fixed["factor_coverage"]["hue"] == pytest.approx(15 / 16)
    assert max(free["factor_coverage"].values()) < 0.15  # of 400 uniform values: .08
    assert fixed["factor_coverage"]["x"] == free["factor_coverage"]["x"]
    assert min(free["validity"], fixed["validity"]) > 60


def test_one_class_only_is_covered_and_valid() -> None:
    scores = oracle_scores(list(range(200)))
    assert max(scores["factor_coverage"].values()) < 0.25  # of 200 uniform values: .11
    assert scores["validity"] > 60


def test_validity_takes_the_class_a_sample_was_drawn_for_by_name() -> None:
    rows = list(range(0, 2000, 100))
    kinds = [row // 200 for row in rows]
    assert oracle_scores(rows, [9 - kind for kind in kinds])["validity"] > 60  # the target's classes are reversed
    assert oracle_scores(rows, kinds)["validity"] < 25


def test_an_extractor_without_factors_gives_no_scores_by_factors() -> None:
    known = Features([], np.zeros((2, 12), np.float32), np.zeros((2, 3), np.float32))
    assert score.factor_scores(Blocks(), image_set(np.zeros((2, 16, 16, 3), np.uint8)), known) == {}


def test_unlabelled_shapes_have_no_factors() -> None:
    assert open_source("shapes:heldout", unlabelled=True).factors is None


def test_a_judge_of_shapes_reads_factors_and_scores_by_them(tmp_path: Path) -> None:
    changes = ["judge.train.steps=3", "judge.width=8", "judge.train.batch=16"]
    trained = eval_judge("shapes:heldout", tmp_path / "judge", "shapes", changes, resolution=16).values
    assert set(trained["factor_errors"]) == set(FACTORS)
    source = open_source("shapes:heldout")
    pictures, path = np.stack([source.pixels(index, 16) for index in range(0, 2000, 50)]), str(tmp_path / "shapes.npz")
    save_npz(Path(path), pictures.shape, [pictures], source.need_labels()[::50])
    scores = eval_images("fid", path, path, extractor=trained["judge"], device="cpu").values
    assert set(scores["factor_coverage"]) == set(FACTORS)
    assert scores["value"] == pytest.approx(0, abs=1e-3)
    assert 5 < scores["validity"] < 40

"""The proxy score while a generator trains: beside the same samples scored by hand; looked up first; free to change."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same, metrics, newest_state

from rdpm_cli import engine, modelfile
from rdpm_cli.codes.manifest import Manifest
from rdpm_cli.config import ProxyConfig
from rdpm_cli.engine import pictures, proxy
from rdpm_cli.errors import CheckpointError, DataError, RecipeError
from rdpm_cli.evaluation import features, judge, reference, scores
from rdpm_cli.evaluation.judge import Judge
from rdpm_cli.generator import model, sampler
from rdpm_cli.generator.contract import SampleOptions
from rdpm_cli.recipe_files import load_recipe

CPU = torch.device("cpu")
SMALL = [
    "network.depth=1",
    "network.width=32",
    "network.heads=2",
    "train.batch=16",
    "train.steps=4",
    "train.eval_every=2",
    "train.log_every=1",
]


@pytest.fixture(scope="module")
def judge_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained judge of the classes a, b, c."""
    path = tmp_path_factory.mktemp("judge") / "judge.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Judge(16, width=8, features=6, classes=3)
    modelfile.save(path, judge.pack(network, list("abc"), provenance={"heldout_accuracy": 0.25}))
    return path


def train(codes: Path, out: Path, *overrides: str) -> engine.Result:
    return engine.train_gen(codes, out, "digits", [*SMALL, *overrides], "cpu")


def test_the_score_is_that_of_the_kept_weights_samples(digits_codes: Path, judge_file: Path, tmp_path: Path) -> None:
    result = train(digits_codes, tmp_path / "run", "proxy.samples=7", f"proxy.extractor={judge_file}")
    rows = [row for row in metrics(tmp_path / "run") if "proxy/frechet_distance" in row]
    assert [row["step"] for row in rows] == [2, 4]
    loaded = model.load(tmp_path / "run" / "generator.pt")
    labels = [0, 0, 0, 1, 1, 2, 2]
    how = loaded.sampling
    parts = sampler.sample(loaded.generator, loaded.tokenizer, labels, SampleOptions(how), how.micro_batch)
    pixels = np.concatenate([part.pixels_BHWC for part in parts])
    extractor = features.make_extractor(judge_file, None, CPU)
    drawn = reference.ImageSet("drawn", 7, 16, labels, list("abc"), lambda _: iter([pixels]), origin={})
    against = reference.open_recorded(
        pictures.store_reference(digits_codes, Manifest.load(digits_codes)), "store", "hint"
    )
    expected = scores.frechet(extractor, drawn, against, None)
    assert rows[-1]["proxy/frechet_distance"] == pytest.approx(expected["value"], rel=1e-9)
    assert rows[-1]["proxy/class_accuracy"] == expected["class_accuracy"]
    assert result.values["proxy/frechet_distance"] == rows[-1]["proxy/frechet_distance"]


def test_looking_changes_nothing_and_may_begin_when_a_run_resumes(
    digits_codes: Path, judge_file: Path, tmp_path: Path
) -> None:
    train(digits_codes, tmp_path / "without")
    train(digits_codes, tmp_path / "with", "proxy.samples=4", f"proxy.extractor={judge_file}")
    assert_same(newest_state(tmp_path / "with"), newest_state(tmp_path / "without"))
    (tmp_path / "without" / "generator.pt").unlink()
    train(digits_codes, tmp_path / "without", "proxy.samples=4", f"proxy.extractor={judge_file}")


def test_absent_weights_are_named_before_the_run_begins(digits_codes: Path, no_weights: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="weights-inception") as refused:
        train(digits_codes, tmp_path / "run", "proxy.samples=4")
    assert refused.value.exit_code == 3
    with pytest.raises(CheckpointError, match="no-judge"):
        train(digits_codes, tmp_path / "run", "proxy.samples=4", "proxy.extractor=no-judge.pt")
    assert not (tmp_path / "run").exists()


def test_a_reference_that_has_gone_is_named_before_the_run_begins(digits_codes: Path, judge_file: Path) -> None:
    m = Manifest.load(digits_codes)
    gone = m.model_copy(update={"data": m.data.model_copy(update={"source": "no/such/folder"})})
    with pytest.raises(DataError, match="no/such/folder is not here") as refused:
        proxy.check(ProxyConfig(samples=4, extractor=str(judge_file)), gone, digits_codes)
    assert "proxy.samples=0" in refused.value.hint


def test_a_limit_takes_reference_images_evenly_spaced(digits_codes: Path) -> None:
    record = pictures.store_reference(digits_codes, Manifest.load(digits_codes))
    few = reference.open_recorded(record, "store", "hint", 6)
    whole = np.concatenate(list(reference.open_recorded(record, "store", "hint").batches))
    assert (few.count, few.labels) == (6, [0, 0, 1, 1, 2, 2])
    assert np.array_equal(np.concatenate(list(few.batches)), whole[::6])


def test_one_sample_has_no_covariance() -> None:
    with pytest.raises(RecipeError, match="at least 2"):
        load_recipe("digits", ["generator.proxy.samples=1"])

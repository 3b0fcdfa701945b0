"""export and import: a checkpoint as a folder for the Hugging Face hub, and back."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from generators import save_generator
from safetensors import safe_open

import rdpm_cli as rdpm
from rdpm_cli import checkpoint
from rdpm_cli.cli.app import run

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def generator_file(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> Path:
    return save_generator(tmp_path_factory.mktemp("generator") / "generator.pt", tiny_tokenizer_file)


@pytest.fixture(scope="module")
def exported(generator_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator with the card of its samples and of a score."""
    root = tmp_path_factory.mktemp("exported")
    drawn = ["sample", "--ckpt", str(generator_file), "--out", str(root / "samples"), "--per-class", "2"]
    assert run([*drawn, "--device", "cpu", "--quiet"]) == 0
    score = {
        "metric": "frechet_distance",
        "value": 12.5,
        "n": 6,
        "checkpoint": checkpoint.load(generator_file)["digest"],
    }
    (root / "score.json").write_text(json.dumps(score))
    shown = [str(root / "samples"), str(root / "score.json")]
    assert run(["export", str(generator_file), str(root / "model"), *shown, "--license", "cc-by-4.0", "--quiet"]) == 0
    return root / "model"


def test_a_round_trip_keeps_every_tensor_and_the_digest(
    exported: Path, generator_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert run(["import", str(exported), str(tmp_path / "again.pt"), "--json"]) == 0
    first, again = checkpoint.load(generator_file), checkpoint.load(tmp_path / "again.pt")
    assert json.loads(capsys.readouterr().out)["digest"] == first["digest"] == again["digest"]
    assert {key: value for key, value in first.items() if key not in ("weights", "tokenizer")}.items() <= again.items()
    for a, b in ((first, again), (first["tokenizer"], again["tokenizer"])):
        assert a["weights"].keys() == b["weights"].keys()
        assert all(torch.equal(value, b["weights"][name]) for name, value in a["weights"].items())


def test_the_tensors_are_named_by_their_part(exported: Path, generator_file: Path) -> None:
    content = checkpoint.load(generator_file)
    with safe_open(exported / "model.safetensors", "np") as file:
        names = set(file.keys())
    parts = {"generator": content["weights"], "tokenizer": content["tokenizer"]["weights"]}
    assert names == {f"{part}.{name}" for part, weights in parts.items() for name in weights}


def test_the_card_has_licence_digest_scores_and_the_grid(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "cc-by-4.0"
    assert json.loads((exported / "config.json").read_text())["digest"] in card
    assert "frechet_distance | 12.5 | 6" in card
    pictures = [(exported / name).read_bytes() for name in re.findall(r"!\[.*\]\((.*)\)", card)]
    assert pictures == [(exported.parent / "samples" / "previews" / "grid.png").read_bytes()]


def test_commands_take_the_folder_in_the_place_of_the_file(
    exported: Path, generator_file: Path, image_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    for name, ckpt in {"a": exported, "b": generator_file}.items():
        words = ["--out", str(tmp_path / name), "--per-class", "1", "--npz", "--device", "cpu", "--quiet"]
        assert run(["sample", "--ckpt", str(ckpt), *words]) == 0
    a, b = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in "ab")
    assert (a == b).all()
    capsys.readouterr()
    for command in ("inspect", "verify"):
        assert run([command, str(exported), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["digest"] == checkpoint.load(generator_file)["digest"]


def test_a_store_of_an_exported_tokenizer_is_that_of_its_file(
    tiny_tokenizer_file: Path, image_folder: Path, tmp_path: Path
) -> None:
    assert run(["export", str(tiny_tokenizer_file), str(tmp_path / "model"), "--quiet"]) == 0
    assert "license" not in yaml.safe_load((tmp_path / "model" / "README.md").read_text().split("---")[1])
    for name, tokenizer in {"a": tmp_path / "model", "b": tiny_tokenizer_file}.items():
        words = ["tokenize", str(image_folder), str(tmp_path / name), "--tokenizer", str(tokenizer)]
        assert run([*words, "--device", "cpu", "--quiet"]) == 0
    a, b = (rdpm.CodeStore(tmp_path / name) for name in "ab")
    assert a.manifest.tokenizer == b.manifest.tokenizer
    assert (a.codes(np.arange(36)) == b.codes(np.arange(36))).all()
    assert run(["verify", str(tmp_path / "a"), "--quiet"]) == 0


def test_a_name_of_the_hub_is_read_from_its_cache(
    exported: Path, generator_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Laid out as huggingface_hub does, offline: the branch main, and the tag v1 of another model."""
    cache = tmp_path / "hub" / "models--someone--digits"
    for revision, number in {"main": "1" * 40, "v1": "2" * 40}.items():
        (cache / "refs").mkdir(parents=True, exist_ok=True)
        (cache / "refs" / revision).write_text(number)
        shutil.copytree(exported, cache / "snapshots" / number)
    config = cache / "snapshots" / ("2" * 40) / "config.json"
    config.write_text(config.read_text().replace('"0.1.0"', '"0.0.9"'))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    digest = checkpoint.load(generator_file)["digest"]
    for name in ("hf://someone/digits", "hf://someone/digits@v1"):
        assert run(["inspect", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["digest"] == digest
        loaded = rdpm.load(name, device="cpu")
        assert loaded.digest == digest
    assert run(["sample", "--ckpt", "hf://someone/digits", "--out", str(tmp_path / "s"), "--per-class", "1"]) == 0
    refused = {"hf://someone/else": (1, "someone/else"), "hf://digits": (2, "hf://digits")}
    for name, (code, token) in refused.items():
        assert run(["sample", "--ckpt", name, "--out", str(tmp_path / "t")]) == code
        assert token in capsys.readouterr().err


def test_what_cannot_be_exported_or_read_leaves_nothing_behind(
    exported: Path, generator_file: Path, tiny_tokenizer_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "README.md").write_text("mine")
    other = save_generator(tmp_path / "other.pt", tiny_tokenizer_file, std=0.4)
    assert run(["export", str(generator_file), str(tmp_path / "taken")]) == 2
    samples = str(exported.parent / "samples")
    assert run(["export", str(generator_file), str(tmp_path / "new"), "--license", "mine: all"]) == 2
    assert "mine: all" in capsys.readouterr().err
    assert run(["export", str(other), str(tmp_path / "new"), samples]) == 3
    assert samples in capsys.readouterr().err
    damaged = shutil.copytree(exported, tmp_path / "damaged")
    weights = bytearray((damaged / "model.safetensors").read_bytes())
    weights[-3] ^= 64
    (damaged / "model.safetensors").write_bytes(weights)
    for command in (["verify", str(damaged)], ["import", str(damaged), str(tmp_path / "again.pt")]):
        assert run(command) == 3
        assert "damaged" in capsys.readouterr().err
    shutil.copy(exported / "model.safetensors", damaged / "model.safetensors")
    for changed in ({"tokenizer": 5}, {"class_names": ["a"]}, {"format": None}):
        config = json.loads((exported / "config.json").read_text()) | changed
        (damaged / "config.json").write_text(json.dumps(config))
        assert run(["verify", str(damaged)]) == 3, changed
        assert str(damaged) in capsys.readouterr().err
    shutil.copy(exported / "config.json", damaged / "config.json")
    (damaged / "model.safetensors").write_bytes(weights[:100])
    assert run(["verify", str(damaged)]) == 3
    assert "model.safetensors" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "other.pt", "damaged"}
    assert [path.read_text() for path in (tmp_path / "taken").iterdir()] == ["mine"]


def test_a_training_begins_with_an_exported_folder_as_with_its_file(
    exported: Path, generator_file: Path, digits_codes: Path, tmp_path: Path
) -> None:
    small = ["network.depth=2", "network.width=32", "network.heads=2", "train.steps=1", "train.batch=16"]
    digests = set[str]()
    for name, weights in {"a": exported, "b": generator_file}.items():
        words = ["--recipe", "digits", "--from-weights", str(weights), "--out", str(tmp_path / name), "--device", "cpu"]
        assert run(["train-gen", str(digits_codes), *words, *small, "--quiet"]) == 0
        digests.add(checkpoint.load(tmp_path / name / "generator.pt")["digest"])
    assert len(digests) == 1


def test_the_card_has_the_sections_that_made_the_file_and_no_other(
    digits_codes: Path, tiny_tokenizer_file: Path, tmp_path: Path
) -> None:
    """The recipe of a training has sections for other commands, too, with values that those did not use."""
    small = ["network.depth=1", "network.width=32", "network.heads=2", "train.steps=1", "train.batch=16"]
    words = ["--recipe", "digits", "--out", str(tmp_path / "run"), "--device", "cpu", "--seed", "5", *small, "--quiet"]
    assert run(["train-gen", str(digits_codes), *words]) == 0
    assert run(["export", str(tmp_path / "run" / "generator.pt"), str(tmp_path / "model"), "--quiet"]) == 0
    (recipe,) = re.findall(r"```yaml\n(.*?)```", (tmp_path / "model" / "README.md").read_text(), re.DOTALL)
    values = yaml.safe_load(recipe)
    assert values.keys() == {"seed", "generator"}  # the tokenizer of the test has no recipe
    assert (values["seed"], values["generator"]["train"]["steps"]) == (5, 1)


def test_a_full_disk_leaves_no_half_of_a_folder(
    generator_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert run(["export", str(generator_file), str(tmp_path / "model")]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

"""The Python API draws, encodes and decodes what the command line does."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generators import save_generator
from PIL import Image

import rdpm_cli as rdpm
from rdpm_cli.cli.app import run
from rdpm_cli.errors import CheckpointError, RdpmError, UsageError


@pytest.fixture(scope="module")
def generator_file(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> Path:
    return save_generator(tmp_path_factory.mktemp("generator") / "generator.pt", tiny_tokenizer_file)


@pytest.fixture(scope="module")
def generator(generator_file: Path) -> rdpm.Generator:
    loaded = rdpm.load(generator_file, device="cpu")
    assert isinstance(loaded, rdpm.Generator)
    return loaded


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_file: Path) -> rdpm.Tokenizer:
    loaded = rdpm.load(str(tiny_tokenizer_file), device="cpu")
    assert isinstance(loaded, rdpm.Tokenizer)
    return loaded


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, rdpm_cli; assert 'load' in dir(rdpm_cli); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False"]
    with pytest.raises(AttributeError, match="lode"):
        rdpm.lode  # type: ignore[attr-defined]  # noqa: B018


def test_samples_are_those_of_the_command(generator: rdpm.Generator, generator_file: Path, tmp_path: Path) -> None:
    out, words = tmp_path / "samples", ["--per-class", "3", "--seed", "4", "--cfg", "1.5", "--npz", "--device", "cpu"]
    assert run(["sample", "--ckpt", str(generator_file), "--out", str(out), *words, "--quiet"]) == 0
    labels = [row["label"] for row in json.loads((out / "samples.json").read_text())["samples"]]
    images = generator.sample(labels, seed=4, cfg=1.5)
    assert images.dtype == np.uint8
    assert (images == np.load(out / "samples.npz")["arr_0"]).all()
    names = [generator.class_names[label] for label in labels]
    assert (generator.sample(names[:4], seed=4, cfg=1.5) == images[:4]).all()
    codes = generator.sample_codes(labels, seed=4, cfg=1.5)
    assert codes.shape == (9, 4, 4, 4)
    assert (generator.tokenizer.decode(codes) == images).all()


def test_codes_are_those_of_the_store(
    tokenizer: rdpm.Tokenizer, tiny_tokenizer_file: Path, image_folder: Path, tmp_path: Path
) -> None:
    words = ["--tokenizer", str(tiny_tokenizer_file), "--seed", "3", "--device", "cpu", "--quiet"]
    assert run(["tokenize", str(image_folder), str(tmp_path / "codes"), *words]) == 0
    store, source = rdpm.CodeStore(str(tmp_path / "codes")), rdpm.open_images(str(image_folder))
    codes = tokenizer.encode(source, seed=3)
    assert codes.shape == (36, 4, 4, 4)
    assert (codes.reshape(36, 4, 16) == store.codes(np.arange(36))).all()
    assert (tokenizer.encode(source, seed=4) != codes).any()
    arrays = np.stack([source.pixels(index, 16) for index in range(8)])
    forms: list[Any] = [arrays, list(arrays), [source.image(index) for index in range(8)]]
    for images in forms:
        assert (tokenizer.encode(images, seed=3) == codes[:8]).all()


def test_decoded_codes_are_the_command_s_reconstructions(
    tokenizer: rdpm.Tokenizer, digits_codes: Path, tmp_path: Path
) -> None:
    assert run(["reconstruct", str(digits_codes), str(tmp_path), "--limit", "36", "--device", "cpu", "--quiet"]) == 0
    rows = json.loads((tmp_path / "samples.json").read_text())["samples"]
    files = [np.asarray(Image.open(tmp_path / row["file"])) for row in rows]
    first_views = rdpm.CodeStore(digits_codes).codes(np.arange(36) * 2)
    assert (tokenizer.decode(first_views) == np.stack(files)).all()
    assert (tokenizer.decode(first_views.reshape(36, 4, 4, 4)) == np.stack(files)).all()


def test_what_cannot_be_used_is_refused_with_its_name(
    generator: rdpm.Generator, tokenizer: rdpm.Tokenizer, tmp_path: Path
) -> None:
    refused = {
        "no images": lambda: tokenizer.encode([]),
        "float32": lambda: tokenizer.decode(np.zeros((1, 4, 4, 4), np.float32)),
        "'abc'": lambda: generator.sample("abc"),
        "[]": lambda: generator.sample([]),
        "-1": lambda: generator.sample([0], seed=-1),
        "(16, 3)": lambda: tokenizer.encode(np.zeros((16, 16, 3), np.uint8)),
        "float64": lambda: tokenizer.encode([np.zeros((16, 16, 3))]),
        "64": lambda: tokenizer.decode(np.full((1, 4, 4, 4), 64)),
        "(1, 3, 4, 4)": lambda: tokenizer.decode(np.zeros((1, 3, 4, 4), int)),
        "'d'": lambda: generator.sample(["d"]),
        "3": lambda: generator.sample([3]),
        "taus": lambda: generator.sample([0], taus=1),
    }
    for token, call in refused.items():
        with pytest.raises(UsageError) as error:
            call()
        assert token in error.value.message
        assert error.value.hint in "".join(error.value.__notes__)
    for wrong in ({"classes": [1.7]}, {"classes": [0], "seed": 1.5}):
        with pytest.raises(TypeError):
            generator.sample(**wrong)
    with pytest.raises(CheckpointError, match=r"none\.pt"):
        rdpm.load(tmp_path / "none.pt")
    assert issubclass(CheckpointError, RdpmError)

"""Fixtures that test files share: a small untrained tokenizer, a folder of random images, a code store of both, and
random weight files in the published layouts."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import offline
import pytest
import torch
from PIL import Image
from rows import ROWS, Rows
from stores import Making

from rdpm_cli import checkpoint, progress
from rdpm_cli.cli.app import tune_allocator
from rdpm_cli.data.open import open_source
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.config import TokenizerArchitecture
from rdpm_cli.tokenizer.losses import Net

signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell started the tests in the background
tune_allocator()  # before the first large allocation
torch.set_num_threads(1)
offline.block()  # no command needs a network without --download


@pytest.fixture(scope="session")
def rows() -> Rows:
    """The counts of fault tests."""
    return ROWS


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `-m long` all fault tests run, so that their rows count the few cases of every run as well."""
    for item in items:
        if config.option.markexpr == "long" and "faults" in item.path.parts:
            item.add_marker(pytest.mark.long)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist sends its counts to the process that prints."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["counts"], output["notes"] = ROWS.counts, ROWS.notes


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add the counts of a worker; one that died has sent none."""
    if output := getattr(node, "workeroutput", None):
        ROWS.add(output["counts"], output["notes"])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the counts after everything else."""
    for line in ROWS.lines():
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def speaking() -> Iterator[None]:
    """Undo --quiet and --log-format of a test."""
    yield
    progress.quiet = progress.as_json = False


@pytest.fixture(scope="session")
def tiny_tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an untrained tokenizer: 16×16 images, f = 4, C = 4, K = 64, T = 4, schedule sin."""
    sizes = {"resolution": 16, "width": 8, "multipliers": (1, 1, 2), "res_blocks": 1, "groups": 4, "channels": 4}
    sections = {"autoencoder": {**sizes, "attention": False}, "quantizer": {"codes": 64, "steps": 4}}
    cfg = TokenizerArchitecture.model_validate({**sections, "schedule": {"kind": "sin"}})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = model.Tokenizer(cfg)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.pt"
    checkpoint.save(path, model.pack(tokenizer, class_names=[], provenance={}))
    return path


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders a/, b/, c/ of 12 images each: blocks of random colours, PNG and JPEG, sides of 16 to 39 pixels."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name in "abc":
        (root / name).mkdir()
        for index in range(12):
            width, height = (int(side) for side in random.integers(16, 40, 2))
            blocks = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            suffix = "jpg" if index % 3 == 2 else "png"
            blocks.resize((width, height), Image.Resampling.BILINEAR).save(root / name / f"{index:02d}.{suffix}")
    return root


@pytest.fixture(scope="session")
def digits_codes(tmp_path_factory: pytest.TempPathFactory, image_folder: Path, tiny_tokenizer_file: Path) -> Path:
    """A finished code store of `image_folder` by the tiny tokenizer: 36 images, 2 views, latents kept. Read-only."""
    out = tmp_path_factory.mktemp("store") / "codes"
    Making(out, open_source(str(image_folder)), tiny_tokenizer_file, shard_images=4096).finish()
    return out


@pytest.fixture
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty folders in which published weights are searched: weights/ and torch/hub/checkpoints/."""
    monkeypatch.setenv("RDPM_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "weights").mkdir()
    return tmp_path


@pytest.fixture(scope="session")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in Inception's layout: torch-fidelity's network, made without its download."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.save(fidelity.FeatureExtractorInceptionV3("inception", ["2048"]).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def random_backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[Net, Path]:
    """Random convolutions of VGG16 and AlexNet in torchvision's layout, in torch's old and new file format."""
    from torchvision import models

    folder, generator = tmp_path_factory.mktemp("backbones"), torch.Generator().manual_seed(0)
    paths: dict[Net, Path] = {"vgg": folder / "vgg.pth", "alex": folder / "alex.pth"}
    for net, path in paths.items():
        with torch.device("meta"):
            empty = (models.vgg16() if net == "vgg" else models.alexnet()).features.state_dict()
        state = {}
        for name, value in empty.items():
            scale = (2 / value[0].numel()) ** 0.5 if value.ndim > 1 else 0.1
            state[f"features.{name}"] = scale * torch.randn(value.shape, generator=generator)
        torch.save(state, path, _use_new_zipfile_serialization=net == "alex")  # the published VGG16 has the old format
    return paths


@pytest.fixture(scope="session")
def rvq_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tokenizer of plain residual quantisation with a book a depth, whose codes get shorter."""
    sizes = {"resolution": 16, "width": 8, "multipliers": (1, 1, 2), "res_blocks": 1, "groups": 4, "channels": 4}
    quantizer = {"codes": 32, "steps": 4, "bias": "none", "codebooks": "per_step"}
    sections = {"autoencoder": {**sizes, "attention": False}, "schedule": {"kind": "rvq"}, "quantizer": quantizer}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = model.Tokenizer(TokenizerArchitecture.model_validate(sections))
    tokenizer.quantizer.set_books(tokenizer.quantizer.books * torch.tensor([1, 0.6, 0.3, 0.2]).view(-1, 1, 1))
    path = tmp_path_factory.mktemp("rvq") / "tokenizer.pt"
    checkpoint.save(path, model.pack(tokenizer, class_names=[], provenance={}))
    return path


@pytest.fixture(scope="session")
def rvq_codes(tmp_path_factory: pytest.TempPathFactory, image_folder: Path, rvq_file: Path) -> Path:
    """A finished store of `image_folder` by it: 36 images, latents kept."""
    out = tmp_path_factory.mktemp("rvq-store") / "codes"
    Making(out, open_source(str(image_folder)), rvq_file, views=1, shard_images=4096).finish()
    return out

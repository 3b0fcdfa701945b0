"""Fixtures that test files share: a small untrained tokenizer, a folder of random images, a code store of both."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rdpm_cli import engine, modelfile, threads
from rdpm_cli.config import AutoencoderConfig, QuantizerConfig, ScheduleConfig, TokenizerArchitecture
from rdpm_cli.tokenizer import model

IMAGES_PER_CLASS = 12

threads.tune_allocator()  # before the first large allocation
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an untrained tokenizer: 16×16 images, f = 4, C = 4, K = 64, T = 4, schedule sin."""
    cfg = TokenizerArchitecture(
        autoencoder=AutoencoderConfig(
            resolution=16, width=8, multipliers=(1, 1, 2), res_blocks=1, attention=False, groups=4, channels=4
        ),
        schedule=ScheduleConfig(kind="sin"),
        quantizer=QuantizerConfig(codes=64, steps=4),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = model.Tokenizer(cfg)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.pt"
    modelfile.save(path, model.pack(tokenizer, class_names=[], provenance={}))
    return path


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders a/, b/, c/ of 12 images each: blocks of random colours, PNG and JPEG, sides of 16 to 39 pixels."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name in "abc":
        (root / name).mkdir()
        for place in range(IMAGES_PER_CLASS):
            width, height = (int(side) for side in random.integers(16, 40, 2))
            blocks = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            suffix = "jpg" if place % 3 == 2 else "png"
            blocks.resize((width, height), Image.Resampling.BILINEAR).save(root / name / f"{place:02d}.{suffix}")
    return root


@pytest.fixture(scope="session")
def digits_codes(tmp_path_factory: pytest.TempPathFactory, image_folder: Path, tiny_tokenizer_file: Path) -> Path:
    """A finished code store of `image_folder` by the tiny tokenizer: 36 images, 2 views, latents kept. Read only."""
    out = tmp_path_factory.mktemp("store") / "codes"
    engine.tokenize(str(image_folder), out, tiny_tokenizer_file, views=2, keep_latents=True, device="cpu")
    return out

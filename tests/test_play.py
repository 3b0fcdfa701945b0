"""`rdpm play`: the page draws what `rdpm sample` draws, also inside an image; with gradio, over the page's own API."""

import gc
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generators import save_generator
from PIL import Image

import rdpm_cli as rdpm
from rdpm_cli.cli.app import run
from rdpm_cli.engine import play
from rdpm_cli.errors import UsageError
from rdpm_cli.generator import registry
from rdpm_cli.generator.registry import LoadedGenerator


@pytest.fixture(scope="module")
def generator_file(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> Path:
    return save_generator(tmp_path_factory.mktemp("generator") / "generator.pt", tiny_tokenizer_file)


@pytest.fixture(scope="module")
def loaded(generator_file: Path) -> LoadedGenerator:
    return registry.load(generator_file)


def test_the_page_draws_the_samples_of_the_command(loaded: LoadedGenerator, generator_file: Path) -> None:
    generator = rdpm.load(generator_file, device="cpu")
    assert isinstance(generator, rdpm.Generator)
    assert (play.draw(loaded, 1, 5, 3, {"cfg": 1.0}) == generator.sample([1] * 5, seed=3, cfg=1.0)).all()


def test_only_what_is_painted_is_drawn_again(loaded: LoadedGenerator, generator_file: Path, tmp_path: Path) -> None:
    """The same pixels as `sample --init --mask` with the painted half in white."""
    background = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    layer = np.zeros((16, 16, 4), np.uint8)
    layer[:, 8:] = 255
    drawn = play.draw_inside(loaded, {"background": background, "layers": [layer]}, 2, 3, 4, {"cfg": 0.5})
    Image.fromarray(background).save(tmp_path / "init.png")
    Image.fromarray(layer[..., 3]).save(tmp_path / "mask.png")
    words = ["--init", str(tmp_path / "init.png"), "--mask", str(tmp_path / "mask.png"), "--cfg", "0.5", "--seed", "4"]
    words += ["--classes", "2", "--per-class", "3", "--out", str(tmp_path / "s"), "--npz", "--device", "cpu", "--quiet"]
    assert run(["sample", "--ckpt", str(generator_file), *words]) == 0
    assert (np.load(tmp_path / "s" / "samples.npz")["arr_0"] == drawn).all()
    empty: Any
    for empty in (None, {"background": None, "layers": []}, {"background": background, "layers": [layer * 0]}):
        with pytest.raises(UsageError, match="paint"):
            play.draw_inside(loaded, empty, 2, 3, 4, {})


def test_an_absent_gradio_is_named(generator_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert run(["play", str(generator_file)]) == 2


@pytest.mark.filterwarnings("ignore")  # of gradio and pandas
def test_the_page_answers_and_says_what_is_wrong(loaded: LoadedGenerator) -> None:
    """Over the API that its buttons call."""
    gradio_client = pytest.importorskip("gradio_client", reason="the extra `play` is not installed")
    page = play.page_of(loaded)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    try:
        client = gradio_client.Client(url, verbose=False)
        answer = client.predict("b", 2, 3, 0.0, 1.0, api_name="/draw")
        with pytest.raises(gradio_client.exceptions.AppError, match="paint"):
            client.predict(
                {"background": None, "layers": [], "composite": None}, "b", 2, 3, 0, 1, api_name="/draw_inside"
            )
    finally:
        page.close()
        gc.collect()  # closes its sockets here, where the warning of that is ignored
    images = [np.asarray(Image.open(row["image"]).convert("RGB")) for row in answer]
    assert (np.stack(images) == play.draw(loaded, 1, 2, 3, {})).all()

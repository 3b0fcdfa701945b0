"""play: a page on this machine to draw samples of a checkpoint: by class, inside an image, or speech from a text."""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rdpm_cli import progress
from rdpm_cli.data.pixels import Pixels
from rdpm_cli.distributed import pick_device
from rdpm_cli.engine.sample import Edit, open_edit
from rdpm_cli.engine.speech import name_of, sample_speech
from rdpm_cli.engine.speech_lines import Line
from rdpm_cli.errors import RdpmError, UsageError
from rdpm_cli.generator import registry
from rdpm_cli.generator.registry import LoadedGenerator
from rdpm_cli.runs import Result

SLIDERS = {"cfg": (0.0, 10.0, 0.1), "steps": (1, 64, 1), "tau": (0.1, 5.0, 0.05)}  # least, most and step of options
MOST = 64  # images at a time


def play(ckpt: Path, host: str = "127.0.0.1", port: int | None = None, device: str = "auto") -> Result:
    """Serve the page until Ctrl-C. port: default the first free one from 7860 on. Raises UsageError without gradio."""
    progress.say(f"opening {ckpt}; the first time gradio takes a while")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UsageError("play needs the package gradio", "uv pip install 'rdpm[play]'") from error
    loaded = registry.load(ckpt)
    page = speech_page_of(loaded, ckpt, device) if loaded.text else page_of(loaded.to(pick_device(device)))
    try:
        _, url, _ = page.launch(server_name=host, server_port=port, prevent_thread_lock=True, quiet=True)
    except OSError as error:
        raise UsageError(f"--host {host} --port {port}: {error}", "give another --port, or none") from error
    progress.say(f"the page is at {url}; Ctrl-C ends it")
    page.block_thread()
    return Result("the page is closed", {"url": url, "checkpoint": loaded.digest})


def draw(
    loaded: LoadedGenerator, label: int, count: int, seed: int, sampling: Mapping[str, Any], edit: Edit | None = None
) -> Pixels:
    """Samples 0 to count - 1 of a class, (B, H, W, 3) uint8, as `rdpm sample --seed` draws them."""
    options = loaded.options(seed, None, sampling)
    known = open_edit(edit, loaded, seed)[1] if edit else None
    return loaded.job(options, known).draw(range(count), [label] * count).pixels_BHWC


def draw_inside(
    loaded: LoadedGenerator, drawing: Mapping[str, Any] | None, label: int, count: int, seed: int,
    sampling: Mapping[str, Any],
) -> Pixels:  # fmt: skip
    """`draw` where the brush has been on an image. drawing: gradio's `background` (H, W, 3) and `layers` (H, W, 4)."""
    if not drawing or drawing.get("background") is None or not any(np.any(x[..., 3]) for x in drawing["layers"]):
        raise UsageError("there is no image, or nothing is painted on it", "open one, and paint what is to be drawn")
    painted = np.max([layer[..., 3] for layer in drawing["layers"]], 0) > 0
    with tempfile.TemporaryDirectory() as folder:
        init, mask = f"{folder}/init.png", f"{folder}/mask.png"
        Image.fromarray(drawing["background"][..., :3]).save(init)
        Image.fromarray(np.uint8(255) * painted.astype(np.uint8)).save(mask)
        return draw(loaded, label, count, seed, sampling, Edit(init, mask))


def _whole(value: float | None) -> int:
    """The number of a field. Raises UsageError for an empty one."""
    if value is None:
        raise UsageError("a field is empty", "fill it in")
    return int(value)


def _shown(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose errors for users the page shows, with their hints."""
    import gradio

    def shown(*args: Any) -> Any:
        try:
            return call(*args)
        except RdpmError as error:
            raise gradio.Error(f"{error.message}. {error.hint}", print_exception=False) from error

    return shown


def page_of(loaded: LoadedGenerator) -> Any:
    """The page of a generator of images."""
    import gradio

    recorded = loaded.sampling.model_dump()
    fields = {name: recorded[name] for name in SLIDERS if name in recorded}
    side = loaded.tokenizer.cfg.autoencoder.resolution
    with gradio.Blocks(title="rdpm play", analytics_enabled=False) as page:
        gradio.Markdown(
            f"# rdpm play\n{type(loaded.generator).__name__}, {side}×{side}, checkpoint {loaded.digest[:12]}"
        )
        with gradio.Row():
            label = gradio.Dropdown(loaded.class_names, type="index", value=loaded.class_names[0], label="class")
            count = gradio.Slider(1, MOST, 8, step=1, label="images")
            seed = gradio.Number(0, precision=0, minimum=0, label="seed")
        with gradio.Row():
            sliders = [
                gradio.Slider(*SLIDERS[name][:2], value, step=SLIDERS[name][2], label=name)
                for name, value in fields.items()
            ]

        def options(values: tuple[Any, ...]) -> dict[str, Any]:
            return {name: type(old)(value) for (name, old), value in zip(fields.items(), values, strict=True)}

        gallery: dict[str, Any] = {"label": "samples", "columns": 8, "format": "png"}  # its default loses detail
        asked = [label, count, seed, *sliders]
        with gradio.Tab("Draw"):
            button, drawn = gradio.Button("Draw", variant="primary"), gradio.Gallery(**gallery)
            call = _shown(lambda k, n, s, *v: list(draw(loaded, _whole(k), _whole(n), _whole(s), options(v))))
            button.click(call, asked, drawn, api_name="draw")
        with gradio.Tab("Draw inside an image"):
            editor = gradio.ImageEditor(type="numpy", image_mode="RGBA", label="paint what is to be drawn again")
            button, drawn = gradio.Button("Draw inside", variant="primary"), gradio.Gallery(**gallery)
            call = _shown(
                lambda d, k, n, s, *v: list(draw_inside(loaded, d, _whole(k), _whole(n), _whole(s), options(v)))
            )
            button.click(call, [editor, *asked], drawn, api_name="draw_inside")
    return page


def speech_page_of(loaded: LoadedGenerator, ckpt: Path, device: str) -> Any:
    """The page of a generator of sound."""
    import gradio

    root = Path(tempfile.mkdtemp(prefix="rdpm-play-"))

    def speak(text: str, prompt: str | None, prompt_text: str, seed: float | None, cfg: float) -> str:
        out = Path(tempfile.mkdtemp(dir=root))
        line = Line(text, prompt, prompt_text)
        sample_speech(ckpt, [line], out, seed=_whole(seed), sampling={"cfg": cfg}, device=device)
        return str(out / name_of(0))

    with gradio.Blocks(title="rdpm play", analytics_enabled=False) as page:
        gradio.Markdown(f"# rdpm play\n{type(loaded.generator).__name__}, checkpoint {loaded.digest[:12]}")
        text, prompt_text = gradio.Textbox(label="text"), gradio.Textbox(label="what is said in the prompt")
        prompt = gradio.Audio(type="filepath", label="prompt: the voice that is to say it")
        seed = gradio.Number(0, precision=0, minimum=0, label="seed")
        cfg = gradio.Slider(*SLIDERS["cfg"][:2], loaded.sampling.cfg, step=SLIDERS["cfg"][2], label="cfg")
        button, spoken = gradio.Button("Speak", variant="primary"), gradio.Audio(label="sample", type="filepath")
        button.click(_shown(speak), [text, prompt, prompt_text, seed, cfg], spoken, api_name="speak")
    page.allowed_paths = [str(root)]
    return page

"""What watches a training run: progress, held-out accuracy per t, preview pictures."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rdpm_cli.config import GeneratorConfig, QuantizerConfig, TokenizerConfig, TrainConfig
from rdpm_cli.generator import sampler
from rdpm_cli.generator.contract import Generator, GeneratorBatches, SampleOptions
from rdpm_cli.generator.task import held_out
from rdpm_cli.images import writers
from rdpm_cli.images.sources import ImageSource
from rdpm_cli.images.tensors import chw, hwc, to_model, to_pixels
from rdpm_cli.images.transform import Pixels
from rdpm_cli.progress import Bar, warn
from rdpm_cli.step import world
from rdpm_cli.threads import one_thread
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.training.logging import read_metrics
from rdpm_cli.training.loop import Run

DECODED_AT_ONCE = 8  # images, so that a preview needs no more memory than sampling
PREVIEWS = 8  # images, or samples a class
ADVERSARY = ["gan", "discriminator/loss", "discriminator/logits_real", "discriminator/logits_fake"]
ALARM_LINES = 5  # logged steps of low codebook usage before a warning
LEAST_SPREAD = 0.02  # of a latent that tells something: small healthy runs had 0.15 to 0.63


def progress(bar: Bar) -> Callable[..., None]:
    """Advance a bar of steps, with loss, rate and utilisation behind it."""

    def observe(run: Run, logs: dict[str, float] | None) -> None:
        if bar.done == 0 and run.step > 1:
            bar.resume_at(run.step - 1)
        note = f"loss {logs['loss']:.4f}, {logs['images_per_second']:.0f} images/s" if logs else ""
        share = logs.get("utilisation") if logs else None
        bar.advance(1, note if share is None else f"{note}, {share:.0%} of peak")

    return observe


def redrawn(draw: Callable[[], None], cfg: TrainConfig) -> Callable[..., None]:
    """Draw the curves of what is logged so far whenever the run is looked at, not only at its end."""

    def observe(run: Run, logs: dict[str, float] | None) -> None:
        if due(run, cfg) and not run.done:
            draw()

    return observe


def due(run: Run, cfg: TrainConfig) -> bool:
    """Is it time to evaluate? Always at the end; only in the first process."""
    regular = bool(cfg.eval_every) and run.step % cfg.eval_every == 0
    return (regular or run.done) and world()[0] == 0


def tokenizer_preview(tokenizer: Tokenizer, source: ImageSource, cfg: TrainConfig) -> Callable[..., None]:
    """RUN/previews/: inputs, reconstructions and the T partial decodes, under held-out noise."""
    count = min(PREVIEWS, len(source))
    chosen = np.linspace(0, len(source) - 1, count).astype(int).tolist()
    images = np.stack([source.pixels(i, tokenizer.cfg.autoencoder.resolution) for i in chosen])
    eps = tokenizer.noise("heldout", 0, chosen, [0] * count)

    @torch.no_grad()
    def observe(run: Run, logs: dict[str, float] | None) -> None:
        if not due(run, cfg):
            return
        model: Any = run.ema.model if run.ema else tokenizer
        was_training = model.training
        model.eval()
        codes = model.encode(to_model(chw(images)).to(run.device), eps.to(run.device))
        rows = [images, *decode_prefixes(model, codes)]
        model.train(was_training)
        labels = ["input", *(f"t = {t}" for t in range(1, len(rows) - 1)), f"output, t = {len(rows) - 1}"]
        sheet = writers.grid(np.concatenate(rows), count, labels, f"step {run.step}")
        writers.save_png(run.folder / "previews" / f"step-{run.step:07d}.png", sheet)

    return observe


def codebook_alarm(cfg: TokenizerConfig) -> Callable[..., None]:
    """Warn, naming the fix, once the codebook's usage or the spread of z has stayed low for ALARM_LINES logged steps.

    Usage is measured against what a batch of this size can use at best: 1 - (1 - 1/K)^n of n vectors drawn evenly.
    """
    q, (h, w) = cfg.quantizer, cfg.autoencoder.grid
    vectors = cfg.train.batch * h * w * (q.steps if q.codebooks == "shared" else 1)
    best = 1 - (1 - 1 / q.codes) ** vectors
    low = {"usage/book": 0, "latent_spread": 0}

    def observe(run: Run, logs: dict[str, float] | None) -> None:
        if not (logs and cfg.codebook_alarm):
            return
        usage, spread = logs["usage/book"] / best, logs["latent_spread"]
        low["usage/book"] = low["usage/book"] + 1 if usage < cfg.codebook_alarm else 0
        low["latent_spread"] = low["latent_spread"] + 1 if spread < LEAST_SPREAD else 0
        since = f"and was low for {ALARM_LINES} logged steps"
        if low["usage/book"] == ALARM_LINES:
            warn(f"at step {run.step} the codebook's usage is {usage:.0%} of an even one's, {since}. {_fix(q)}")
        if low["latent_spread"] == ALARM_LINES:
            warn(
                f"at step {run.step} only {spread:.0%} of the latent varies over images and positions, {since}: the "
                "encoder tells next to nothing. Lower train.lr, clip gradients (train.clip=1) or begin --from-weights"
            )

    return observe


def _fix(q: QuantizerConfig) -> str:
    """What a recipe with too low a usage has not yet tried."""
    restarts = [] if q.codebook == "ema" else ["quantizer.codebook=ema"]
    restarts += ["quantizer.restart_below=0.03"] if q.restart_below < 0.03 else []
    ways = [f"restart dead codes ({' '.join(restarts)})"] if restarts else []
    ways += ["start on data (quantizer.init=kmeans)"] if q.init != "kmeans" else []
    ways += [f"lower quantizer.codes={q.codes}"] if not ways else []
    text = ", or ".join(ways)
    return text[0].upper() + text[1:]


@torch.no_grad()
def decode_prefixes(tokenizer: Tokenizer, codes: torch.Tensor) -> list[Pixels]:
    """D(z'_1)..D(z'_T) as uint8 (B, H, W, 3)."""
    frames = []
    for t in range(1, tokenizer.quantizer.steps + 1):
        parts = []
        with one_thread():
            for part in codes.split(DECODED_AT_ONCE):
                z = tokenizer.quantizer.prefix(part, torch.full((len(part),), t, device=codes.device))
                parts.append(hwc(to_pixels(tokenizer.decode_latents(z))))
        frames.append(np.concatenate(parts))
    return frames


@contextlib.contextmanager
def as_kept(generator: Generator, run: Run) -> Iterator[None]:
    """Inside, the generator is what the run would keep: its average where there is one, in evaluation mode."""
    trained = generator.network
    generator.network = (run.ema.model if run.ema else trained).eval()
    try:
        yield
    finally:
        generator.network = trained
        trained.train()


def generator_monitor(
    generator: Generator,
    tokenizer: Tokenizer,
    cfg: GeneratorConfig,
    class_names: list[str],
    batches: GeneratorBatches,
) -> Callable[..., Any]:
    """Held-out measurements beside the model-free baseline, norms, and a grid of samples from fixed seeds."""
    classes = list(range(min(10, len(class_names))))
    labels = [c for c in classes for _ in range(PREVIEWS)]
    options = SampleOptions(cfg.sampling)

    def observe(run: Run, logs: dict[str, float] | None) -> dict[str, Any] | None:
        if not due(run, cfg.train):
            return None
        at_once = cfg.sampling.images_at_once(run.device.type)
        with as_kept(generator, run):
            found = held_out(generator, batches, run.device)
            parts = list(sampler.sample(generator, tokenizer, labels, options, at_once))
        sheet = writers.grid(
            np.concatenate([p.pixels_BHWC for p in parts]), PREVIEWS, [class_names[c] for c in classes]
        )
        writers.save_png(run.folder / "previews" / f"step-{run.step:07d}.png", sheet)
        norms = _norms(tokenizer, torch.cat([p.codes_BTHW for p in parts]).to(run.device))
        return {f"heldout/{name}": values for name, values in found.items()} | {"sampled/norm": norms}

    return observe


def _norms(tokenizer: Tokenizer, codes_BTHW: torch.Tensor) -> list[float]:
    """Mean norm of z'_t over positions, (T,)."""
    quantizer = tokenizer.quantizer
    counts = [torch.full((len(codes_BTHW),), t, device=codes_BTHW.device) for t in range(1, quantizer.steps + 1)]
    return [float(quantizer.prefix(codes_BTHW, n).norm(dim=1).mean()) for n in counts]


def tokenizer_curves(folder: Path) -> dict[str, dict[str, writers.Curve]]:
    """Panels of a tokenizer run: losses, the critic's logits; usage and dead codes over time, perplexity per t."""
    rows = read_metrics(folder)
    if not rows:
        return {}
    panels = {
        "tokenizer losses|step": _over_time(rows, ["recon", "quant", "lpips"]),
        "adversary|step": _over_time(rows, ADVERSARY),
    }
    per_t = sorted(k.removeprefix("usage/") for k in rows[-1] if k.startswith("usage/t"))
    shown = [per_t[0], per_t[len(per_t) // 2], per_t[-1]] if len(per_t) > 3 else per_t
    panels["codebook usage|step"] = _over_time(rows, ["usage/book", *(f"usage/{t}" for t in shown), "latent_spread"])
    panels["dead codes|step"] = _over_time(rows, [f"dead/{t}" for t in shown])
    panels["codebook perplexity|step"] = _over_time(rows, [f"perplexity/{t}" for t in shown])
    last = ([float(t[1:]) for t in per_t], [rows[-1][f"perplexity/{t}"] for t in per_t])
    panels["codebook perplexity at the end|t"] = {"perplexity": last}
    return {title: curves for title, curves in panels.items() if curves}


def _over_time(rows: list[dict[str, Any]], names: list[str]) -> dict[str, writers.Curve]:
    """The named values of a log over its steps, those that are there."""
    found: dict[str, writers.Curve] = {}
    for name in names:
        points = [(float(row["step"]), row[name]) for row in rows if name in row]
        if points:
            steps, values = zip(*points, strict=True)
            found[name] = (list(steps), list(values))
    return found


def generator_curves(folder: Path) -> dict[str, dict[str, writers.Curve]]:
    """Panels of a generator run: loss; held-out accuracy per t, or nats a dimension, beside the model-free baseline."""
    rows = read_metrics(folder)
    panels = {"generator loss|step": _over_time(rows, ["ce", "nll"])}
    held = {"heldout/accuracy": "held-out accuracy per t|t", "heldout/nll": "held-out nats/dim|masked depths"}
    for name, title in held.items():
        if measured := [row for row in rows if name in row]:
            last = measured[-1]
            panels[title] = {"model": _by_place(last[name]), "model-free baseline": _by_place(last["heldout/baseline"])}
    score = _over_time(rows, ["proxy/frechet_distance"])
    return {title: curves for title, curves in panels.items() if curves} | (
        {"proxy score|step": score} if score else {}
    )


def _by_place(values: list[float | None]) -> writers.Curve:
    """Values at 1, 2, ..., without those that are not there."""
    known = [(float(place), value) for place, value in enumerate(values, 1) if value is not None]
    return [place for place, _ in known], [value for _, value in known]

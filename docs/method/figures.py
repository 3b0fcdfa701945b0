"""The figures of docs/method.md from a finished demo: python docs/method/figures.py demo/"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from rdpm_cli.data import pictures
from rdpm_cli.data.open import open_source
from rdpm_cli.data.pixels import chw, hwc, to_model, to_pixels
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.config import ScheduleConfig
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.tokenizer.quantizer import alphas, beta

IMAGES = 297  # held-out digits
SHOWN = 4  # of them, in the strip


def save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure).print_png(str(path))
    print(path)


def panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.2 * count, 3.0), dpi=144, layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, list(axes)


def schedules(path: Path) -> None:
    """alpha_t, and the share of a unit-variance signal's power that is noise, for T = 10."""
    figure, (left, right) = panels(2)
    steps = range(1, 11)
    for kind in ("pow", "linear", "sin"):
        values = alphas(ScheduleConfig.model_validate({"kind": kind}), 10)
        left.plot(steps, values, marker=".", label=kind)
        right.plot(steps, [beta(a) ** 2 for a in values], marker=".", label=kind)
    left.set(title="share of the residual, alpha_t", xlabel="t")
    right.set(title="noise's share of v_t's power at the start, beta_t²", xlabel="t")
    left.legend(frameon=False)
    save(figure, path)


class Encoded:
    """Held-out digits through the tokenizer: latents, noise, codes, and z'_t for t = 0..T."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        source = open_source("digits:heldout")
        indices = list(range(min(IMAGES, len(source))))
        size, T = tokenizer.cfg.autoencoder.resolution, tokenizer.quantizer.steps
        self.pixels = np.stack([source.pixels(i, size) for i in indices])
        self.z = tokenizer.latents(to_model(chw(self.pixels)))
        self.eps = [tokenizer.noise("eval", seed, indices, [0] * len(indices)) for seed in (0, 1)]
        self.codes = [tokenizer.quantizer.encode(self.z, eps) for eps in self.eps]
        rows = torch.ones(len(indices), dtype=torch.int64)
        self.sums = [tokenizer.quantizer.prefix(self.codes[0], rows * t) for t in range(T + 1)]


def strip(tokenizer: Tokenizer, encoded: Encoded, path: Path) -> None:
    """The original, then D(z'_t) for t = 1..T; each digit twice, under two draws of the noise."""
    rows, labels = [], []
    for digit in range(SHOWN):
        for draw, codes in enumerate(encoded.codes):
            one = torch.ones(1, dtype=torch.int64)
            steps = range(1, tokenizer.quantizer.steps + 1)
            sums = torch.cat([tokenizer.quantizer.prefix(codes[digit : digit + 1], one * t) for t in steps])
            decoded = hwc(to_pixels(tokenizer.decode_latents(sums)))
            rows.append(np.concatenate([encoded.pixels[digit : digit + 1], decoded]))
            labels.append(f"noise {draw}")
    pictures.save_png(path, pictures.grid(np.concatenate(rows), len(rows[0]), labels, "original, then t = 1 .. T"))
    print(path)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def parts(tokenizer: Tokenizer, encoded: Encoded, path: Path) -> None:
    """What v_t is made of, and how often two draws of the noise give one position the same code."""
    quantizer, T = tokenizer.quantizer, tokenizer.quantizer.steps
    steps, alpha = range(1, T + 1), quantizer.alphas
    unknown = [a * rms(encoded.z) for a in alpha]
    known = [
        rms(beta(a) * encoded.eps[0][:, t - 1] - a * encoded.sums[t - 1]) for t, a in zip(steps, alpha, strict=True)
    ]
    lacking = [rms(encoded.z - encoded.sums[t - 1]) for t in steps]
    same = [float((encoded.codes[0][:, t - 1] == encoded.codes[1][:, t - 1]).float().mean()) for t in steps]
    figure, (first, second) = panels(2)
    first.plot(steps, unknown, marker=".", label="alpha_t |z|: unknown")
    first.plot(steps, known, marker=".", label="|beta_t eps_t - alpha_t z'_{t-1}|: known")
    first.plot(steps, lacking, "--", color="grey", label="|z - z'_{t-1}|: still missing")
    first.set(title="root mean square of v_t's parts", xlabel="t", ylim=(0, 1.9))
    first.legend(frameon=False, fontsize=8, loc="upper left")
    second.plot(steps, same, marker=".", color="tab:green")
    second.set(title="codes that two draws of noise have in common", xlabel="t", ylim=(0, 0.2))
    save(figure, path)


def known(log: list[dict[str, Any]], path: Path) -> None:
    """Held-out accuracy of the model and of the guess without one, and the gap."""
    last = [row for row in log if "heldout/accuracy" in row][-1]
    ours, guess = np.array(last["heldout/accuracy"]), np.array(last["heldout/baseline"])
    steps = np.arange(1, len(ours) + 1)
    figure, (left, right) = panels(2)
    left.plot(steps, ours, marker=".", label="the model")
    left.plot(steps, guess, marker=".", label="Q(beta eps - alpha z'), no model")
    left.set(title="codes predicted right, held out", xlabel="t", ylim=(0, 1))
    left.legend(frameon=False, fontsize=8)
    right.bar(steps, ours - guess, color="tab:blue")
    right.set(title="what the model adds", xlabel="t")
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    tokenizer, _ = model.load(options.demo / "tokenizer.pt")
    log = [json.loads(line) for line in (options.demo / "runs/generator/metrics.jsonl").read_text().splitlines()]
    schedules(options.out / "schedules.png")
    with torch.no_grad():
        encoded = Encoded(tokenizer)
        strip(tokenizer, encoded, options.out / "steps.png")
        parts(tokenizer, encoded, options.out / "parts.png")
    known(log, options.out / "known.png")


if __name__ == "__main__":
    main()

"""Reconstructions and their running scores."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rdpm_cli.evaluation import metrics
from rdpm_cli.images.sources import ImageSource, spread
from rdpm_cli.images.tensors import chw, hwc, to_model, to_pixels
from rdpm_cli.images.transform import Pixels
from rdpm_cli.threads import one_thread
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.tokenizer.perceptual import Net, Perceptual

RECON_BATCH = 16


class Reconstruction(NamedTuple):
    """Of a batch under one noise seed. latent_mse_B: mean over the latent of (z' - z)², a value an image."""

    pixels: Pixels
    latent_mse_B: Tensor


def reconstructions(
    source: ImageSource, tokenizer: Tokenizer, seed: int, device: torch.device, limit: int | None = None
) -> Iterator[tuple[list[int], Pixels, Pixels]]:
    """(indices, originals, reconstructions) under the `eval` noise of a seed, as `reconstructions_by_seed`."""
    for indices, originals, (recon,) in reconstructions_by_seed(source, tokenizer, [seed], device, limit):
        yield indices, originals, recon.pixels


def reconstructions_by_seed(
    source: ImageSource,
    tokenizer: Tokenizer,
    seeds: Sequence[int],
    device: torch.device,
    limit: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[list[int], Pixels, list[Reconstruction]]]:
    """(indices, originals, reconstructions under the `eval` noise of each seed), in padded batches on one thread.

    Images are read and encoded once: z does not depend on the seed. limit: so many images, evenly spaced. share: (rank,
    processes), of which each takes every so-manieth batch.
    """
    size = tokenizer.cfg.autoencoder.resolution
    chosen = spread(len(source), limit)
    rank, processes = share
    for start in range(rank * RECON_BATCH, len(chosen), processes * RECON_BATCH):
        part = chosen[start : start + RECON_BATCH]
        padded = part + [part[-1]] * (RECON_BATCH - len(part))
        originals = np.stack([source.pixels(i, size) for i in padded])
        recons = []
        with one_thread(), torch.no_grad():
            z = tokenizer.latents(to_model(chw(originals)).to(device))
            for seed in seeds:
                eps = tokenizer.noise("eval", seed, padded, [0] * RECON_BATCH).to(device)
                quantised = tokenizer.quantizer.decode(tokenizer.quantizer.encode(z, eps))
                pixels = hwc(to_pixels(tokenizer.decode_latents(quantised)))
                error_B = (quantised - z).square().flatten(1).mean(1)
                recons.append(Reconstruction(pixels[: len(part)], error_B[: len(part)]))
        yield part, originals[: len(part)], recons


class ReconstructionScores:
    """Running sums over images: mse on [-1, 1], psnr in dB, ssim, and lpips where there are networks. Flat memory."""

    def __init__(self, perceptual: Mapping[Net, Perceptual] | None = None) -> None:
        """perceptual: LPIPS by backbone, on the device to compute on."""
        self.perceptual = perceptual or {}
        self.sums, self.count = {"mse": 0.0, "psnr": 0.0, "ssim": 0.0}, 0
        self.sums |= {f"lpips_{net}": 0.0 for net in self.perceptual}

    def add(self, originals: Pixels, recon: Pixels, latent_mse_B: Tensor | None = None) -> None:
        """One batch, (B, H, W, 3) uint8 each; the error of their latents where it is known, for every batch or none."""
        a, b = chw(originals), chw(recon)
        values = {
            "mse": metrics.mean_squared_error(b, a),
            "psnr": metrics.psnr(b, a).clamp_max(100.0),  # an exact copy counts as 100 dB: means stay finite
            "ssim": metrics.ssim(b, a),
        }
        values |= {f"lpips_{net}": lpips(network, b, a) for net, network in self.perceptual.items()}
        values |= {} if latent_mse_B is None else {"latent_mse": latent_mse_B}
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.double().sum())
        self.count += len(originals)

    def merge(self, sums: Mapping[str, float], count: int) -> None:
        """Add what another process has summed over so many images."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += count

    def means(self) -> dict[str, float]:
        """Mean of each over images."""
        return {name: total / self.count for name, total in self.sums.items()}


@torch.no_grad()
def lpips(network: Perceptual, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Per image, uint8 inputs taken to [-1, 1]: (B,)."""
    device = next(network.parameters()).device
    distances: Tensor = network(to_model(a_BCHW).to(device), to_model(b_BCHW).to(device))
    return distances

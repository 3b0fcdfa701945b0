"""Reconstructions under given noise seeds, and their scores.

Legend: B batch, T steps, C channels, S positions of the flattened grid, D feature width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rdpm_cli import progress
from rdpm_cli.data.pixels import Pixels, chw, hwc, to_model, to_pixels
from rdpm_cli.data.source import Source, spread
from rdpm_cli.device import one_thread
from rdpm_cli.distributed import gather, world
from rdpm_cli.errors import AbsentWeightsError, DataError
from rdpm_cli.evaluation import metrics
from rdpm_cli.evaluation.features import (
    Extractor,
    Floats,
    extract,
    identity,
    image_digests,
    in_order,
    is_published_inception,
    open_extractor,
    set_digest,
)
from rdpm_cli.evaluation.score import rank_notes
from rdpm_cli.tokenizer.losses import BACKBONES, Net, Perceptual, load_perceptual, too_small
from rdpm_cli.tokenizer.model import Tokenizer

BATCH = 16  # images; always padded to this number, since sums in convolutions depend on it
EXACT_PSNR = 100.0  # dB of an exact copy, so that means stay finite


class Reconstruction(NamedTuple):
    """Of a batch under one noise seed. latent_mse_B: mean of (z' - z)² over the latent of each image."""

    pixels_BHWC: Pixels
    latent_mse_B: Tensor


def reconstructions(
    source: Source, tokenizer: Tokenizer, seed: int, device: torch.device, limit: int | None = None
) -> Iterator[tuple[list[int], Pixels, Pixels]]:
    """(indices, originals, reconstructions) under the `eval` noise of one seed, by this process."""
    for indices, originals, (recon,) in _by_seed(source, tokenizer, [seed], device, spread(len(source), limit)):
        yield indices, originals, recon.pixels_BHWC


def _by_seed(
    source: Source, tokenizer: Tokenizer, seeds: Sequence[int], device: torch.device, indices: list[int], size: int = 1
) -> Iterator[tuple[list[int], Pixels, list[Reconstruction]]]:
    """(indices, originals, reconstructions under the `eval` noise of each seed).

    Images are read and encoded once: z does not depend on the seed. size: processes, of which rank r takes every
    size-th batch.
    """
    resolution = tokenizer.cfg.autoencoder.resolution
    for start in range(world()[0] % size * BATCH, len(indices), size * BATCH):
        batch = indices[start : start + BATCH]
        padded = batch + [batch[-1]] * (BATCH - len(batch))
        originals = np.stack([source.pixels(index, resolution) for index in padded])
        recons = []
        with one_thread(), torch.no_grad():
            z_BCS = tokenizer.latents(to_model(chw(originals)).to(device))
            for seed in seeds:
                eps_BTCS = tokenizer.noise("eval", seed, padded, [0] * BATCH).to(device)
                quantised_BCS = tokenizer.quantizer.decode(tokenizer.quantizer.encode(z_BCS, eps_BTCS))
                pixels = hwc(to_pixels(tokenizer.decode_latents(quantised_BCS)))
                mse_B = (quantised_BCS - z_BCS).square().flatten(1).mean(1)
                recons.append(Reconstruction(pixels[: len(batch)], mse_B[: len(batch)]))
        yield batch, originals[: len(batch)], recons


# ---- scores of pairs -----------------------------------------------------------------------------------------------

PairScores = dict[str, metrics.Array]  # name -> one value an image


def pair_scores(originals: Pixels, recon: Pixels, perceptual: Mapping[Net, Perceptual] | None = None) -> PairScores:
    """mse on [-1, 1], psnr in dB, ssim, and lpips where there are networks, of (B, H, W, 3) uint8 pairs."""
    a, b = chw(originals), chw(recon)
    values = {
        "mse": metrics.mean_squared_error(b, a),
        "psnr": metrics.psnr(b, a).clamp_max(EXACT_PSNR),
        "ssim": metrics.ssim(b, a),
    }
    values |= {f"lpips_{net}": lpips(network, b, a) for net, network in (perceptual or {}).items()}
    return {name: value.double().cpu().numpy() for name, value in values.items()}


def means(batches: Sequence[PairScores]) -> dict[str, float]:
    """The mean of each score over the images of all batches."""
    return {name: float(np.concatenate([batch[name] for batch in batches]).mean()) for name in batches[0]}


@torch.no_grad()
def lpips(network: Perceptual, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Per image, uint8 inputs taken to [-1, 1]: (B,)."""
    device = next(network.parameters()).device
    distances: Tensor = network(to_model(a_BCHW).to(device), to_model(b_BCHW).to(device))
    return distances


# ---- networks ------------------------------------------------------------------------------------------------------


@dataclass
class Networks:
    """The networks that scores need, as far as their weights are here. absent: score -> why it is not computed."""

    extractor: Extractor | None = None
    perceptual: dict[Net, Perceptual] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def open_networks(
    count: int,
    resolution: int,
    device: torch.device,
    *,
    extractor: str | Path | None = None,
    weights: Path | None = None,
    download: bool = False,
    lpips: Mapping[Net, Path | None] | None = None,
) -> Networks:
    """The networks for this number of images of this size. A file that is named must be there and fit.

    Raises CheckpointError, DataError and UsageError. download: fetch Inception's weights where they are absent.
    """
    networks = Networks()
    if count < 2:
        networks.absent["rfid"] = f"a Fréchet distance needs at least 2 images, not {count}"
        if extractor or weights:
            raise DataError(networks.absent["rfid"], "take more images")
    else:
        try:
            networks.extractor = open_extractor(extractor, weights, device, download)
        except AbsentWeightsError as error:
            networks.absent["rfid"] = error.reason
    for net, backbone in BACKBONES.items():
        path = lpips.get(net) if lpips else None
        if path is None and resolution < backbone.smallest:
            networks.absent[f"lpips_{net}"] = too_small(net, resolution)
            continue
        try:
            network = load_perceptual(net, path, f"--lpips-{net} FILE", f"leave --lpips-{net} out", resolution)
            networks.perceptual[net] = network.to(device)
        except AbsentWeightsError as error:
            networks.absent[f"lpips_{net}"] = error.reason
    return networks


# ---- the record ----------------------------------------------------------------------------------------------------


class _Batch(NamedTuple):
    """Everything that a batch adds to the scores."""

    digests: list[bytes]  # of the originals
    features: tuple[Floats, Floats] | None  # of originals and the first seed's reconstructions
    by_seed: list[PairScores]


def score(
    source: Source, tokenizer: Tokenizer, networks: Networks, seeds: range, device: torch.device, limit: int | None
) -> dict[str, Any] | None:
    """Means over images and seeds, standard deviation over seeds; the Fréchet distance of the first seed.

    All processes share the images; the first one gets the record, the others None.
    """
    size, indices, batches = world()[1], spread(len(source), limit), []
    with progress.Bar("reconstruct", len(indices), "images") as bar:
        for part, originals, recons in _by_seed(source, tokenizer, seeds, device, indices, size):
            batches.append(_score_batch(networks, originals, recons))
            bar.advance(min(len(part) * size, len(indices) - bar.done))
    by_rank = gather(batches)
    return None if by_rank is None else _record(source, networks, seeds, in_order(by_rank))


def _score_batch(networks: Networks, originals: Pixels, recons: list[Reconstruction]) -> _Batch:
    by_seed = []
    for recon in recons:
        latent_mse = recon.latent_mse_B.double().cpu().numpy()
        by_seed.append({**pair_scores(originals, recon.pixels_BHWC, networks.perceptual), "latent_mse": latent_mse})
    features = None
    if extractor := networks.extractor:
        real, recon_features = (extract(extractor, side) for side in (originals, recons[0].pixels_BHWC))
        features = (real.features_ND, recon_features.features_ND)
    return _Batch(image_digests(originals), features, by_seed)


def _record(source: Source, networks: Networks, seeds: range, batches: list[_Batch]) -> dict[str, Any]:
    digests = [digest for batch in batches for digest in batch.digests]
    by_seed = [means([batch.by_seed[number] for batch in batches]) for number in range(len(seeds))]
    notes = [network.note for network in networks.perceptual.values() if network.note]
    values: dict[str, Any] = {"n": len(digests), "seed": seeds[0], "seeds": list(seeds)}
    values |= dict.fromkeys(networks.absent)
    if extractor := networks.extractor:
        real, recon = (np.concatenate(side) for side in zip(*(b.features for b in batches if b.features), strict=True))
        # Only the published Inception's distance of reconstructions may be called rFID.
        name = "rfid" if is_published_inception(extractor) else "frechet_distance"
        values[name] = metrics.frechet_distance(metrics.statistics(recon), metrics.statistics(real))
        notes += [extractor.note] if extractor.note else []
        notes += rank_notes(len(recon), recon.shape[1], "features")
        notes += [f"{name} is of seed {seeds[0]} only"] if len(seeds) > 1 else []
    spreads = {name: float(np.std([one[name] for one in by_seed])) for name in by_seed[0]}
    return {
        **values,
        **{name: float(np.mean([one[name] for one in by_seed])) for name in by_seed[0]},
        "not_computed": networks.absent,
        "spread_over_seeds": spreads if len(seeds) > 1 else None,
        "reference": {"name": source.spec, "count": len(digests), "sha256": set_digest(digests)},
        "extractor": networks.extractor and identity(networks.extractor),
        "lpips": {net: {"name": one.name, "sha256": one.sha256} for net, one in networks.perceptual.items()},
        "notes": notes,
    }

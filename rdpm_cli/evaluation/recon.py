"""Reconstructions under given noise seeds, and their scores.

Legend: B batch, T steps, C channels, S positions of the flattened grid, D feature width."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rdpm_cli import noise, progress
from rdpm_cli.data.mel import Mel, Wave, log_mel
from rdpm_cli.data.pixels import EXACT_PSNR, Cut, Pixels, chw, hwc, to_model, to_pixels
from rdpm_cli.data.source import Source, spread
from rdpm_cli.distributed import gather, one_thread, world
from rdpm_cli.errors import AbsentWeightsError, UsageError
from rdpm_cli.evaluation import backbones, features, judge, metrics
from rdpm_cli.evaluation.features import Extractor
from rdpm_cli.evaluation.score import rank_notes
from rdpm_cli.tokenizer.inputs import MelInputs
from rdpm_cli.tokenizer.losses import BACKBONES, Net, Perceptual, load_perceptual
from rdpm_cli.tokenizer.model import Tokenizer

BATCH = 16  # images; always padded to this number, since sums in convolutions depend on it
BORDER = 5  # pixels on each side whose SSIM window is not whole

PairScores = dict[str, metrics.Array]  # name -> one value an image


class Perturb:
    """Replaces each code with probability `share` by one of the K / 20 nearest others, uniformly (arXiv 2503.08354)."""

    def __init__(self, share: float, tokenizer: Tokenizer) -> None:
        books_MKC = tokenizer.quantizer.books.detach()
        self.share, self.neighbours = share, max(1, books_MKC.shape[1] // 20)
        distances_MKK = torch.cdist(books_MKC, books_MKC, compute_mode="donot_use_mm_for_euclid_dist")  # exact
        distances_MKK.diagonal(dim1=1, dim2=2).fill_(torch.inf)  # a code is no neighbour of itself
        self.nearest_MKD = distances_MKK.topk(self.neighbours, largest=False).indices

    def __call__(self, codes_BTS: Tensor, seed: int, indices: Sequence[int]) -> Tensor:
        """The codes of images of these indices; which change, and to what, depends on (seed, index, t) only."""
        steps = []
        for t, codes_BS in enumerate(codes_BTS.unbind(1), 1):
            shape = (2, codes_BS.shape[1])
            uniform = noise.uniform_rows("perturb", seed, indices, [0] * len(indices), t, shape)
            change_BS, draw_BS = torch.from_numpy(uniform).to(codes_BS.device).unbind(1)
            other_BS = (draw_BS * self.neighbours).long()
            replaced_BS = self.nearest_MKD[min(t, len(self.nearest_MKD)) - 1][codes_BS, other_BS]
            steps.append(torch.where(change_BS < self.share, replaced_BS, codes_BS))
        return torch.stack(steps, 1)


def reconstructions(
    source: Source, tokenizer: Tokenizer, seeds: Sequence[int | None], device: torch.device, indices: list[int],
    rank: int = 0, size: int = 1, *, perturb: Perturb | None = None, cut: Cut = "round",
) -> Iterator[tuple[list[int], Pixels, list[tuple[Pixels, Tensor]]]]:  # fmt: skip
    """(indices, originals, [(reconstructions, mean of (z' - z)² of each) of each seed]) under the `eval` noise.

    Seed None: of z itself, without quantisation. cut: of values to 8 bits."""
    for start in range(rank * BATCH, len(indices), size * BATCH):
        batch = indices[start : start + BATCH]
        padded = batch + [batch[-1]] * (BATCH - len(batch))
        originals = np.stack([source.pixels(index, tokenizer.cfg.autoencoder.resolution) for index in padded])
        recons = []
        with one_thread(), torch.no_grad():  # z does not depend on the seed
            z_BCS = tokenizer.latents(to_model(chw(originals)).to(device))
            for seed in seeds:
                decoded_BCS = z_BCS
                if seed is not None:
                    eps_BTCS = tokenizer.noise("eval", seed, padded, [0] * BATCH).to(device)
                    codes_BTS = tokenizer.quantizer.encode(z_BCS, eps_BTCS)
                    codes_BTS = perturb(codes_BTS, seed, padded) if perturb else codes_BTS
                    decoded_BCS = tokenizer.quantizer.decode(codes_BTS)
                pixels = hwc(to_pixels(tokenizer.decode_latents(decoded_BCS), cut))
                mse_B = (decoded_BCS - z_BCS).square().flatten(1).mean(1)
                recons.append((pixels[: len(batch)], mse_B[: len(batch)]))
        yield batch, originals[: len(batch)], recons


@torch.no_grad()
def encode_recording(tokenizer: Tokenizer, wave: Wave, index: int, seed: int) -> tuple[Mel, Tensor]:
    """The log-mel (F, M) of a wave at the tokenizer's rate, and its codes (1, T, S) under the `eval` noise."""
    inputs = tokenizer.inputs
    assert isinstance(inputs, MelInputs)
    item = log_mel(wave, inputs.features, inputs.stride)
    device = next(tokenizer.parameters()).device
    eps_BTCS = tokenizer.noise("eval", seed, [index], [0], inputs.positions(item)).to(device)
    with one_thread():
        return item, tokenizer.encode(inputs.to_model(inputs.tensor([item])).to(device), eps_BTCS)


@torch.no_grad()
def pair_scores(originals: Pixels, recon: Pixels, perceptual: Mapping[Net, Perceptual] | None = None) -> PairScores:
    """mse on [-1, 1], psnr in dB, ssim, and lpips where there are networks, of (B, H, W, 3) uint8 pairs.

    psnr and ssim have the data range 1.0 on uint8/255. ssim is the mean over whole windows, Gaussian, of 11 pixels a
    side, sigma 1.5 (Wang et al. 2004); smaller images have none."""
    # seconds to import, which trainings need not wait for
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    a, b = chw(originals), chw(recon)
    options: dict[str, Any] = {"data_range": 1.0, "reduction": "none"}
    psnr_B = peak_signal_noise_ratio(b.double() / 255, a.double() / 255, dim=(1, 2, 3), **options)
    mse_B = ((b.double() - a.double()) / 127.5).square().flatten(1).mean(1)
    values = {"mse": mse_B, "psnr": psnr_B.clamp_max(EXACT_PSNR)}
    if min(a.shape[2:]) > 2 * BORDER:
        _, map_BCHW = structural_similarity_index_measure(
            b.float() / 255, a.float() / 255, **options, return_full_image=True
        )
        inner = slice(BORDER, -BORDER)  # torchmetrics' own mean takes the windows over mirrored borders too
        values["ssim"] = map_BCHW[..., inner, inner].flatten(1).mean(1)
    for net, network in (perceptual or {}).items():
        device = next(network.parameters()).device
        values[f"lpips_{net}"] = network(to_model(b).to(device), to_model(a).to(device))
    return {name: value.double().cpu().numpy() for name, value in values.items()}


def means(batches: Sequence[PairScores]) -> dict[str, float]:
    """The mean of each score over the images of all batches."""
    return {name: float(np.concatenate([batch[name] for batch in batches]).mean()) for name in batches[0]}


@dataclass
class Networks:
    """The networks that scores need, as far as their weights are here. absent: score -> why it is not computed.

    fid: the name of a Fréchet distance by the published Inception."""

    fid: str = "rfid"
    extractor: Extractor | None = None
    perceptual: dict[Net, Perceptual] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def open_networks(
    count: int, resolution: int, device: torch.device, lpips: Mapping[Net, Path | None],
    extractor: str | Path | None = None, weights: Path | None = None, download: bool = False, fid: str = "rfid",
) -> Networks:  # fmt: skip
    """The networks for this number of images of this size. Weights that are absent are an error only if named."""
    networks = Networks(fid)
    try:
        networks.extractor = backbones.open_extractor(extractor, weights, device, download) if count > 1 else None
    except AbsentWeightsError as error:
        if extractor is not None:
            raise
        networks.absent[fid] = error.message
    if networks.extractor:
        judge.check_size(networks.extractor.resolution, resolution)
    if count < 2:
        networks.absent[fid] = f"a Fréchet distance needs at least 2 images, not {count}"
    for net in BACKBONES:
        path = lpips.get(net)
        try:
            network = load_perceptual(net, path, f"--lpips-{net} FILE", f"leave --lpips-{net} out", resolution)
            networks.perceptual[net] = network.to(device)
        except (AbsentWeightsError, UsageError) as error:  # absent, or the images are too small
            if path is not None:
                raise
            networks.absent[f"lpips_{net}"] = error.message
    return networks


def score(
    source: Source, tokenizer: Tokenizer, networks: Networks, seeds: range, device: torch.device, limit: int | None,
    *, perturb: Perturb | None = None, cut: Cut = "round",
) -> dict[str, Any] | None:  # fmt: skip
    """Means over images and seeds, their spread over seeds, the Fréchet distance of the first seed; in process 0.

    continuous: the scores of z itself."""
    (rank, size), extractor = world(), networks.extractor
    indices, batches = spread(len(source), limit), []
    made = reconstructions(
        source, tokenizer, [*seeds, None], device, indices, rank, size, perturb=perturb, cut=cut
    )  # fmt: skip
    with progress.Bar("reconstruct", len(indices), "images") as bar:
        for part, originals, recons in made:
            scores = [pair_scores(originals, pixels, networks.perceptual) for pixels, _ in recons]
            for each, (_, mse_B) in zip(scores[:-1], recons[:-1], strict=True):
                each["latent_mse"] = mse_B.double().cpu().numpy()
            sides = (originals, recons[0][0], recons[-1][0])  # of the first seed, and of z
            sides_ND = [features.extract(extractor, side).features_ND for side in sides] if extractor else []
            batches.append((features.image_digests(originals), sides_ND, scores))
            bar.advance(min(len(part) * size, len(indices) - bar.done))
    by_rank = gather(batches)
    return None if by_rank is None else _record(source, networks, seeds, features.in_order(by_rank))


def _record(source: Source, networks: Networks, seeds: range, batches: list[tuple[Any, Any, Any]]) -> dict[str, Any]:
    """batches: digests of the originals, features of them and their reconstructions, scores of each seed and of z."""
    digests, features_of, scores_of = zip(*batches, strict=True)
    extractor, count = networks.extractor, sum(map(len, digests))
    *by_seed, continuous = (means(scores) for scores in zip(*scores_of, strict=True))
    values = {"n": count, "seed": seeds[0], "seeds": list(seeds), **dict[str, Any].fromkeys(networks.absent)}
    notes = [network.note for network in networks.perceptual.values() if network.note]
    if extractor:
        original, recon, of_z = (metrics.statistics(np.concatenate(side)) for side in zip(*features_of, strict=True))
        published = extractor.name == features.PUBLISHED
        name, of_z_name = (networks.fid, "rfid") if published else ("frechet_distance", "frechet_distance")
        values[name] = metrics.frechet_distance(recon, original)
        continuous[of_z_name] = metrics.frechet_distance(of_z, original)
        notes += [extractor.note] if extractor.note else []
        notes += rank_notes(recon.count, len(recon.mean_D))
        notes += [f"{name} is of seed {seeds[0]} only"] if len(seeds) > 1 else []
    columns = {name: [each[name] for each in by_seed] for name in by_seed[0]}
    digest = features.set_digest(digest for batch in digests for digest in batch)
    return {
        **values, **{name: float(np.mean(column)) for name, column in columns.items()}, "not_computed": networks.absent,
        "spread_over_seeds": {k: metrics.deviation(v) for k, v in columns.items()} if len(seeds) > 1 else None,
        "continuous": continuous,
        "reference": {"name": source.spec, "count": count, "sha256": digest},
        "extractor": extractor and features.identity(extractor),
        "lpips": {net: {"name": one.name, "sha256": one.sha256} for net, one in networks.perceptual.items()},
        "notes": notes,
    }  # fmt: skip

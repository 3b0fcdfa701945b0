"""How well a store decodes: the PSNR of a few images against their originals, recorded and compared later."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rdpm_cli.codes.encode import original
from rdpm_cli.codes.manifest import Manifest, Sample
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.images.sources import ImageSource, spread
from rdpm_cli.images.tensors import hwc, to_pixels
from rdpm_cli.images.transform import Pixels
from rdpm_cli.threads import one_thread
from rdpm_cli.tokenizer.model import Tokenizer

SAMPLES = 16
DIGITS = 2  # of the recorded dB: fewer than a machine's last bits move
EXACT = 100.0  # dB of an exact copy


def measure(root: Path, manifest: Manifest, tokenizer: Tokenizer, source: ImageSource) -> tuple[Sample, ...]:
    """The PSNR of 16 images of a store, evenly spaced."""
    store = CodeStore(root, manifest=manifest)
    indices = store.index[:: manifest.views]
    chosen = [int(indices[place]) for place in spread(len(indices), SAMPLES)]
    return tuple(
        Sample(index=i, psnr=v) for i, v in zip(chosen, decoded_psnr(store, chosen, tokenizer, source), strict=True)
    )


def decoded_psnr(store: CodeStore, indices: Sequence[int], tokenizer: Tokenizer, source: ImageSource) -> list[float]:
    """dB of the first view of each image, decoded alone and on one thread: the same whichever others are looked at."""
    m = store.manifest
    device = next(tokenizer.parameters()).device
    found = []
    for index in indices:
        row = np.searchsorted(store.index, [index])
        codes = torch.from_numpy(store.codes(row).astype(np.int64)).to(device)
        with one_thread():
            recon = hwc(to_pixels(tokenizer.decode(codes)))[0]
        found.append(psnr(original(source, m, index), recon))
    return found


def psnr(image: Pixels, recon: Pixels) -> float:
    """10 log10(255² / MSE) of uint8 pixels, in dB, rounded; an exact copy counts as 100."""
    error = int(np.square(image.astype(np.int64) - recon).sum())
    return round(10 * math.log10(255**2 * image.size / error), DIGITS) if error else EXACT

"""Editing: samples that begin with the codes of an image.

Kept codes are the image's own under the noise of the sample they are kept in, so what the network sees of them is what
the tokenizer would have made. Sample i has noise of its own, so each sample has other codes of the same image.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdpm_cli.errors import UsageError

if TYPE_CHECKING:
    import torch

    from rdpm_cli.generator.sampler import Given
    from rdpm_cli.images.transform import Pixels
    from rdpm_cli.tokenizer.model import Tokenizer


@dataclass(frozen=True)
class Edit:
    """--init, and what of it is drawn anew: where --mask is white, at every step; or --from-step on, everywhere.

    With both: where the mask is white, from that step on.
    """

    init: str
    mask: str | None = None
    from_step: int | None = None

    @property
    def first(self) -> int:
        """The first step whose codes are drawn."""
        return 1 if self.from_step is None else self.from_step


def ask(init: str | None, mask: str | None, from_step: int | None) -> Edit | None:
    """The edit of these options, None without any. Raises UsageError where they do not go together."""
    if init is None:
        if mask is not None or from_step is not None:
            raise UsageError("--mask and --from-step change an image", "name it with --init IMAGE")
        return None
    if mask is None and from_step is None:
        raise UsageError("--init says what to keep, and nothing says what to draw", "add --mask MASK or --from-step K")
    return Edit(init, mask, from_step)


@dataclass
class Original:
    """The image as the tokenizer takes it, and what of its codes is kept. digests: for the record."""

    pixels: Pixels
    keep_THW: torch.Tensor  # bool
    digests: dict[str, str]


def read(edit: Edit, tokenizer: Tokenizer) -> Original:
    """The original of an edit. Raises UsageError for a mask or step that cannot be, ImageError for a bad image."""
    import torch

    from rdpm_cli.images import items

    auto, T = tokenizer.cfg.autoencoder, tokenizer.quantizer.steps
    first = edit.first
    if not 1 <= first <= T:
        raise UsageError(f"--from-step {first} is not in 1..{T}", f"this checkpoint has T = {T}")
    image = items.open_item(edit.init)
    pixels = items.crop(image, auto.resolution, edit.init)
    drawn_HW, digests = torch.ones(auto.grid, dtype=torch.bool), {"init": _digest(pixels)}
    if edit.mask is not None:
        mask = items.open_item(edit.mask)
        if mask.size not in (image.size, (auto.resolution, auto.resolution)):
            raise UsageError(
                f"--mask {edit.mask} is {mask.width}×{mask.height}, the image {image.width}×{image.height}",
                f"give a mask of the image's size, or of {auto.resolution}×{auto.resolution} after the centre crop",
            )
        white = items.crop(mask, auto.resolution, edit.mask)
        drawn_HW, digests["mask"] = torch.from_numpy(items.cells(white, auto.grid)), _digest(white)
    if not drawn_HW.any():
        raise UsageError(f"--mask {edit.mask} has no white pixel inside the crop: all is kept", "white is drawn anew")
    late_T11 = torch.arange(1, T + 1).view(-1, 1, 1) >= first
    return Original(pixels, ~(late_T11 & drawn_HW), digests)


def given(original: Original, tokenizer: Tokenizer, seed: int, device: torch.device) -> Given:
    """The image's codes under the noise of samples, and which of them are kept. The tokenizer is on the device."""
    import numpy as np
    import torch

    from rdpm_cli.generator.contract import Known
    from rdpm_cli.images.tensors import chw, to_model
    from rdpm_cli.threads import one_thread

    with one_thread(), torch.no_grad():
        z = tokenizer.latents(to_model(chw(np.stack([original.pixels]))).to(device))

    def known(rows: list[int]) -> Known:
        eps = tokenizer.noise("sample", seed, rows, [0] * len(rows)).to(device)
        with one_thread():
            codes = tokenizer.quantizer.encode(z.expand(len(rows), -1, -1, -1), eps)
        return Known(codes, original.keep_THW.expand(len(rows), -1, -1, -1))

    return known


def _digest(pixels: Pixels) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()

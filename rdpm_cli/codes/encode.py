"""Images -> codes: the same bytes whatever ran before or beside, because every convolution sees one fixed batch shape.

Legend: n images, V views, F = 2 with flips else 1, B rows of a micro-batch, T steps, C h w latent shape.
"""

import functools
import math
import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdpm_cli import crew, noise
from rdpm_cli.codes.manifest import BadImage, DataOrigin, Plan
from rdpm_cli.errors import ImageError, RunError, UsageError
from rdpm_cli.images.sources import ImageSource
from rdpm_cli.images.tensors import chw, to_model
from rdpm_cli.images.transform import DRAFT_TRANSFORM, TRANSFORM
from rdpm_cli.threads import one_thread
from rdpm_cli.tokenizer.model import Tokenizer

POSITIONS_AT_ONCE = {"cpu": 2048, "cuda": 16384}  # latent positions a forward pass
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of a Python object, in other libraries' messages


def make_plan(
    source: ImageSource,
    tokenizer: Tokenizer,
    digest: str,
    *,
    views: int,
    flip: bool,
    latents: bool,
    seed: int,
    shard_images: int,
    device: torch.device,
    draft: bool = False,
    precision: Literal["fp32", "bf16"] | None = None,
    micro_batch: int | None = None,
) -> Plan:
    """Everything that fixes the store. Needs labels: a store is what a class-conditional generator learns from.

    precision: of the encoder, default fp32 on a CPU and bf16 elsewhere; the quantiser is fp32. micro_batch: images a
    forward pass; fixed on a CPU, where codes must not depend on it.
    """
    source.need_labels()
    if flip and views % 2:
        raise UsageError(f"--flip mirrors every second view, and --views is {views}", "give an even number of views")
    if device.type == "cpu":
        _refuse_on_cpu("--precision bf16" if precision == "bf16" else "", "--micro-batch" if micro_batch else "")
    auto, quant = tokenizer.cfg.autoencoder, tokenizer.cfg.quantizer
    positions = POSITIONS_AT_ONCE["cpu" if device.type == "cpu" else "cuda"]
    return Plan(
        tokenizer=digest,
        steps=quant.steps,
        grid=auto.grid,
        codes=quant.codes,
        channels=auto.channels,
        views=views,
        flip=flip,
        latents=latents,
        seed=seed,
        noise=tuple(noise.fingerprint(seed)),
        transform=DRAFT_TRANSFORM if draft else TRANSFORM,
        resolution=auto.resolution,
        class_names=tuple(source.class_names),
        data=DataOrigin(source=source.spec, count=len(source), digest=source.digest()),
        device=device.type,
        precision=precision or ("fp32" if device.type == "cpu" else "bf16"),
        micro_batch=micro_batch or max(1, positions // math.prod(auto.grid)),
        shard_images=shard_images,
    )


def _refuse_on_cpu(*options: str) -> None:
    for option in filter(None, options):
        raise UsageError(
            f"{option} is for GPUs: a store made on a CPU has the same bytes on every machine of its type",
            "leave it out, or give --device cuda",
        )


@dataclass
class Prepared:
    """A micro-batch before the network. codes of image `indices[i]` are a function of row i alone."""

    looked_at: int  # images, the bad ones too
    indices: list[int]  # of the good ones
    bad: list[BadImage]
    pixels_BCHW: Tensor  # uint8, padded to the plan's micro-batch; empty where no image is good
    eps_VBTCHW: Tensor  # fp32


@dataclass
class Encoded:
    """A micro-batch of codes."""

    looked_at: int
    indices: list[int]
    bad: list[BadImage]
    codes: NDArray[np.uint16]  # (n, V, T, h, w)
    latents: NDArray[np.float16] | None  # (n, F, C, h, w)


def parts(plan: Plan, shard: int) -> list[range]:
    """The source indices of a shard's micro-batches."""
    indices = plan.shard_range(shard)
    return [range(start, min(start + plan.micro_batch, indices.stop)) for start in indices[:: plan.micro_batch]]


def original(source: ImageSource, plan: Plan, index: int) -> NDArray[np.uint8]:
    """The pixels that an image of the store is coded from, (size, size, 3). Raises ImageError."""
    return source.pixels(index, plan.resolution, draft=plan.transform == DRAFT_TRANSFORM)


def prepare(source: ImageSource, plan: Plan, part: range) -> Prepared:
    """Decode, crop, draw the noise. Padded to the micro-batch by the last image."""
    pixels, bad = {}, []
    for index in part:
        try:
            pixels[index] = original(source, plan, index)
        except ImageError as error:
            reason = " ".join(ADDRESS.sub("", error.reason).split())
            bad.append(BadImage(index=index, name=error.name, reason=reason))
    indices = list(pixels)
    if not indices:
        return Prepared(len(part), [], bad, torch.empty(0, dtype=torch.uint8), torch.empty(0))
    padded = indices + indices[-1:] * (plan.micro_batch - len(indices))
    shape = (plan.channels, *plan.grid)
    eps = [
        noise.normal_steps("encode", plan.seed, padded, [view] * len(padded), plan.steps, shape)
        for view in range(plan.views)
    ]
    images = chw(np.stack([pixels[index] for index in padded]))
    return Prepared(len(part), indices, bad, images, torch.from_numpy(np.stack(eps)))


@torch.no_grad()
def encode(batch: Prepared, tokenizer: Tokenizer, plan: Plan) -> Encoded:
    """E and Q of a micro-batch, on the tokenizer's device; E in the plan's precision, Q in fp32."""
    count = len(batch.indices)
    if not count:
        codes_shape = (0, plan.views, plan.steps, *plan.grid)
        latents_shape = (0, plan.mirrored, plan.channels, *plan.grid)
        none = np.empty(latents_shape, np.float16) if plan.latents else None
        return Encoded(batch.looked_at, [], batch.bad, np.empty(codes_shape, np.uint16), none)
    device = next(tokenizer.parameters()).device
    x = to_model(batch.pixels_BCHW.to(device))
    z_F = [_latents(x.flip(3) if mirrored else x, tokenizer, plan) for mirrored in range(plan.mirrored)]
    codes_V = [
        tokenizer.quantizer.encode(z_F[view % plan.mirrored], batch.eps_VBTCHW[view].to(device))
        for view in range(plan.views)
    ]
    codes = torch.stack(codes_V, 1)[:count].to(torch.int32).cpu().numpy().astype(np.uint16)
    latents = torch.stack(z_F, 1)[:count].to(torch.float16).cpu().numpy() if plan.latents else None
    return Encoded(batch.looked_at, batch.indices, batch.bad, codes, latents)


def _latents(x_BCHW: Tensor, tokenizer: Tokenizer, plan: Plan) -> Tensor:
    """z = LN(E(x)); in bf16 the encoder runs in channels_last, as GPUs like it."""
    if plan.precision == "fp32":
        return tokenizer.latents(x_BCHW)
    with torch.autocast(x_BCHW.device.type, torch.bfloat16):
        return tokenizer.latents(x_BCHW.contiguous(memory_format=torch.channels_last))


def encode_part(source: ImageSource, tokenizer: Tokenizer, plan: Plan, part: range) -> Encoded:
    """Both, on one thread: convolutions move by 1e-7 with the thread count, and a near-tie then flips a code."""
    with one_thread():
        return encode(prepare(source, plan, part), tokenizer, plan)


def encode_parts(
    source: ImageSource, tokenizer: Tokenizer, plan: Plan, todo: list[range], workers: int
) -> Generator[Encoded, None, None]:
    """Every micro-batch, in order. On a CPU the workers do all of it; a GPU encodes what they prepare."""
    workers = min(workers, len(todo))
    if plan.device == "cpu":
        yield from crew.in_order(functools.partial(encode_part, source, tokenizer, plan), todo, workers)
        return
    for prepared in crew.in_order(functools.partial(prepare, source, plan), todo, workers):
        try:
            yield encode(prepared, tokenizer, plan)
        except torch.OutOfMemoryError as error:  # the micro-batch is a field of the store: codes depend on it
            raise RunError(
                f"out of memory with micro-batches of {plan.micro_batch} images",
                f"give --micro-batch {max(1, plan.micro_batch // 2)} and another OUT, or remove this one",
            ) from error

"""Images -> code store: the same bytes whatever ran before, because every convolution sees one fixed batch shape."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdpm_cli import files, noise
from rdpm_cli.codes import store
from rdpm_cli.codes.store import DataOrigin, Plan
from rdpm_cli.errors import UsageError
from rdpm_cli.images.sources import ImageSource
from rdpm_cli.images.tensors import chw, to_model
from rdpm_cli.images.transform import TRANSFORM
from rdpm_cli.threads import one_thread
from rdpm_cli.tokenizer.model import Tokenizer

POSITIONS_AT_ONCE = 2048  # latent positions a forward pass


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
) -> Plan:
    """Everything that fixes the store. Needs labels: a store is what a class-conditional generator learns from."""
    source.need_labels()
    if flip and views % 2:
        raise UsageError(f"--flip mirrors every second view, and --views is {views}", "give an even number of views")
    auto, quant = tokenizer.cfg.autoencoder, tokenizer.cfg.quantizer
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
        transform=TRANSFORM,
        resolution=auto.resolution,
        class_names=tuple(source.class_names),
        data=DataOrigin(source=source.spec, count=len(source), digest=source.digest()),
        device=device.type,
        micro_batch=max(1, POSITIONS_AT_ONCE // math.prod(auto.grid)),
        shard_images=shard_images,
    )


def write_store(
    root: Path, source: ImageSource, tokenizer: Tokenizer, tokenizer_file: bytes, plan: Plan, record: dict[str, Any]
) -> Iterator[int]:
    """Write what is missing of the store, yielding how many images each piece of work finished.

    record: what run.json keeps about this run (not part of the store). tokenizer_file: the bytes of its file.
    """
    with files.only_writer(root):
        store.begin(root, plan, record)
        if (root / "manifest.json").exists():
            yield plan.data.count
            return
        for left in root.glob(".*.tmp"):  # of a process that was killed; we hold the lock
            left.unlink()
        store.need_space(root, plan)
        files.write_atomic(root / "tokenizer.pt", lambda file: file.write(tokenizer_file))
        files.write_atomic(root / "names.jsonl", lambda file: file.write(_names(source)))
        todo = store.missing_shards(root, plan)
        yield sum(len(plan.shard_range(s)) for s in range(plan.shard_count) if s not in todo)
        for shard in todo:
            yield from _write_one(root, source, tokenizer, plan, shard)
        store.finish(root, plan)


def _names(source: ImageSource) -> bytes:
    return "".join(json.dumps({"index": i, "name": name}) + "\n" for i, name in enumerate(source.names)).encode()


def _write_one(root: Path, source: ImageSource, tokenizer: Tokenizer, plan: Plan, shard: int) -> Iterator[int]:
    indices = plan.shard_range(shard)
    labels = source.need_labels()
    codes, latents = [], []
    for start in range(indices.start, indices.stop, plan.micro_batch):
        part = range(start, min(start + plan.micro_batch, indices.stop))
        images = np.stack([source.pixels(i, plan.resolution) for i in part])
        codes_NVTHW, latents_NFCHW = encode_images(images, part, tokenizer, plan)
        codes.append(codes_NVTHW.reshape(-1, *codes_NVTHW.shape[2:]))
        if plan.latents:
            latents.append(latents_NFCHW.reshape(-1, *latents_NFCHW.shape[2:]))
        if part.stop < indices.stop:
            yield len(part)
    arrays: dict[str, NDArray[Any]] = {
        "codes": np.concatenate(codes),
        "labels": np.repeat(np.array([labels[i] for i in indices], dtype=np.int32), plan.views),
        "index": np.repeat(np.array(indices, dtype=np.int64), plan.views),
    }
    if plan.latents:
        arrays["latents"] = np.concatenate(latents)
    store.write_shard(root, shard, arrays)
    yield len(part)


@torch.no_grad()
def encode_images(
    images: NDArray[np.uint8], indices: range, tokenizer: Tokenizer, plan: Plan
) -> tuple[NDArray[np.uint16], NDArray[np.float16]]:
    """(n, H, W, 3) uint8 of source `indices` -> codes (n, V, T, h, w), latents (n, F, C, h, w).

    Padded to the plan's micro-batch and run on one thread: convolutions move by 1e-7 with batch shape and thread
    count, and a near-tie then flips a code.
    """
    device = next(tokenizer.parameters()).device
    x = _pad(to_model(chw(images)), plan.micro_batch).to(device)
    padded = list(indices) + [indices[-1]] * (plan.micro_batch - len(indices))
    with one_thread():
        z_F = [tokenizer.latents(x.flip(3) if mirrored else x) for mirrored in range(2 if plan.flip else 1)]
        codes_V = []
        for view in range(plan.views):
            eps = tokenizer.noise("encode", plan.seed, padded, [view] * len(padded)).to(device)
            codes_V.append(tokenizer.quantizer.encode(z_F[view & 1 if plan.flip else 0], eps))
    codes = torch.stack(codes_V, 1)[: len(indices)].to(torch.int32).cpu().numpy().astype(np.uint16)
    return codes, torch.stack(z_F, 1)[: len(indices)].to(torch.float16).cpu().numpy()


def _pad(x: Tensor, rows: int) -> Tensor:
    return torch.cat([x, x[-1:].expand(rows - len(x), *x.shape[1:])]) if len(x) < rows else x

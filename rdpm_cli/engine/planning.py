"""`--dry-run` of the training commands: what a run would take, without running and without writing anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpm_cli import config, noise, recipe_files
from rdpm_cli.engine import flops, gpus, runs, warming
from rdpm_cli.engine.flops import Latent
from rdpm_cli.engine.gpus import GIB, Gpu
from rdpm_cli.engine.runs import Result
from rdpm_cli.errors import UsageError

if TYPE_CHECKING:
    from rdpm_cli.codes.manifest import Manifest
    from rdpm_cli.engine.memory import Make

IMAGENET_IMAGES, IMAGENET_CLASSES = 1_281_167, 1000
USABLE = 0.9  # of a GPU's memory: the rest is for CUDA itself, kernels' workspaces and gaps between tensors
DEFAULT_GPU, DEFAULT_UTILISATION = "h200", 0.4
TITLE = "nothing run or written: this is a dry run"


@dataclass(frozen=True)
class Hardware:
    """What a run would have. utilisation: the share of a GPU's bf16 peak that training is taken to reach."""

    gpu: Gpu
    count: int
    utilisation: float

    @classmethod
    def of(cls, gpu: str | None = None, count: int | None = None, utilisation: float | None = None) -> Hardware:
        """By the options --gpu, --gpus and --utilisation; None for the default. Raises UsageError."""
        share = DEFAULT_UTILISATION if utilisation is None else utilisation
        if not 0 < share <= 1:
            raise UsageError(f"--utilisation {share} is not a share", "give a number above 0, up to 1")
        return cls(gpus.called(gpu or DEFAULT_GPU), count or 1, share)


@dataclass(frozen=True)
class Work:
    """What is to be done. forward, passes: operations an image of a training step, the latter by part."""

    recipe: str
    cfg: config.TrainConfig
    images: int
    forward: int
    passes: dict[str, int]
    assumed: str | None = None

    @property
    def image(self) -> int:
        """Floating-point operations of a training step an image."""
        return sum(self.passes.values())

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.cfg.total_steps(self.images)


# ---- numbers -------------------------------------------------------------------------------------------------------


def timing(work: Work, hardware: Hardware) -> dict[str, Any]:
    """Length of the run: images, steps, operations, hours."""
    a_second = hardware.utilisation * hardware.gpu.bf16_flops * hardware.count
    images = work.steps * work.cfg.batch
    hours = images * work.image / a_second / 3600
    return {
        "images": work.images,
        "batch": work.cfg.batch,
        "steps": work.steps,
        "epochs": images / work.images,
        "flops": {
            "image_forward": float(work.forward),
            "image": float(work.image),
            "image_parts": {name: float(n) for name, n in work.passes.items()},
            "step": float(work.image * work.cfg.batch),
            "run": float(work.image * images),
        },
        "gpu": hardware.gpu.name,
        "gpus": hardware.count,
        "gpu_bf16_flops": hardware.gpu.bf16_flops,
        "utilisation": hardware.utilisation,
        "images_per_second": a_second / work.image,
        "hours": hours,
        "gpu_hours": hours * hardware.count,
    }


def own_images(cfg: config.TrainConfig, count: int) -> int:
    """Images a step of each of `count` processes. Raises UsageError where they cannot share the batch."""
    from rdpm_cli.training import distributed

    distributed.check_share(cfg.batch, count)
    return cfg.batch // count


def largest(fixed: int, start: float, each: float, room: float, most: int) -> int:
    """The largest micro-batch, a multiple of 16 of at most `most` images, that fits; 0 for none.

    fixed + start + each × images bytes are needed, room bytes are there.
    """
    fits = math.floor((room - fixed - start) / each)
    fits = min(fits, most)
    return most if fits == most else max(0, fits // noise.BLOCK * noise.BLOCK)


def memory(make: Make, cfg: config.TrainConfig, hardware: Hardware, frozen: int, step: int = 0) -> dict[str, Any]:
    """GiB of a GPU by part, for the recipe's micro-batch; the largest micro-batch that fits.

    make: the players and a micro-batch. frozen: bytes of networks that do not learn. step: the one measured.
    """
    from rdpm_cli.engine import memory as measured

    own = own_images(cfg, hardware.count)
    micro = min(cfg.micro_batch or own, own)
    low, high = (measured.activations(make, cfg, rows, step) for rows in (noise.BLOCK, 2 * noise.BLOCK))
    each = (high - low) / noise.BLOCK
    start = low - each * noise.BLOCK
    with measured.shapes_alone():
        held = {**measured.fixed(make(1)[0], cfg), "frozen": frozen}
    room = USABLE * hardware.gpu.memory_gib * GIB
    parts = {**held, "activations": start + each * micro}
    return {
        "micro_batch": micro,
        "memory_gib": {name: size / GIB for name, size in {**parts, "total": sum(parts.values())}.items()},
        "memory_gib_an_image": each / GIB,
        "gpu_memory_gib": hardware.gpu.memory_gib,
        "fits": sum(parts.values()) <= room,
        "largest_micro_batch": largest(sum(held.values()), start, each, room, own),
    }


# ---- train-gen -----------------------------------------------------------------------------------------------------


def plan_generator(
    codes: Path, out: Path | None, recipe_name: str, overrides: Sequence[str], hardware: Hardware
) -> Result:
    """What `train-gen CODES --out OUT` would take. A store that does not exist is taken to be ImageNet's."""
    recipe = recipe_files.load_recipe(recipe_name, overrides, "generator")
    cfg = recipe.generator
    assert cfg is not None
    from rdpm_cli.codes.manifest import Manifest
    from rdpm_cli.generator import model
    from rdpm_cli.tokenizer import model as tokenizer_file

    out = out or runs.default_folder(recipe, "generator")
    folder = runs.check_plan(out, "train-gen", "generator.pt", runs.chosen(recipe, "generator"))
    m = Manifest.load(codes) if codes.exists() else None
    architecture = recipe.tokenizer or config.TokenizerArchitecture()
    if m:
        architecture = tokenizer_file.load(codes / "tokenizer.pt")[0].cfg
        model.check_codes(cfg.family, architecture, str(codes))
    latent = Latent.of(architecture)
    classes = len(m.class_names) if m else IMAGENET_CLASSES
    assumed = f"no store {codes}: ImageNet's {IMAGENET_IMAGES:,} images, {IMAGENET_CLASSES} classes"
    passes = flops.generator_step(cfg, latent)
    work = Work(
        recipe=recipe.name,
        cfg=cfg.train,
        images=_trained_images(m.images if m else IMAGENET_IMAGES),
        forward=passes["forward"],
        passes=passes,
        assumed=None if m else assumed,
    )
    frozen = (codes / "tokenizer.pt").stat().st_size if m else 4 * _tokenizer_parameters(architecture)
    make = generator_maker(cfg, architecture, classes)
    values = {
        "recipe": work.recipe,
        "assumed": work.assumed,
        "parameters": _parameters(make),
        **timing(work, hardware),
        **memory(make, cfg.train, hardware, frozen),
        "store_gb": store_bytes(latent, m, cfg.uses_latents) / 1e9,
        **folder,
    }
    return Result(TITLE, values)


def _trained_images(images: int) -> int:
    """Without those that training holds out, by the hash or, where it takes none, the last."""
    import numpy as np

    from rdpm_cli.codes.store import held_out

    return images - max(1, int(held_out(np.arange(images)).sum()))


def store_bytes(latent: Latent, m: Manifest | None, latents: bool) -> int:
    """Codes (uint16), labels and indices of every view, and z (fp16) where kept. m: None for one view of ImageNet."""
    from rdpm_cli.codes.manifest import image_bytes

    if m:
        return m.images * m.image_bytes()
    return IMAGENET_IMAGES * image_bytes(latent.positions, latent.steps, 1, latent.channels if latents else 0)


def generator_maker(cfg: config.GeneratorConfig, codes: config.TokenizerArchitecture, classes: int) -> Make:
    """rows -> a fresh generator's player and a micro-batch, to be called where tensors have no content.

    codes: what made them.
    """

    def make(rows: int) -> tuple[list[Any], Any]:
        from rdpm_cli.generator import model, transformer
        from rdpm_cli.generator.task import GeneratorTask
        from rdpm_cli.tokenizer.quantizer import Quantizer

        auto = codes.autoencoder
        quantizer = Quantizer(codes.quantizer, codes.schedule, auto.channels).eval().requires_grad_(False)
        family = model.FAMILIES[cfg.family]
        generator = family.make(cfg, quantizer, auto.grid, classes)
        model.prepare(generator, cfg, transformer.sdpa)
        return [GeneratorTask(generator)], family.blank(cfg, quantizer, auto.grid, rows)

    return make


# ---- train-tokenizer -----------------------------------------------------------------------------------------------


def plan_tokenizer(
    images: str,
    out: Path | None,
    recipe_name: str,
    overrides: Sequence[str],
    hardware: Hardware,
    from_weights: Path | None = None,
) -> Result:
    """What `train-tokenizer IMAGES --out OUT` would take. Images that are not there are taken to be ImageNet's."""
    recipe = recipe_files.load_recipe(recipe_name, overrides, "tokenizer")
    cfg = recipe.tokenizer
    assert cfg is not None
    from rdpm_cli.images.sources import is_there, open_source

    out = out or runs.default_folder(recipe, "tokenizer")
    folder = runs.check_plan(out, "train-tokenizer", "tokenizer.pt", runs.chosen(recipe, "tokenizer"))
    warming.identity(from_weights)
    count = len(open_source(images)) if is_there(images) else None
    work = Work(
        recipe=recipe.name,
        cfg=cfg.train,
        images=count or IMAGENET_IMAGES,
        forward=flops.tokenizer_forward(cfg),
        passes=flops.tokenizer_step(cfg),
        assumed=None if count else f"no images {images}: ImageNet's {IMAGENET_IMAGES:,}",
    )
    make = tokenizer_maker(cfg)
    frozen = 4 * flops.VGG16_PARAMETERS if cfg.loss.perceptual != "none" else 0
    values = {
        "recipe": work.recipe,
        "assumed": work.assumed,
        "parameters": _parameters(make),
        **timing(work, hardware),
        **memory(make, cfg.train, hardware, frozen, step=cfg.discriminator.start),
        **folder,
    }
    return Result(TITLE, values)


def tokenizer_maker(cfg: config.TokenizerConfig) -> Make:
    """rows -> the players and a micro-batch of images, to be called where tensors have no content.

    The quantiser is left out: it has no weights to speak of, and keeps 1% of what the networks keep.
    """

    def make(rows: int) -> tuple[list[Any], Any]:
        import torch

        from rdpm_cli.tokenizer import perceptual
        from rdpm_cli.tokenizer.discriminator import PatchDiscriminator
        from rdpm_cli.tokenizer.model import Tokenizer
        from rdpm_cli.tokenizer.task import DiscriminatorTask, TokenizerTask

        tokenizer = Tokenizer(cfg, cfg.loss.weight).train()
        tokenizer.quantizer.forward = _pass_on  # type: ignore[assignment, method-assign]
        lpips = perceptual.hollow("vgg") if cfg.loss.perceptual != "none" else None
        size = cfg.autoencoder.resolution
        critic = PatchDiscriminator(cfg.discriminator) if cfg.loss.adversarial != "none" else None
        task = TokenizerTask(tokenizer, cfg, lpips, critic)
        players = [task, DiscriminatorTask(critic, task)] if critic else [task]
        return players, torch.zeros(rows, 3, size, size, dtype=torch.uint8)

    return make


def _pass_on(z_BCHW: Any, eps_BTCHW: Any) -> Any:
    """A chain whose z'_T is z."""
    from rdpm_cli.tokenizer.quantizer import Chain, Usage

    none = z_BCHW.new_zeros(())
    return Chain(none, z_BCHW, none, none.view(1), Usage(none, none, none, none.view(1, 1)), none)


def _parameters(make: Make) -> int:
    """Trainable parameters of the first player."""
    from rdpm_cli.engine.memory import shapes_alone

    with shapes_alone():
        return sum(p.numel() for p in make(1)[0][0].model.parameters())


def _tokenizer_parameters(cfg: config.TokenizerArchitecture) -> int:
    from rdpm_cli.engine.memory import shapes_alone
    from rdpm_cli.tokenizer import model

    with shapes_alone():
        return model.parameters(model.Tokenizer(cfg))

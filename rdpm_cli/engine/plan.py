"""`--dry-run` of the trainings: operations, memory and hours, without a GPU and without writing anything.

A training step runs on fake tensors, which have shapes but no content: torch counts its operations, a dispatch mode
counts the bytes of the tensors that live at once.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from rdpm_cli import files, noise, runs
from rdpm_cli.codes.store import Manifest, held_out, image_bytes
from rdpm_cli.data.open import is_there, open_source
from rdpm_cli.distributed import TrainStep, check_share
from rdpm_cli.engine.train import default_folder, recipe_settings
from rdpm_cli.engine.watch import GIB, GPUS, Gpu
from rdpm_cli.errors import UsageError
from rdpm_cli.generator import registry
from rdpm_cli.generator.batches import GeneratorTask
from rdpm_cli.generator.config import GeneratorConfig
from rdpm_cli.recipes import Recipe, load_recipe
from rdpm_cli.runs import Result
from rdpm_cli.tokenizer import losses, model
from rdpm_cli.tokenizer.config import TokenizerArchitecture, TokenizerConfig
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.tokenizer.networks import PatchDiscriminator
from rdpm_cli.tokenizer.quantizer import Chain, Quantizer, Usage
from rdpm_cli.tokenizer.training import DiscriminatorTask, TokenizerTask
from rdpm_cli.training.config import TrainConfig, binding
from rdpm_cli.training.loop import Player

IMAGENET_IMAGES, IMAGENET_CLASSES = 1_281_167, 1000
USABLE = 0.9  # of a GPU's memory: the rest is for CUDA itself, kernels' workspaces and gaps between tensors
ADAM = 2  # moments a parameter
TITLE = "dry run: nothing was run or written"
CPU = torch.device("cpu")

Make = Callable[[int], tuple[Sequence[Player], Any]]  # rows -> the players, and a micro-batch


@dataclass(frozen=True)
class Hardware:
    """The GPUs of a run. utilisation: the share of a GPU's bf16 peak that training is assumed to reach."""

    gpu: Gpu
    count: int
    utilisation: float

    @classmethod
    def of(cls, gpu: str | None = None, gpus: int | None = None, utilisation: float | None = None) -> "Hardware":
        """By the options --gpu, --gpus and --utilisation; None for the default. Raises UsageError."""
        share = 0.4 if utilisation is None else utilisation
        if not 0 < share <= 1:
            raise UsageError(f"--utilisation {share} is not a share", "give a number above 0, up to 1")
        by_name = {entry.name: entry for entry in GPUS}
        if (gpu or "h200").lower() not in by_name:
            raise UsageError(f"--gpu {gpu}: not in the table", f"give one of {', '.join(by_name)}")
        return cls(by_name[(gpu or "h200").lower()], gpus or 1, share)


# ---- players on fake tensors ---------------------------------------------------------------------------------------


def fake_tensors() -> FakeTensorMode:
    """Inside, tensors have shapes but no content: networks of any size cost nothing."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def generator_players(cfg: GeneratorConfig, codes: TokenizerArchitecture, classes: int) -> Make:
    """A fresh generator's player and micro-batches for it. codes: the tokenizer that made the codes."""

    def make(rows: int) -> tuple[Sequence[Player], Any]:
        channels, grid = codes.autoencoder.channels, codes.autoencoder.grid
        quantizer = Quantizer(codes.quantizer, codes.schedule, channels, grid).eval().requires_grad_(False)
        family = registry.FAMILIES[cfg.family]
        generator = family.make(cfg, quantizer, classes)
        registry.prepare(generator, cfg)
        return [GeneratorTask(generator)], family.batches.blank(cfg, quantizer, rows)

    return make


def tokenizer_players(cfg: TokenizerConfig) -> Make:
    """A fresh tokenizer's players and micro-batches of images for them."""

    def make(rows: int) -> tuple[Sequence[Player], Any]:
        tokenizer = Tokenizer(cfg, cfg.loss.weight).train()
        # The search for codes needs their values. It keeps 1% of the memory that the networks keep.
        tokenizer.quantizer.forward = _pass_on  # type: ignore[assignment, method-assign]
        lpips = losses.hollow_perceptual() if cfg.loss.perceptual != "none" else None
        critic = PatchDiscriminator(cfg.discriminator) if cfg.loss.adversarial != "none" else None
        task = TokenizerTask(tokenizer, cfg, lpips, critic)
        size = cfg.autoencoder.resolution
        players: list[Player] = [task, DiscriminatorTask(critic, task)] if critic else [task]
        return players, torch.zeros(rows, 3, size, size, dtype=torch.uint8)

    return make


def _pass_on(z_BCS: Tensor, eps_BTCS: Tensor) -> Chain:
    """A chain whose z'_T is z."""
    zero = z_BCS.new_zeros(())
    return Chain(zero, z_BCS, zero, zero.view(1), Usage(zero, zero, zero, zero.view(1, 1)), zero)


def _loss(player: Player, batch: Any, cfg: TrainConfig, place: TrainStep) -> Tensor:
    """The loss of a player under the recipe's precision."""
    with torch.autocast("cpu", torch.bfloat16, enabled=cfg.precision == "bf16"):
        return player.loss(batch, place)[0]


# ---- operations ----------------------------------------------------------------------------------------------------


def tokenizer_flops(cfg: TokenizerConfig) -> int:
    """Operations of a tokenizer's training step, an image, once its discriminator trains."""
    return sum(step_flops(tokenizer_players(cfg), cfg.train, cfg.discriminator.start).values())


def generator_flops(cfg: GeneratorConfig, codes: TokenizerArchitecture) -> int:
    """Operations of a generator's training step, an image. codes: the tokenizer that made the codes."""
    return sum(_generator_passes(cfg, codes).values())


def _generator_passes(cfg: GeneratorConfig, codes: TokenizerArchitecture) -> dict[str, int]:
    # Without recompute: activations that are computed twice are no progress.
    return step_flops(generator_players(cfg.model_copy(update={"recompute": False}), codes, 1), cfg.train)


def step_flops(make: Make, cfg: TrainConfig, step: int = 0) -> dict[str, int]:
    """Operations of one image, forward and backward. A multiply-add counts two.

    As torch counts matrix products, convolutions and attention. The search for codes is left out: it is below 1%.
    """
    forward = total = 0
    with fake_tensors(), FlopCounterMode(display=False) as counter:
        players, batch = make(1)
        for player in players:
            loss = _loss(player, batch, cfg, TrainStep(0, step, range(1), 1, CPU))
            forward += counter.get_total_flops() - total
            loss.backward()
            total = counter.get_total_flops()
    return {"forward": forward, "backward": total - forward}


# ---- memory --------------------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Bytes of the tensors that operations make, while they live. peak: the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.total = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:  # else a view
            self._known.add(key)
            self.total += size
            self.peak = max(self.peak, self.total)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.total -= size


def activations(make: Make, cfg: TrainConfig, rows: int, step: int = 0) -> int:
    """Peak bytes, besides weights and gradients, of a micro-batch of `rows` forward and backward through all players.

    Tensors that autograd keeps, temporary ones, and the bf16 copies of weights that autocast keeps; eager, without
    kernels' workspaces. Types are CUDA's under autocast, and attention keeps no N × N matrix.
    """
    with fake_tensors():
        players, batch = make(rows)
        for player in players:
            for module in player.model.modules():
                if isinstance(module, nn.GroupNorm):  # fp32 inside CUDA's autocast; the CPU's follows its input
                    module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
            for parameter in player.model.parameters():
                parameter.grad = torch.empty_like(parameter)
        with Live() as live:
            for player in players:
                _loss(player, batch, cfg, TrainStep(0, step, range(rows), rows, CPU)).backward()
        return live.peak


def fixed_memory(players: Sequence[Player], cfg: TrainConfig) -> dict[str, int]:
    """Bytes that no batch changes: weights and buffers, gradients, Adam's moments, the average of the first player."""

    def size(tensors: Sequence[Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    models = [player.model for player in players]
    learnt = size([p for m in models for p in m.parameters() if p.requires_grad])
    sizes = [size([*m.parameters(), *m.buffers()]) for m in models]
    return {"weights": sum(sizes), "gradients": learnt, "adam": ADAM * learnt, "ema": sizes[0] if cfg.ema else 0}


def memory(make: Make, cfg: TrainConfig, hardware: Hardware, frozen: int, step: int = 0) -> dict[str, Any]:
    """Parameters, GiB of a GPU by part for the recipe's micro-batch, and the largest micro-batch that fits.

    frozen: bytes of networks that do not learn. step: the step that is measured.
    """
    check_share(cfg.batch, hardware.count)
    rank_batch = cfg.batch // hardware.count
    micro = min(cfg.micro_batch or rank_batch, rank_batch)
    # Activations are affine in the number of images: two measurements give every other.
    low, high = (activations(make, cfg, rows, step) for rows in (noise.BLOCK, 2 * noise.BLOCK))
    each = (high - low) / noise.BLOCK
    start = low - each * noise.BLOCK
    with fake_tensors():
        players, _ = make(1)
        fixed = {**fixed_memory(players, cfg), "frozen": frozen}
    room = USABLE * hardware.gpu.memory_gib * GIB
    sizes = {**fixed, "activations": start + each * micro}
    return {
        "parameters": sum(p.numel() for p in players[0].model.parameters()),
        "micro_batch": micro,
        "memory_gib": {name: size / GIB for name, size in {**sizes, "total": sum(sizes.values())}.items()},
        "memory_gib_an_image": each / GIB,
        "gpu_memory_gib": hardware.gpu.memory_gib,
        "fits": sum(sizes.values()) <= room,
        "largest_micro_batch": largest_micro_batch(room - sum(fixed.values()) - start, each, rank_batch),
    }


def largest_micro_batch(room: float, each: float, most: int) -> int:
    """The largest micro-batch that fits into `room` bytes, a multiple of 16 or `most` images; 0 for none."""
    fits = min(math.floor(room / each), most)
    return most if fits == most else max(0, fits // noise.BLOCK * noise.BLOCK)


# ---- the plans -----------------------------------------------------------------------------------------------------


def timing(cfg: TrainConfig, images: int, flops: dict[str, int], hardware: Hardware) -> dict[str, Any]:
    """Length of the run: images, steps, operations, hours. flops: of a training step, an image, by part."""
    each, rate = sum(flops.values()), hardware.utilisation * hardware.gpu.bf16_flops * hardware.count
    trained = cfg.total_steps(images) * cfg.batch
    hours = trained * each / rate / 3600
    return {
        "images": images,
        "batch": cfg.batch,
        "steps": cfg.total_steps(images),
        "epochs": trained / images,
        "flops": {
            "image_forward": float(flops["forward"]),
            "image": float(each),
            "image_parts": {name: float(n) for name, n in flops.items()},
            "step": float(each * cfg.batch),
            "run": float(each * trained),
        },
        "gpu": hardware.gpu.name,
        "gpus": hardware.count,
        "gpu_bf16_flops": hardware.gpu.bf16_flops,
        "utilisation": hardware.utilisation,
        "images_per_second": rate / each,
        "hours": hours,
        "gpu_hours": hours * hardware.count,
    }


def plan_generator(codes: Path, out: Path | None, recipe: str, overrides: Sequence[str], hardware: Hardware) -> Result:
    """The cost of `train-gen CODES --out OUT`. A store that does not exist is assumed to be ImageNet's."""
    loaded = load_recipe(recipe, overrides, "generator")
    cfg = loaded.generator
    assert cfg is not None
    folder = _folder(out, loaded, "train-gen", "generator")
    architecture: TokenizerArchitecture = loaded.tokenizer or TokenizerArchitecture()
    images, classes = IMAGENET_IMAGES, IMAGENET_CLASSES
    assumed: str | None = f"no store {codes}: ImageNet's {images:,} images, {classes} classes"
    latents = architecture.autoencoder.channels if cfg.uses_latents else 0
    image_size = image_bytes(math.prod(architecture.autoencoder.grid), architecture.quantizer.steps, 1, latents)
    if codes.exists():
        manifest = Manifest.load(codes)
        architecture = model.load(codes / "tokenizer.pt")[0].cfg
        registry.check_codes(cfg.family, architecture, str(codes))
        images, classes, assumed = manifest.images, len(manifest.class_names), None
        image_size = manifest.image_bytes()
    trained = images - max(1, int(held_out(np.arange(images)).sum()))
    with fake_tensors():
        frozen = 4 * model.parameters(Tokenizer(architecture))
    values = {
        "recipe": loaded.name,
        "assumed": assumed,
        **timing(cfg.train, trained, _generator_passes(cfg, architecture), hardware),
        **memory(generator_players(cfg, architecture, classes), cfg.train, hardware, frozen),
        "store_gb": images * image_size / 1e9,
        **folder,
    }
    return Result(TITLE, values)


def plan_tokenizer(images: str, out: Path | None, recipe: str, overrides: Sequence[str], hardware: Hardware) -> Result:
    """The cost of `train-tokenizer IMAGES --out OUT`. Images that do not exist are assumed to be ImageNet's."""
    loaded = load_recipe(recipe, overrides, "tokenizer")
    cfg = loaded.tokenizer
    assert cfg is not None
    folder = _folder(out, loaded, "train-tokenizer", "tokenizer")
    count = len(open_source(images)) if is_there(images) else None
    make, step = tokenizer_players(cfg), cfg.discriminator.start
    with fake_tensors():
        lpips = losses.hollow_perceptual() if cfg.loss.perceptual != "none" else nn.Module()
    values = {
        "recipe": loaded.name,
        "assumed": None if count else f"no images {images}: ImageNet's {IMAGENET_IMAGES:,}",
        **timing(cfg.train, count or IMAGENET_IMAGES, step_flops(make, cfg.train, step), hardware),
        **memory(make, cfg.train, hardware, 4 * sum(p.numel() for p in lpips.parameters()), step),
        **folder,
    }
    return Result(TITLE, values)


def _folder(out: Path | None, recipe: Recipe, command: str, section: str) -> dict[str, Any]:
    """The state of a run's folder. Raises UsageError as the run would."""
    out = out or default_folder(recipe, section)
    finished = (out / f"{section}.pt").exists()
    # The data are not compared: they may be on another machine.
    previous = runs.read_run(out).get("settings", {})
    settings = {**previous, "command": command, "recipe": recipe_settings(recipe, section)}
    started = bool(runs.check_run(out, settings, partial(binding, finished=finished)))
    state = "finished: nothing would be done" if finished else "started: it would be resumed" if started else "new"
    return {"out": str(out), "out_is": state, "free_gb": files.free_bytes(out) / 1e9}

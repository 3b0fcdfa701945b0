"""`--dry-run` of the trainings: operations, memory and hours, without a GPU and without writing anything.

A training step runs on fake tensors, which have shapes but no content: torch counts its operations, a dispatch mode
counts the bytes of the tensors that live at once."""

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from rdpm_cli import files, noise, runs
from rdpm_cli.codes.heldout import open_heldout
from rdpm_cli.codes.store import held_out
from rdpm_cli.data.open import check_output, is_there
from rdpm_cli.distributed import TrainStep, rank_rows
from rdpm_cli.engine import watch
from rdpm_cli.engine.train import default_folder, is_new, recipe_settings
from rdpm_cli.engine.watch import GIB, GPUS, Gpu
from rdpm_cli.errors import AbsentWeightsError, UsageError
from rdpm_cli.generator import registry
from rdpm_cli.generator.config import GeneratorConfig
from rdpm_cli.generator.contract import GeneratorTask
from rdpm_cli.recipes import Recipe, load_recipe
from rdpm_cli.runs import Result
from rdpm_cli.tokenizer import losses, model
from rdpm_cli.tokenizer.config import MelConfig, TokenizerArchitecture, TokenizerConfig
from rdpm_cli.tokenizer.importers import warm_start
from rdpm_cli.tokenizer.inputs import inputs_of
from rdpm_cli.tokenizer.losses import open_perceptual
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.tokenizer.quantizer import Chain, Quantizer
from rdpm_cli.tokenizer.training import players_of
from rdpm_cli.training.config import TrainConfig, binding
from rdpm_cli.training.loop import Player

IMAGENET_IMAGES, IMAGENET_CLASSES = 1_281_167, 1000
USABLE = 0.9  # of a GPU's memory: the rest is for CUDA itself, kernels' workspaces and gaps between tensors
TITLE = "dry run: nothing was run or written"
CPU = torch.device("cpu")

T = TypeVar("T")
Make = Callable[[int], tuple[Sequence[Player], Any]]  # rows -> the players, and a micro-batch


@dataclass(frozen=True)
class Hardware:
    """The GPUs of a run. utilisation: the share of a GPU's bf16 peak that training is assumed to reach."""

    gpu: Gpu
    count: int
    utilisation: float

    @classmethod
    def of(cls, gpu: str | None = None, gpus: int | None = None, utilisation: float | None = None) -> "Hardware":
        """By the options --gpu, --gpus and --utilisation; None for the default."""
        return cls(next(entry for entry in GPUS if entry.name == (gpu or "h200")), gpus or 1, utilisation or 0.4)


def fake_tensors() -> FakeTensorMode:
    """Inside, tensors have shapes but no content: networks of any size cost nothing."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def generator_players(cfg: GeneratorConfig, codes: TokenizerArchitecture, classes: int) -> Make:
    """A fresh generator's player and micro-batches for it. codes: the tokenizer that made the codes."""

    def make(rows: int) -> tuple[Sequence[Player], Any]:
        channels, grid = codes.autoencoder.channels, codes.autoencoder.grid
        quantizer = Quantizer(codes.quantizer, codes.schedule, channels, grid).eval().requires_grad_(False)
        family = registry.FAMILIES[cfg.family]
        generator = family.make(cfg.network, quantizer, classes)
        registry.prepare(generator, cfg)
        return [GeneratorTask(generator)], family.batches.blank(cfg, quantizer, rows)

    return make


def tokenizer_players(cfg: TokenizerConfig) -> Make:
    """A fresh tokenizer's players and micro-batches of images for them."""

    def without_search(z_BCS: Tensor, eps_BTCS: Tensor, terms_B: Tensor | None = None) -> Chain:
        """z'_T = z. The search for codes needs their values; it keeps 1% of the memory that the networks keep."""
        zero = z_BCS.new_zeros(())
        return Chain(zero, z_BCS, zero, zero.view(1), zero, zero)

    def make(rows: int) -> tuple[Sequence[Player], Any]:
        tokenizer = Tokenizer(cfg, cfg.loss.weight).train()
        tokenizer.quantizer.forward = without_search  # type: ignore[method-assign]
        lpips = losses.Perceptual("vgg") if cfg.loss.perceptual != "none" else None
        return players_of(tokenizer, cfg, lpips), tokenizer.inputs.blank_batch(rows)

    return make


def _loss(player: Player, batch: Any, cfg: TrainConfig, rows: int, step: int) -> Tensor:
    """The loss of a player at a step, under the recipe's precision."""
    with torch.autocast("cpu", torch.bfloat16, enabled=cfg.precision == "bf16"):
        return player.loss(batch, TrainStep(0, step, range(rows), rows, CPU))[0]


def tokenizer_flops(cfg: TokenizerConfig) -> int:
    """Operations of a tokenizer's training step per image, once its discriminator trains."""
    return sum(step_flops(tokenizer_players(cfg), cfg.train, cfg.discriminator.start).values())


def generator_flops(cfg: GeneratorConfig, codes: TokenizerArchitecture) -> int:
    """Operations of a generator's training step per image. codes: the tokenizer that made the codes."""
    return sum(_generator_passes(cfg, codes).values())


def _generator_passes(cfg: GeneratorConfig, codes: TokenizerArchitecture) -> dict[str, int]:
    # Without recompute: activations that are computed twice are no progress.
    return step_flops(generator_players(cfg.model_copy(update={"recompute": False}), codes, 1), cfg.train)


def step_flops(make: Make, cfg: TrainConfig, step: int = 0) -> dict[str, int]:
    """Operations of one image, forward and backward. A multiply-add counts two.

    As torch counts matrix products, convolutions and attention. The search for codes is left out: it is below 1%."""
    forward = total = 0
    with fake_tensors(), FlopCounterMode(display=False) as counter:
        players, batch = make(1)
        for player in players:
            loss = _loss(player, batch, cfg, 1, step)
            forward += counter.get_total_flops() - total
            loss.backward()
            total = counter.get_total_flops()
    return {"forward": forward, "backward": total - forward}


class Live(TorchDispatchMode):
    """Bytes of the tensors that operations make, while they live. peak: the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.total = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            # a storage that is known already is a view's
            if isinstance(value, Tensor) and (key := value.untyped_storage()._cdata) not in self._known:
                storage = value.untyped_storage()
                self._known.add(key)
                self.total += storage.nbytes()
                self.peak = max(self.peak, self.total)
                weakref.finalize(storage, self._remove, key, storage.nbytes())
        return out

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.total -= size


def activations(make: Make, cfg: TrainConfig, rows: int, step: int = 0) -> int:
    """Peak bytes, without weights and gradients, of a micro-batch of `rows` forward and backward through all players.

    Tensors that autograd keeps, temporary ones, and the bf16 copies of weights that autocast keeps; eager, without
    kernels' workspaces. Types are CUDA's under autocast, and attention keeps no N × N matrix."""
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
                _loss(player, batch, cfg, rows, step).backward()
        return live.peak


def fixed_memory(players: Sequence[Player], cfg: TrainConfig) -> dict[str, int]:
    """Bytes that no batch changes: weights and buffers, gradients, Adam's moments, the average of the first player."""

    def size(tensors: Sequence[Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    models = [player.model for player in players]
    learnt = size([p for m in models for p in m.parameters() if p.requires_grad])
    sizes = [size([*m.parameters(), *m.buffers()]) for m in models]
    return {"weights": sum(sizes), "gradients": learnt, "adam": 2 * learnt, "ema": sizes[0] if cfg.ema else 0}


def memory(make: Make, cfg: TrainConfig, hardware: Hardware, frozen: int, step: int = 0) -> dict[str, Any]:
    """GiB by part for the recipe's micro-batch, and the largest that fits. frozen: bytes of what does not learn."""
    rank_batch = len(rank_rows(cfg.batch, (0, hardware.count)))
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
        "parameters": sum(p.numel() for p in players[0].model.parameters()), "micro_batch": micro,
        "memory_gib": {name: size / GIB for name, size in {**sizes, "total": sum(sizes.values())}.items()},
        "memory_gib_an_image": each / GIB, "gpu_memory_gib": hardware.gpu.memory_gib,
        "fits": sum(sizes.values()) <= room,
        "largest_micro_batch": largest_micro_batch(room - sum(fixed.values()) - start, each, rank_batch),
    }  # fmt: skip


def largest_micro_batch(room: float, each: float, most: int) -> int:
    """The largest micro-batch that fits into `room` bytes, a multiple of 16 or `most` images; 0 for none."""
    fits = min(math.floor(room / each), most)
    return most if fits == most else max(0, fits // noise.BLOCK * noise.BLOCK)


def timing(cfg: TrainConfig, images: int, flops: dict[str, int], hardware: Hardware) -> dict[str, Any]:
    """Length of the run: images, steps, operations, hours. flops: of a training step per image, by part."""
    each, rate = sum(flops.values()), hardware.utilisation * hardware.gpu.bf16_flops * hardware.count
    trained = cfg.total_steps(images) * cfg.batch
    hours = trained * each / rate / 3600
    parts = {name: float(n) for name, n in flops.items()}
    return {
        "images": images, "batch": cfg.batch, "steps": cfg.total_steps(images), "epochs": trained / images,
        "flops": {
            "image_forward": parts["forward"], "image": float(each), "image_parts": parts,
            "step": float(each * cfg.batch), "run": float(each * trained),
        },
        "gpu": hardware.gpu.name, "gpus": hardware.count, "gpu_bf16_flops": hardware.gpu.bf16_flops,
        "utilisation": hardware.utilisation, "images_per_second": rate / each, "hours": hours,
        "gpu_hours": hours * hardware.count,
    }  # fmt: skip


def plan_generator(
    codes: Path, out: Path | None, recipe: str, overrides: Sequence[str], hardware: Hardware, *,
    heldout: str | None = None, reading: dict[str, Any] | None = None,
) -> Result:  # fmt: skip
    """The cost of `train-gen CODES --out OUT`. A store that does not exist is assumed to be ImageNet's.

    What the run would refuse is refused here too, except for what another machine may have."""
    loaded = load_recipe(recipe, overrides, "generator")
    cfg = loaded.generator
    assert cfg is not None
    folder = _folder(out, loaded, "train-gen", "generator", {})
    weights: dict[str, Any] = {}
    if cfg.proxy.samples:
        extractor = _if_here(lambda: watch.proxy_extractor(cfg.proxy, CPU))
        weights["proxy"] = extractor if isinstance(extractor, str) else extractor.name
    architecture: TokenizerArchitecture = loaded.tokenizer or TokenizerArchitecture()
    if isinstance(architecture.autoencoder, MelConfig):
        raise UsageError("--dry-run plans images; what sound costs depends on its lengths", "leave it out")
    images, classes = IMAGENET_IMAGES, IMAGENET_CLASSES
    assumed: str | None = f"no store {codes}: ImageNet's {images:,} images, {classes} classes"
    auto, T = architecture.autoencoder, architecture.quantizer.steps
    # uint16 codes and fp16 latents of one view, a label and an index
    image_size = 2 * math.prod(auto.grid) * (T + auto.channels * cfg.uses_latents) + 12
    if codes.exists():
        opened = registry.open_codes(codes, cfg, loaded.seed)
        architecture, manifest = opened.tokenizer.cfg, opened.store.manifest
        images, classes, assumed = manifest.images, len(manifest.class_names), None
        if heldout and is_there(heldout):
            open_heldout(heldout, manifest, reading)
        image_size = manifest.image_bytes()
    trained = images - max(1, int(held_out(np.arange(images)).sum()))
    with fake_tensors():
        frozen = 4 * model.parameters(Tokenizer(architecture))
    times = timing(cfg.train, trained, _generator_passes(cfg, architecture), hardware)
    sizes = memory(generator_players(cfg, architecture, classes), cfg.train, hardware, frozen)
    sizes["store_gb"] = images * image_size / 1e9
    values = {"recipe": loaded.name, "assumed": assumed, **times, **sizes, **folder}
    return Result(TITLE, {**values, "weights": weights})


def _if_here(load: Callable[[], T]) -> T | str:
    """What load() returns; an error's message where published weights are absent, which another machine may have."""
    try:
        return load()
    except AbsentWeightsError as error:
        return error.message


def plan_tokenizer(
    images: str, out: Path | None, recipe: str, overrides: Sequence[str], hardware: Hardware, *,
    from_weights: Path | None = None, reading: dict[str, Any] | None = None,
) -> Result:  # fmt: skip
    """The cost of `train-tokenizer IMAGES --out OUT`. Images that do not exist are assumed to be ImageNet's.

    What the run would refuse is refused here too, except for what another machine may have."""
    loaded = load_recipe(recipe, overrides, "tokenizer")
    cfg = loaded.tokenizer
    assert cfg is not None
    final = (out or default_folder(loaded, "tokenizer")) / "tokenizer.pt"
    check_output(final.parent, images)
    count = len(inputs_of(cfg.autoencoder).open(images, **(reading or {}))) if is_there(images) else None
    weights: dict[str, Any] = {}
    binds: dict[str, Any] = {}  # settings of the run that come from files of weights
    perceptual = _if_here(lambda: open_perceptual(cfg))
    if isinstance(perceptual, str):
        weights["perceptual"] = perceptual
    else:
        binds["perceptual"] = perceptual and perceptual.record()
        weights["perceptual"] = perceptual and perceptual.name
    if from_weights:
        binds["from_weights"] = {"sha256": files.sha256_file(from_weights)}
        if is_new(final):
            weights["from_weights"] = warm_start(cfg, loaded.seed, from_weights)[1].summary()
    folder = _folder(out, loaded, "train-tokenizer", "tokenizer", binds)
    assumed = None if count else f"no images {images}: ImageNet's {IMAGENET_IMAGES:,}"
    make, step = tokenizer_players(cfg), cfg.discriminator.start
    frozen = 0
    if cfg.loss.perceptual != "none":
        with fake_tensors():
            frozen = 4 * sum(p.numel() for p in losses.Perceptual("vgg").parameters())
    times = timing(cfg.train, count or IMAGENET_IMAGES, step_flops(make, cfg.train, step), hardware)
    sizes = memory(make, cfg.train, hardware, frozen, step)
    values = {"recipe": loaded.name, "assumed": assumed, **times, **sizes, **folder}
    return Result(TITLE, {**values, "weights": weights})


def _folder(out: Path | None, recipe: Recipe, command: str, section: str, weights: dict[str, Any]) -> dict[str, Any]:
    """The state of a run's folder. weights: settings by files of weights. Raises UsageError as the run would."""
    out = out or default_folder(recipe, section)
    finished = (out / f"{section}.pt").exists()
    # The data are not compared: they may be on another machine.
    previous = dict(runs.read_run(out).get("settings", {}))
    previous.pop("from_weights", None)  # without the option the run has none
    settings = {**previous, "command": command, "recipe": recipe_settings(recipe, section), **weights}
    started = bool(runs.check_run(out, settings, partial(binding, finished=finished)))
    state = "finished: nothing would be done" if finished else "started: it would be resumed" if started else "new"
    return {"out": str(out), "out_is": state, "free_gb": files.free_bytes(out) / 1e9}

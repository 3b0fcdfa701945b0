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
from rdpm_cli.codes.ragged import RaggedStore
from rdpm_cli.codes.store import CodeStore, Manifest, held_out
from rdpm_cli.data.open import check_output, is_there
from rdpm_cli.distributed import TrainStep, rank_rows
from rdpm_cli.engine import watch
from rdpm_cli.engine.train import default_folder, is_new, recipe_settings, weights_setting
from rdpm_cli.engine.watch import GIB, GPUS, Gpu
from rdpm_cli.errors import AbsentWeightsError
from rdpm_cli.generator import importers as generator_importers
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
# LibriTTS (arXiv 1904.02882): training parts of 555 h. Seconds of the longest are those of the corpus' rule, 35.
LIBRITTS_RECORDINGS, LIBRITTS_SECONDS, LIBRITTS_LONGEST, BYTES_A_SECOND = 354_780, 5.63, 35, 15
USABLE = 0.9  # of a GPU's memory: the rest is for CUDA itself, kernels' workspaces and gaps between tensors
TITLE = "dry run: nothing was run or written"
CPU = torch.device("cpu")

T = TypeVar("T")
Spoken = tuple[int, int] | None  # latents and units of a row of sound; None of images
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


def generator_players(cfg: GeneratorConfig, codes: TokenizerArchitecture, classes: int, spoken: Spoken = None) -> Make:
    """A fresh generator's player and micro-batches for it. codes: the tokenizer that made the codes."""

    def make(rows: int) -> tuple[Sequence[Player], Any]:
        channels, grid = codes.autoencoder.channels, codes.autoencoder.grid
        quantizer = Quantizer(codes.quantizer, codes.schedule, channels, grid).eval().requires_grad_(False)
        family = registry.FAMILIES[cfg.family]
        generator = family.make(cfg.network, quantizer, classes)
        registry.prepare(generator, cfg)
        return [GeneratorTask(generator)], family.batches.blank(cfg, quantizer, rows, spoken)

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


def generator_flops(cfg: GeneratorConfig, codes: TokenizerArchitecture, spoken: Spoken = None) -> int:
    """Operations of a generator's training step per item. codes: the tokenizer that made the codes."""
    return sum(_generator_passes(cfg, codes, spoken).values())


def _generator_passes(cfg: GeneratorConfig, codes: TokenizerArchitecture, spoken: Spoken) -> dict[str, int]:
    # Without recompute: activations that are computed twice are no progress.
    return step_flops(generator_players(cfg.model_copy(update={"recompute": False}), codes, 1, spoken), cfg.train)


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
    """Bytes that no batch changes: weights and buffers, gradients, Adam's moments, the averages of the first player."""

    def size(tensors: Sequence[Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    models = [player.model for player in players]
    learnt = size([p for m in models for p in m.parameters() if p.requires_grad])
    sizes = [size([*m.parameters(), *m.buffers()]) for m in models]
    averages = 2 if cfg.ema == "power" else int(cfg.ema > 0)
    return {"weights": sum(sizes), "gradients": learnt, "adam": 2 * learnt, "ema": averages * sizes[0]}


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
    from_weights: Path | None = None, heldout: str | None = None, reading: dict[str, Any] | None = None,
) -> Result:  # fmt: skip
    """The cost of `train-gen CODES --out OUT`. A store that does not exist is assumed to be ImageNet's.

    What the run would refuse is refused here too, except for what another machine may have."""
    loaded = load_recipe(recipe, overrides, "generator")
    cfg = loaded.generator
    assert cfg is not None
    folder = _folder(out, loaded, "train-gen", "generator", weights_setting(from_weights))
    weights: dict[str, Any] = {}
    if cfg.proxy.samples:
        extractor = _if_here(lambda: watch.proxy_extractor(cfg.proxy, CPU))
        weights["proxy"] = extractor if isinstance(extractor, str) else extractor.name
    architecture: TokenizerArchitecture = loaded.tokenizer or TokenizerArchitecture()
    if codes.exists():
        data = _stored(opened := registry.open_codes(codes, cfg, loaded.seed))
        architecture = data.architecture
        if heldout and is_there(heldout):
            open_heldout(heldout, Manifest.load(codes), reading)
        if from_weights and is_new((out or default_folder(loaded, "generator")) / "generator.pt"):
            _, imported = generator_importers.warm_start(cfg, opened, loaded.seed, from_weights)
            weights["from_weights"] = imported.summary()
    elif isinstance(architecture.autoencoder, MelConfig):
        data = _libritts(codes, architecture)
    else:
        data = _imagenet(codes, architecture, cfg)
    trained = data.items - max(1, int(held_out(np.arange(data.items)).sum()))
    with fake_tensors():
        frozen = 4 * model.parameters(Tokenizer(architecture))
    times = timing(cfg.train, trained, _generator_passes(cfg, architecture, data.mean), hardware)
    sizes = memory(generator_players(cfg, architecture, data.classes, data.longest), cfg.train, hardware, frozen)
    sizes["store_gb"] = data.items * data.bytes_an_item / 1e9
    assumed = data.assumed
    values = {"recipe": loaded.name, "assumed": assumed, **times, **sizes, **folder}
    return Result(TITLE, {**values, "weights": weights})


@dataclass
class Data:
    """What a generator is trained on. mean, longest: rows of sound. assumed: why these numbers, without a store."""

    architecture: TokenizerArchitecture
    items: int
    classes: int
    bytes_an_item: float
    mean: Spoken = None
    longest: Spoken = None
    assumed: str | None = None


def mean_of(store: CodeStore) -> Spoken:
    """Mean latents and units of a store's rows of sound."""
    if not isinstance(store, RaggedStore):
        return None
    return round(float(store.lengths.mean())), round(
        sum(s.units for s in store.manifest.shards) / store.manifest.images
    )


def _stored(opened: registry.Codes) -> Data:
    m, mean = opened.store.manifest, mean_of(opened.store)
    data = Data(opened.tokenizer.cfg, m.images, len(m.condition_names), m.image_bytes(), mean)
    if mean and isinstance(opened.store, RaggedStore):
        longest = int(opened.store.lengths.max())
        data.longest = longest, round(mean[1] * longest / mean[0])
    return data


def _imagenet(codes: Path, architecture: TokenizerArchitecture, cfg: GeneratorConfig) -> Data:
    auto, T = architecture.autoencoder, architecture.quantizer.steps
    # uint16 codes and fp16 latents of one view, a label and an index
    size = 2 * math.prod(auto.grid) * (T + auto.channels * cfg.uses_latents) + 12
    assumed = f"no store {codes}: ImageNet's {IMAGENET_IMAGES:,} images, {IMAGENET_CLASSES} classes"
    return Data(architecture, IMAGENET_IMAGES, IMAGENET_CLASSES, size, assumed=assumed)


def _libritts(codes: Path, architecture: TokenizerArchitecture) -> Data:
    auto, T = architecture.autoencoder, architecture.quantizer.steps
    rate = inputs_of(auto).rate
    assert rate is not None
    mean, longest = ((round(s * rate), round(s * BYTES_A_SECOND)) for s in (LIBRITTS_SECONDS, LIBRITTS_LONGEST))
    assumed = f"no store {codes}: the {LIBRITTS_RECORDINGS:,} recordings of LibriTTS, {LIBRITTS_SECONDS} s each, bytes"
    size = 2 * mean[0] * (T + auto.channels) + 4 * mean[1]
    return Data(architecture, LIBRITTS_RECORDINGS, 256, size, mean, longest, assumed)


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
    if from_weights and is_new(final):
        weights["from_weights"] = warm_start(cfg, loaded.seed, from_weights)[1].summary()
    folder = _folder(out, loaded, "train-tokenizer", "tokenizer", binds | weights_setting(from_weights))
    name, most = "ImageNet", IMAGENET_IMAGES
    if isinstance(cfg.autoencoder, MelConfig):
        name, most = "LibriTTS", LIBRITTS_RECORDINGS
    assumed = None if count else f"no items {images}: the {most:,} of {name}"
    make, step = tokenizer_players(cfg), cfg.discriminator.start
    frozen = 0
    if cfg.loss.perceptual != "none":
        with fake_tensors():
            frozen = 4 * sum(p.numel() for p in losses.Perceptual("vgg").parameters())
    times = timing(cfg.train, count or most, step_flops(make, cfg.train, step), hardware)
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

"""Observers of a training run: progress, machine numbers, alarms, previews, held-out measurements, curves, scores."""

import contextlib
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rdpm_cli.codes.heldout import EncodedImages, EncodedRecordings
from rdpm_cli.codes.ragged import RaggedStore
from rdpm_cli.codes.store import CodeStore, store_reference
from rdpm_cli.data import audio, mel, pictures
from rdpm_cli.data.audio import AudioSource
from rdpm_cli.data.folder import ImageSet
from rdpm_cli.data.pictures import Curve
from rdpm_cli.data.source import ItemSource, Source, spread
from rdpm_cli.distributed import is_first, one_thread, world
from rdpm_cli.errors import UsageError
from rdpm_cli.evaluation import backbones, features, judge, metrics, score
from rdpm_cli.evaluation.features import Extractor
from rdpm_cli.evaluation.metrics import Statistics
from rdpm_cli.evaluation.reference import open_recorded
from rdpm_cli.generator import sampler
from rdpm_cli.generator.config import GeneratorConfig, ProxyConfig
from rdpm_cli.generator.contract import Generator, GeneratorBatches, SampleOptions, held_out
from rdpm_cli.generator.speech_sampler import known_codes
from rdpm_cli.progress import Bar, warn
from rdpm_cli.tokenizer.config import AutoencoderConfig, TokenizerConfig
from rdpm_cli.tokenizer.inputs import Item, MelInputs
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.training.config import TrainConfig
from rdpm_cli.training.log import read_metrics
from rdpm_cli.training.loop import Observer, Run

DECODED_AT_ONCE = 8  # images, so that a preview needs no more memory than sampling
PREVIEW = "previews/step-{:07d}.png"
BASELINES = {
    "baseline": "model-free baseline", "class_mean": "class mean of z", "linear": "linear in z'_{t-1}",
    "unigram": "frequencies of codes",
}  # fmt: skip
HELD_OUT = {  # a family's measurement -> title and horizontal axis of its panel
    "heldout/accuracy": "held-out accuracy per t|t", "heldout/nll": "held-out nats/dim|masked depths",
    "heldout/bound": "held-out nats/token, a bound|tenth that is masked", "heldout/nats": "held-out nats/token|depth",
    "heldout/mse": "held-out squared error|tenth of t",
}  # fmt: skip
PREVIEWS = 8  # images, or samples a class
SOUNDS = 4  # held-out rows in a preview
ALARM_LINES = 5  # logged steps of low codebook usage before a warning
MIN_VARIATION = 0.02  # of an informative latent; healthy small runs had 0.15 to 0.63
PROXY_REFERENCES = 10_000  # images of the store's data at most, evenly spaced
GIB = 2**30


def due(run: Run, cfg: TrainConfig) -> bool:
    """Whether to evaluate now: every eval_every steps and at the end, in the first process only."""
    regular = bool(cfg.eval_every) and run.step % cfg.eval_every == 0
    return (regular or run.done) and is_first()


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, with its vendor's figures."""

    name: str  # of --gpu
    device: str  # pattern of the whole torch.cuda.get_device_name: a MIG slice or a laptop's GPU is another kind
    bf16_flops: float  # peak a second of dense bf16 products with fp32 sums, without sparsity
    memory_gib: float  # the datasheet's "GB", which drivers count in GiB


GPUS = (
    Gpu("h200", "NVIDIA H200", 989.4e12, 141),
    Gpu("h100", "NVIDIA H100 80GB HBM3", 989.4e12, 80),
    Gpu("a100", "NVIDIA A100(-SXM4-80GB| 80GB PCIe)", 312e12, 80),
    Gpu("l40s", "NVIDIA L40S", 362e12, 48),
    Gpu("rtx4090", "NVIDIA GeForce RTX 4090", 165.2e12, 24),
)


def known_gpu(device: torch.device) -> Gpu | None:
    """The device's entry in the table of GPUs, if it has one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((gpu for gpu in GPUS if re.fullmatch(gpu.device, name)), None)


def machine(flops: int) -> Observer:
    """Add flops_per_second of all processes, utilisation of a known GPU, memory_gib. flops: of a step per image."""

    def observe(run: Run, logs: dict[str, float] | None) -> None:
        if logs is None:
            return
        logs["flops_per_second"] = rate = flops * logs["images_per_second"]
        if gpu := known_gpu(run.device):
            logs["utilisation"] = rate / (world()[1] * gpu.bf16_flops)
        # On a GPU the most that tensors took, else the largest resident size of this process.
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        peak = torch.cuda.max_memory_allocated(run.device) if run.device.type == "cuda" else resident
        logs["memory_gib"] = peak / GIB

    return observe


def progress_bar(bar: Bar) -> Observer:
    """Advance a bar of steps, with loss, rate and utilisation behind it."""

    def observe(run: Run, logs: dict[str, float] | None) -> None:
        if bar.done == 0 and run.step > 1:
            bar.resume_at(run.step - 1)
        text = f"loss {logs['loss']:.4f}, {logs['images_per_second']:.0f} items/s" if logs else ""
        if logs and "utilisation" in logs:
            text += f", {logs['utilisation']:.0%} of peak"
        bar.advance(1, text)

    return observe


def codebook_alarm(cfg: TokenizerConfig) -> Observer:
    """Warn, with a remedy, of a codebook usage or a variation of z that was low for ALARM_LINES logged steps."""
    q = cfg.quantizer
    vectors = cfg.train.batch * cfg.autoencoder.positions * (q.steps if q.codebooks == "shared" else 1)
    even_usage = 1 - (1 - 1 / q.codes) ** vectors  # of a batch this small if it drew from the codes evenly
    low = {"usage": 0, "variation": 0}  # consecutive logged steps

    def observe(run: Run, logs: dict[str, float] | None) -> None:
        if not (logs and cfg.codebook_alarm and is_first()):
            return
        usage, variation = logs["usage/book"] / even_usage, logs["latent_spread"]
        low["usage"] = low["usage"] + 1 if usage < cfg.codebook_alarm else 0
        low["variation"] = low["variation"] + 1 if variation < MIN_VARIATION else 0
        since = f"and was low for {ALARM_LINES} logged steps"
        if low["usage"] == ALARM_LINES:
            warn(
                f"at step {run.step} codebook usage is {usage:.0%} of an even draw's, {since}. Restart dead codes "
                "(quantizer.codebook=ema quantizer.restart_below=0.03), start on data (quantizer.init=kmeans), or "
                f"lower quantizer.codes={q.codes}"
            )
        if low["variation"] == ALARM_LINES:
            warn(
                f"at step {run.step} only {variation:.0%} of the latent varies over items and positions, {since}: "
                "the encoder carries hardly any information. Lower train.lr, clip gradients (train.clip=1) or start "
                "--from-weights"
            )

    return observe


def tokenizer_preview(tokenizer: Tokenizer, source: ItemSource, cfg: TrainConfig) -> Observer:
    """RUN/previews/: inputs, reconstructions and the T partial decodes, under held-out noise."""
    inputs, count = tokenizer.inputs, min(PREVIEWS, len(source))
    indices = np.linspace(0, len(source) - 1, count).astype(int).tolist()
    batch = inputs.windows(source, indices, np.full(count, 0.5, np.float32), flip=False)
    x = inputs.to_model(batch)
    length = None if isinstance(tokenizer.cfg.autoencoder, AutoencoderConfig) else tokenizer.latent_shape_of(x)[1]
    eps = tokenizer.noise("heldout", 0, indices, [0] * count, length)

    @torch.no_grad()
    def observe(run: Run, logs: dict[str, float] | None) -> None:
        if not due(run, cfg):
            return
        model: Any = run.ema.model if run.ema else tokenizer
        was_training = model.training
        model.eval()
        codes = model.encode(x.to(run.device), eps.to(run.device))
        rows = [inputs.items(x), *decode_prefixes(model, codes)]
        model.train(was_training)
        labels = ["input", *(f"t = {t}" for t in range(1, len(rows) - 1)), f"output, t = {len(rows) - 1}"]
        sheet = pictures.grid(inputs.pixels(np.concatenate(rows)), count, labels, f"step {run.step}")
        pictures.save_png(run.folder / PREVIEW.format(run.step), sheet)

    return observe


@torch.no_grad()
def decode_prefixes(tokenizer: Tokenizer, codes_BTS: Tensor) -> list[Item]:
    """D(z'_1)..D(z'_T), stacked items each: of images uint8 (B, H, W, 3)."""
    frames = []
    for t in range(1, tokenizer.quantizer.steps + 1):
        images = []
        with one_thread():  # as the sampler decodes, so that the last frame is the sample
            for codes in codes_BTS.split(DECODED_AT_ONCE):
                z = tokenizer.quantizer.prefix(codes, torch.full((len(codes),), t, device=codes.device))
                images.append(tokenizer.inputs.items(tokenizer.decode_latents(z)))
        frames.append(np.concatenate(images))
    return frames


@contextlib.contextmanager
def averaged(generator: Generator, run: Run) -> Iterator[None]:
    """Inside, the generator has the weights that the run will keep, the EMA's if it has one, in evaluation mode."""
    trained = generator.network
    generator.network = (run.ema.model if run.ema else trained).eval()
    try:
        yield
    finally:
        generator.network = trained
        trained.train()


def generator_monitor(
    generator: Generator, tokenizer: Tokenizer, cfg: GeneratorConfig, batches: GeneratorBatches,
    named: Source | AudioSource | None = None,
) -> Observer:  # fmt: skip
    """Held-out measurements with the baselines, norms of z'_t, and a grid of samples from fixed seeds, or sounds.

    named: held-out images or recordings, measured in addition to the store's own held-out rows."""
    manifest = batches.store.manifest
    class_names = manifest.class_names
    classes, T = list(range(min(10, len(class_names)))), tokenizer.quantizer.steps
    labels = [c for c in classes for _ in range(PREVIEWS)]

    @cache
    def fixed(device: torch.device) -> tuple[Any, dict[str, GeneratorBatches]]:
        """The baselines, and what is measured, by its name in the log."""
        measured = {"heldout": batches}
        if isinstance(named, AudioSource):
            measured["heldout_recordings"] = batches.of_items(EncodedRecordings(named, tokenizer, manifest))
        elif named is not None:
            measured["heldout_images"] = batches.of_items(EncodedImages(named, tokenizer, manifest, device))
        return generator.fit_baselines(batches.store, batches.rows), measured

    def observe(run: Run, logs: dict[str, float] | None) -> dict[str, Any] | None:
        if not due(run, cfg.train):
            return None
        micro_batch = cfg.sampling.images_at_once(run.device.type)
        values: dict[str, Any] = {}
        baselines, parts = fixed(run.device)
        with averaged(generator, run):
            for group, part in parts.items():
                measured = held_out(generator, part, run.device, baselines)
                values |= {f"{group}/{name}": value for name, value in measured.items()}
            if isinstance(batches.store, RaggedStore):
                _sound_preview(run, generator, tokenizer, batches, SampleOptions(cfg.sampling))
                return values
            samples = list(sampler.sample(generator, tokenizer, labels, SampleOptions(cfg.sampling), micro_batch))
        images = np.concatenate([s.pixels_BHWC for s in samples])
        sheet = pictures.grid(images, PREVIEWS, [class_names[c] for c in classes])
        pictures.save_png(run.folder / PREVIEW.format(run.step), sheet)
        # The mean norm of z'_t over positions: it shrinks under a large tau and grows under strong guidance.
        codes_BTS = torch.cat([s.codes_BTS for s in samples]).to(run.device)
        counts = [torch.full((len(codes_BTS),), t, device=run.device) for t in range(1, T + 1)]
        norms = [float(tokenizer.quantizer.prefix(codes_BTS, n).norm(dim=1).mean()) for n in counts]
        return {**values, "sampled/norm": norms}

    return observe


@torch.no_grad()
def _sound_preview(
    run: Run, generator: Generator, tokenizer: Tokenizer, batches: GeneratorBatches, options: SampleOptions
) -> None:
    """RUN/previews/: samples with the texts and prompts of some held-out rows, and their spectrograms below the rows'.

    Of a row what its codes decode to."""
    store, inputs = batches.store, tokenizer.inputs
    assert isinstance(store, RaggedStore)
    assert isinstance(inputs, MelInputs)
    rows = next(batches.held_out_rows())
    rows = rows[spread(len(rows), SOUNDS)]
    codes_BTS, columns = batches.read(rows)
    codes_BTS, columns = codes_BTS.to(run.device), {name: column.to(run.device) for name, column in columns.items()}
    is_known_BS = torch.from_numpy(store.exists(rows) & ~batches.open_positions(rows, None)).to(run.device)
    known = known_codes(tokenizer, columns["latents"], is_known_BS, options.seed, range(len(rows)))
    samples_BTS = generator.sample(columns, torch.arange(len(rows)), options, known)
    sheet = np.repeat(inputs.blank()[:1], codes_BTS.shape[2] * inputs.stride, 0)[None].repeat(2 * len(rows), 0)
    for row, length in enumerate(store.lengths[rows].tolist()):
        for half, codes in enumerate((codes_BTS, samples_BTS)):
            with one_thread():
                item = inputs.items(tokenizer.decode(codes[row : row + 1, :, :length]))[0]
            sheet[half * len(rows) + row, : len(item)] = item
        path = (run.folder / PREVIEW.format(run.step)).with_suffix(f".{row}.wav")
        audio.write_wav(path, mel.griffin_lim(item, inputs.features), inputs.features.rate)
    picture = pictures.grid(inputs.pixels(sheet), len(rows), ["held out", "sample"], f"step {run.step}")
    pictures.save_png(run.folder / PREVIEW.format(run.step), picture)


def proxy_score(generator: Generator, tokenizer: Tokenizer, cfg: GeneratorConfig, store: CodeStore) -> Observer:
    """`proxy/frechet_distance` of a few samples of the averaged weights, and `proxy/class_accuracy` with a judge."""
    names = list(store.manifest.class_names)
    labels = [index * len(names) // cfg.proxy.samples for index in range(cfg.proxy.samples)]  # balanced

    @cache
    def target(device: torch.device) -> tuple[Extractor, Statistics]:
        extractor, images = open_proxy(cfg.proxy, store, device)
        return extractor, metrics.statistics(features.collect(extractor, images).features_ND)

    def observe(run: Run, logs: dict[str, float] | None) -> dict[str, Any] | None:
        if not due(run, cfg.train):
            return None
        extractor, statistics_of_target = target(run.device)
        micro_batch = cfg.sampling.images_at_once(run.device.type)
        with averaged(generator, run):
            samples = sampler.sample(generator, tokenizer, labels, SampleOptions(cfg.sampling), micro_batch)
            sampled = features.collect(extractor, (s.pixels_BHWC for s in samples))
        accuracy, reason = score.class_accuracy(extractor, labels, names, sampled)
        if reason:
            warn(f"no proxy/class_accuracy: {reason}", once=True)
        distance = metrics.frechet_distance(metrics.statistics(sampled.features_ND), statistics_of_target)
        return {"proxy/frechet_distance": distance} | ({} if accuracy is None else {"proxy/class_accuracy": accuracy})

    return observe


def proxy_extractor(cfg: ProxyConfig, device: torch.device) -> Extractor:
    """The extractor of the proxy score. Raises UsageError, CheckpointError and AbsentWeightsError."""
    if cfg.samples == 1:
        raise UsageError("proxy.samples=1: a covariance needs at least 2 samples", "give more, or 0 for no score")
    return backbones.open_extractor(cfg.extractor, Path(cfg.weights) if cfg.weights else None, device)


def open_proxy(cfg: ProxyConfig, store: CodeStore, device: torch.device) -> tuple[Extractor, ImageSet]:
    """Extractor and reference of the proxy score. Raises DataError, and as `proxy_extractor`."""
    if store.manifest.speech:
        raise UsageError(f"proxy.samples={cfg.samples}: the score is of images", "give proxy.samples=0")
    extractor = proxy_extractor(cfg, device)
    judge.check_size(extractor.resolution, store.manifest.resolution)
    record = store_reference(store.root, store.manifest)
    hint = "go on without the score with proxy.samples=0"
    return extractor, open_recorded(record, str(store.root), hint, PROXY_REFERENCES)


def training_curves(path: Path, tokenizer_run: Path | None = None, generator_run: Path | None = None) -> None:
    """Draw the curves of one run or both; no file if nothing was logged, for example when every step was skipped.

    Of a tokenizer: losses, the critic's logits, usage and dead codes over time, perplexity per t. Of a generator:
    loss, held-out accuracy per t or nats per dimension with the baselines, proxy score."""
    panels: dict[str, dict[str, Curve]] = {}
    rows = read_metrics(tokenizer_run) if tokenizer_run else []
    if rows:
        per_t = sorted(k.removeprefix("usage/") for k in rows[-1] if k.startswith("usage/t"))
        shown = [per_t[0], per_t[len(per_t) // 2], per_t[-1]] if len(per_t) > 3 else per_t
        panels = {
            "tokenizer losses|step": _over_time(rows, "recon", "quant", "lpips"),
            "adversary|step": _over_time(
                rows, "gan", *(f"discriminator/{x}" for x in ("loss", "logits_real", "logits_fake"))
            ),
            "codebook usage|step": _over_time(rows, "usage/book", *(f"usage/{t}" for t in shown), "latent_spread"),
            "dead codes|step": _over_time(rows, *(f"dead/{t}" for t in shown)),
            "codebook perplexity|step": _over_time(rows, *(f"perplexity/{t}" for t in shown)),
            "codebook perplexity at the end|t": {"perplexity": _per_t([rows[-1][f"perplexity/{t}"] for t in per_t])},
        }
    rows = read_metrics(generator_run) if generator_run else []
    panels["generator loss|step"] = _over_time(rows, "ce", "nll", "mse")
    for name, title in HELD_OUT.items():
        for row in rows:
            if name in row:  # the last measurement counts
                lines = {line: row[f"heldout/{key}"] for key, line in BASELINES.items() if f"heldout/{key}" in row}
                panels[title] = {"model": _per_t(row[name]), **{line: _per_t(v) for line, v in lines.items()}}
    panels["proxy score|step"] = _over_time(rows, "proxy/frechet_distance")
    if panels := {title: lines for title, lines in panels.items() if lines}:
        pictures.save_curves(path, panels, log_panels=[title for title in panels if "loss" in title])


def _over_time(rows: list[dict[str, Any]], *names: str) -> dict[str, Curve]:
    """Those of the named values that a log has, over its steps."""
    points = {name: [(float(row["step"]), row[name]) for row in rows if name in row] for name in names}
    return {name: ([x for x, _ in line], [y for _, y in line]) for name, line in points.items() if line}


def _per_t(values: list[float | None]) -> Curve:
    """Values at 1, 2, ..., without the absent ones."""
    known = [(float(t), value) for t, value in enumerate(values, 1) if value is not None]
    return [t for t, _ in known], [value for _, value in known]

"""sample: a checkpoint -> a folder of images; and the images that `eval --ckpt` scores without a folder between.

Legend: B samples, T steps, S positions of the flattened grid, H W height and width.
"""

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rdpm_cli import progress
from rdpm_cli.data import folder, pictures
from rdpm_cli.data.folder import ImageSet, SampleFiles
from rdpm_cli.data.labels import parse_classes
from rdpm_cli.data.open import open_item
from rdpm_cli.data.pixels import Pixels, cells, chw, crop, to_model
from rdpm_cli.device import one_thread, pick_device
from rdpm_cli.engine.watch import decode_prefixes
from rdpm_cli.errors import UsageError
from rdpm_cli.evaluation.judge import ClassJudge, open_judge
from rdpm_cli.generator import registry, sampler
from rdpm_cli.generator.config import SamplingConfig
from rdpm_cli.generator.contract import Known, SampleOptions
from rdpm_cli.generator.registry import LoadedGenerator
from rdpm_cli.generator.sampler import Job, Samples
from rdpm_cli.runs import Result, StopRequest, stop_on_signal
from rdpm_cli.schema import parse_yaml, validate
from rdpm_cli.tokenizer.model import Tokenizer

CLASSES_SHOWN, SAMPLES_SHOWN = 16, 8  # classes in the previews, samples of each
GRID, STEPS_GIF, STEPS_SHEET = "previews/grid.png", "previews/steps.gif", "previews/steps.png"
WAIT_SECONDS = 0.2  # between two looks at the files of other processes


# ---- the command ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outputs:
    """The files to write next to samples.json."""

    png: bool = True
    npz: bool = False
    grid: bool = True
    gif: bool = False


@dataclass(frozen=True)
class Edit:
    """An image to begin with, and the codes of it that are drawn again.

    These are the positions where the mask is white (default: all), from step `from_step` on (default: the first).
    """

    init: str
    mask: str | None = None
    from_step: int | None = None

    @property
    def first(self) -> int:
        """The first step whose codes are drawn."""
        return 1 if self.from_step is None else self.from_step


@dataclass(frozen=True)
class Reject:
    """Best of n: of `tries` candidates a sample, the one that the judge likes best is kept."""

    tries: int
    judge: str


def sample(
    ckpt: Path,
    classes: str = "all",
    per_class: int = 8,
    out: Path = Path("samples"),
    *,
    seed: int = 0,
    sampling: Mapping[str, Any] | None = None,
    preset: str | None = None,
    outputs: Outputs | None = None,
    edit: Edit | None = None,
    reject: Reject | None = None,
    shard: str | None = None,
    device: str = "auto",
) -> Result:
    """Draw samples into the folder `out`; the same command again continues an interrupted job.

    sampling: options of the family, over the preset's and the checkpoint's own. shard: I/N, as --shard.
    """
    outputs, share = outputs or Outputs(), share_of(shard)
    if not (outputs.png or outputs.npz):
        raise UsageError("--no-png without --npz keeps no sample", "add --npz")
    loaded, options, labels = load(ckpt, classes, per_class, seed, sampling or {}, preset)
    picked = pick_device(device)
    original = read_original(edit, loaded.tokenizer) if edit else None
    judge = open_judge(reject.judge, loaded.class_names, picked) if reject else None
    record = _record(loaded, options, labels, original, reject, judge)
    record["checkpoint"] = str(ckpt.resolve())
    with folder.one_at_a_time(out):
        folder.claim(out, record)

    micro_batch = options.sampling.images_at_once(picked.type)
    files = SampleFiles(out, len(labels), micro_batch, png=outputs.png, npz=outputs.npz)
    loaded.to(picked, options.sampling.compile)
    known = original.known_codes(loaded.tokenizer, seed, picked) if original else None
    job = sampler.Job(loaded.generator, loaded.tokenizer, options, micro_batch, known)
    with folder.writing(out, share.index, share.count), stop_on_signal(interrupt=share.ranks > 1) as stop:
        drawing = Drawing(job, labels, loaded.class_names, files, stop, judge, reject.tries if reject else 1)
        drawing.draw_batches(files.batches[share.index :: share.count])
        if share.rank == 0:  # the first process of a command ends last
            drawing.wait_for(share.of_command(files.batches))
            with folder.one_at_a_time(out):
                drawing.finish(record, outputs)
    passes = loaded.generator.passes(options, edit.first if edit else 1) * drawing.tries
    return _result(out, record, options.sampling, outputs, passes)


def load(
    ckpt: Path, classes: str, per_class: int, seed: int, sampling: Mapping[str, Any], preset: str | None
) -> tuple[LoadedGenerator, SampleOptions, list[int]]:
    """The generator of a checkpoint, the options checked against it, and the label of every sample."""
    loaded = registry.load(ckpt)
    options = SampleOptions(sampling_options(loaded.sampling, preset, sampling), seed)
    loaded.generator.check(options)
    return loaded, options, sampler.balanced_labels(parse_classes(classes, loaded.class_names), per_class, seed)


def _record(
    loaded: LoadedGenerator,
    options: SampleOptions,
    labels: list[int],
    original: "Original | None",
    reject: Reject | None,
    judge: ClassJudge | None,
) -> dict[str, Any]:
    """The content of samples.json, as far as it is known before the first sample is drawn."""
    recorded = {**options.sampling.model_dump(), "seed": options.seed}
    if original:
        recorded["edit"] = {"from_step": original.edit.first, "masked": original.edit.mask is not None}
    if reject and judge:
        names = {"judge": judge.name, "judge_sha256": judge.sha256}
        recorded["reject"] = {"keep": 1 / reject.tries, "candidates": reject.tries, **names}
    return folder.picture_record(
        "rdpm-samples",
        {"checkpoint": loaded.digest, **(original.digests if original else {})},
        recorded,
        resolution=loaded.tokenizer.cfg.autoencoder.resolution,
        class_names=loaded.class_names,
        reference=loaded.provenance.get("reference"),
        rows=folder.sample_rows(labels, png=True),
    )


def _result(out: Path, record: dict[str, Any], sampling: SamplingConfig, outputs: Outputs, passes: int) -> Result:
    """The requested files that are there, and the options that differ from the family's defaults."""
    finished = (out / folder.RECORD).is_file()
    defaults, options = type(sampling)().model_dump(), record["options"]
    changed = {name: options[name] for name in defaults if name == "cfg" or options[name] != defaults[name]}
    paths = {"grid": GRID} if outputs.grid else {}
    paths |= {"gif": STEPS_GIF, "sheet": STEPS_SHEET} if outputs.gif else {}
    paths |= {"npz": folder.NPZ} if outputs.npz else {}
    labels = [row["label"] for row in record["samples"]]
    values = {
        "folder": str(out),
        "samples": len(labels),
        "classes": len(set(labels)),
        "checkpoint": record["made_from"]["checkpoint"],
        **changed,
        "passes": passes,
        **{name: options[name] for name in ("seed", "edit", "reject") if name in options},
        **{name: str(out / path) for name, path in paths.items() if finished},
    }
    title = "samples written" if finished else "shard written; other shards are still missing"
    return Result(title, values, f"rdpm eval fid {out}" if finished else "")


# ---- a job's micro-batches -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """The micro-batches that a process draws: number `index` of every `count`; rank: among its command's processes."""

    index: int = 0
    count: int = 1
    rank: int = 0
    ranks: int = 1

    def of_command(self, batches: Sequence[range]) -> list[range]:
        """The micro-batches of all processes of the command, if this is its rank 0."""
        return [batch for rank in range(self.ranks) for batch in batches[self.index + rank :: self.count]]


def share_of(shard: str | None) -> Share:
    """This process's share, by --shard I/N (1/4 to 4/4) and by torchrun's or --gpus' environment. Raises UsageError."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    first, _, count = ("1/1" if shard is None else shard).partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise UsageError(f"--shard {shard} is not I/N", "write 1/4, 2/4, 3/4 and 4/4 for four shards")
    return Share((int(first) - 1) * ranks + rank, int(count) * ranks, rank, ranks)


class Drawing:
    """One process's work at a job: the samples that are missing, and in the end the previews and the record."""

    def __init__(
        self,
        job: Job,
        labels: list[int],
        class_names: list[str],
        files: SampleFiles,
        stop: StopRequest,
        judge: ClassJudge | None = None,
        tries: int = 1,
    ) -> None:
        """tries: candidates a sample, of which the judge chooses."""
        self.job, self.labels, self.files, self.stop, self.judge, self.tries = job, labels, files, stop, judge, tries
        self.shown = previewed(labels)
        self.shown_codes: dict[int, Tensor] = {}  # (T, S) by index, of the samples that this process has drawn
        self.names = [class_names[label] for label in sorted({labels[index] for index in self.shown})]
        self.columns = -(-len(self.shown) // len(self.names))

    def draw(self, indices: Sequence[int]) -> Samples:
        """Samples by index."""
        labels = [self.labels[index] for index in indices]
        if self.judge is None:
            samples = self.job.draw(indices, labels)
        else:
            samples = self.job.best(indices, labels, self.tries, self.judge)
        for index, codes_TS in zip(indices, samples.codes_BTS, strict=True):
            if index in self.shown:
                self.shown_codes[index] = codes_TS
        return samples

    def draw_batches(self, batches: Sequence[range]) -> None:
        """Draw these micro-batches, as far as they have no files yet."""
        total = sum(map(len, batches))
        with progress.Bar("sample", total, "images") as bar:
            for batch in batches:
                if not self.files.is_missing(batch):
                    bar.resume_at(bar.done + len(batch))
                    continue
                pixels = self.files.read(batch)
                if pixels is None:
                    pixels = self.draw(batch).pixels_BHWC
                    self.files.note(self.job.made_with)
                self.files.write(batch, pixels)
                bar.advance(len(batch))
                if bar.done < total:
                    self.stop.leave(f"{bar.done} of {total} samples are in {self.files.folder}")

    def wait_for(self, batches: Sequence[range]) -> None:
        """Wait until the other processes of this command have drawn these micro-batches."""
        for batch in batches:
            while self.files.is_missing(batch):
                self.stop.leave(f"finished samples are in {self.files.folder}")
                time.sleep(WAIT_SECONDS)

    def finish(self, record: dict[str, Any], outputs: Outputs) -> None:
        """If every sample of the job is there: write the previews, samples.npz and, last, samples.json."""
        files = self.files
        if missing := sum(len(batch) for batch in files.batches if files.is_missing(batch)):
            progress.say(f"{missing} samples of other shards are missing; the last shard writes {folder.RECORD}")
            return
        if outputs.grid:
            self._save_grid()
        if outputs.gif:
            self._save_steps()
        if outputs.npz:
            files.save_npz(record["resolution"], self.labels)
        # An earlier run may have written the other kind of file: the record lists all that the folder has.
        packed = {"npz": folder.NPZ} if (files.folder / folder.NPZ).is_file() else {}
        rows = folder.sample_rows(self.labels, files.has_pngs)
        folder.finish(files.folder, {**record, **packed, "made_with": files.notes(), "samples": rows})

    def _save_grid(self) -> None:
        """The labelled grid, one class a row."""
        images: dict[int, Pixels] = {}
        for batch in self.files.batches:
            if shown := [index for index in batch if index in self.shown]:
                pixels = self.files.read(batch)
                assert pixels is not None
                images |= {index: pixels[index - batch.start] for index in shown}
        sheet = pictures.grid(np.stack([images[index] for index in self.shown]), self.columns, self.names)
        pictures.save_png(self.files.folder / GRID, sheet)

    def _save_steps(self) -> None:
        """The T partial decodes: a GIF of the grid, and a sheet with one sample a class, T images a row."""
        if missing := [index for index in self.shown if index not in self.shown_codes]:
            self.draw(missing)
        codes_BTS = torch.stack([self.shown_codes[index] for index in self.shown]).to(self.job.device)
        frames = decode_prefixes(self.job.tokenizer, codes_BTS)
        T = len(frames)
        titled = [pictures.grid(x, self.columns, self.names, f"t = {t} of {T}") for t, x in enumerate(frames, 1)]
        pictures.save_gif(self.files.folder / STEPS_GIF, titled)
        rows = np.stack([frame[:: self.columns] for frame in frames], 1)  # (classes, T, H, W, 3)
        sheet = pictures.grid(rows.reshape(-1, *rows.shape[2:]), T, self.names, f"t = 1 to {T}")
        pictures.save_png(self.files.folder / STEPS_SHEET, sheet)


def previewed(labels: Sequence[int]) -> list[int]:
    """Indices of the first few samples of each of the first classes, class by class."""
    by_class: dict[int, list[int]] = {label: [] for label in sorted(set(labels))[:CLASSES_SHOWN]}
    for index, label in enumerate(labels):
        if label in by_class and len(by_class[label]) < SAMPLES_SHOWN:
            by_class[label].append(index)
    return [index for indices in by_class.values() for index in indices]


# ---- editing -------------------------------------------------------------------------------------------------------


@dataclass
class Original:
    """The image of an edit as the tokenizer takes it. keep_TS: bool, codes that are kept; digests: for the record."""

    edit: Edit
    pixels: Pixels
    keep_TS: Tensor
    digests: dict[str, str]

    @torch.no_grad()
    def known_codes(self, tokenizer: Tokenizer, seed: int, device: torch.device) -> sampler.KnownCodes:
        """The function from sample indices to the codes to keep. The tokenizer is on the device.

        The codes kept in sample i are the image's codes under the noise of sample i: the network sees a pair of noise
        and codes that the tokenizer would produce, and each sample has different codes of the same image.
        """
        with one_thread():
            z_BCS = tokenizer.latents(to_model(chw(np.stack([self.pixels]))).to(device))

        def known(indices: Sequence[int]) -> Known:
            eps_BTCS = tokenizer.noise("sample", seed, indices, [0] * len(indices)).to(device)
            with one_thread():
                codes_BTS = tokenizer.quantizer.encode(z_BCS.expand(len(indices), -1, -1), eps_BTCS)
            return Known(codes_BTS, self.keep_TS.expand(len(indices), -1, -1))

        return known


def read_original(edit: Edit, tokenizer: Tokenizer) -> Original:
    """The original of an edit. Raises UsageError for an impossible mask or step, ImageError for a bad image."""
    size, T = tokenizer.cfg.autoencoder.resolution, tokenizer.quantizer.steps
    if not 1 <= edit.first <= T:
        raise UsageError(f"--from-step {edit.first} is not in 1..{T}", f"this checkpoint has T = {T}")
    image = open_item(edit.init)
    pixels = crop(image, size, edit.init)
    drawn_S, digests = torch.ones(tokenizer.latent_shape[1], dtype=torch.bool), {"init": _sha256(pixels)}
    if edit.mask is not None:
        mask = open_item(edit.mask)
        if mask.size not in (image.size, (size, size)):
            raise UsageError(
                f"--mask {edit.mask} is {mask.width}×{mask.height}, the image {image.width}×{image.height}",
                f"give a mask of the image's size, or of {size}×{size} after the centre crop",
            )
        white = crop(mask, size, edit.mask)
        drawn_S, digests["mask"] = torch.from_numpy(cells(white, tokenizer.grid).reshape(-1)), _sha256(white)
    if not drawn_S.any():
        raise UsageError(f"--mask {edit.mask} has no white pixel inside the crop", "white positions are drawn again")
    late_T1 = torch.arange(1, T + 1).view(-1, 1) >= edit.first
    return Original(edit, pixels, ~(late_T1 & drawn_S), digests)


def _sha256(pixels: Pixels) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()


# ---- options from text ---------------------------------------------------------------------------------------------


def edit_options(init: str | None, mask: str | None, from_step: int | None) -> Edit | None:
    """--init, --mask and --from-step; None without any. Raises UsageError if they do not go together."""
    if init is None:
        if mask is not None or from_step is not None:
            raise UsageError("--mask and --from-step edit an image", "name it with --init IMAGE")
        return None
    if mask is None and from_step is None:
        raise UsageError("--init alone keeps the whole image", "add --mask MASK or --from-step K")
    return Edit(init, mask, from_step)


def reject_options(text: str | None, judge: str | None) -> Reject | None:
    """--reject keep=RATE and --judge; None without either. Raises UsageError unless RATE is 1/2, 1/3, ..."""
    if text is None and judge is None:
        return None
    name, _, rate = (text or "").partition("=")
    try:
        share = float(rate)
        tries = round(1 / share)
    except (ValueError, ZeroDivisionError):
        share, tries = 0.0, 0
    if name != "keep" or judge is None or tries < 2 or abs(share * tries - 1) > 0.01:
        hint = "write --reject keep=0.25 --judge judge.pt for the best of 4"
        raise UsageError("--reject and --judge keep the best of several candidates", hint)
    return Reject(tries, judge)


def key_values(texts: Sequence[str], hint: str = "write it as precision=bf16") -> dict[str, Any]:
    """`key=value` arguments, with values as YAML reads them. Raises UsageError, with this hint."""
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"'{text}' is not key=value", hint)
        values[key] = parse_yaml(value, f"'{text}'")
    return values


def sampling_options(recorded: SamplingConfig, preset: str | None, requested: Mapping[str, Any]) -> SamplingConfig:
    """A checkpoint's sampling options, a preset's over them, and the requested ones over both.

    Raises UsageError for a preset or an option that the family does not have, and for an option without any effect.
    """
    section = type(recorded)
    if preset is not None and preset not in section.presets:
        names = ", ".join(section.presets) or "none"
        raise UsageError(f"--preset {preset}: this checkpoint's family has no such preset", f"it has {names}")
    if unknown := [name for name in requested if name not in section.model_fields]:
        message = f"{unknown[0]} is not a sampling option of {section.family}, this checkpoint's family"
        raise UsageError(message, f"it has {', '.join(section.model_fields)}")
    values = {**recorded.model_dump(), **(section.presets[preset] if preset else {}), **requested}
    options = validate(section, values, "sampling options")
    if preset in section.guided and options.cfg == 0 and "cfg" not in requested:
        message = f"--preset {preset} needs guidance, and the lambda of this checkpoint is 0"
        raise UsageError(message, f"write --preset {preset} cfg=1.5")
    for name, (switch, effective) in section.effective_with.items():
        value = getattr(options, switch)
        if name in requested and value not in effective:
            message = f"{name} has no effect with {switch}={value}"
            raise UsageError(message, f"leave it out, or give {switch}={' or '.join(effective)}")
    return options


# ---- eval --ckpt ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """The samples of a checkpoint, to be scored. overrides: `key=value` sampling options, over the preset's."""

    ckpt: Path
    classes: str = "all"
    per_class: int = 8
    seed: int = 0
    overrides: tuple[str, ...] = ()
    preset: str | None = None

    def images(self, device: torch.device) -> ImageSet:
        """The samples, drawn as they are read; each process draws only those that it reads."""
        requested = key_values(self.overrides, "write it as cfg=1.5; with --ckpt there is no TARGET")
        loaded, options, labels = load(self.ckpt, self.classes, self.per_class, self.seed, requested, self.preset)
        micro_batch = options.sampling.images_at_once(device.type)

        def read(pieces: Iterable[range]) -> Iterator[Pixels]:
            loaded.to(device, options.sampling.compile)
            job = sampler.Job(loaded.generator, loaded.tokenizer, options, micro_batch)
            batch, samples = range(0), np.empty(0, np.uint8)
            for piece in pieces:
                images = []
                for index in piece:
                    if index not in batch:
                        start = index - index % micro_batch
                        batch = range(start, min(start + micro_batch, len(labels)))
                        samples = job.draw(batch, labels[batch.start : batch.stop]).pixels_BHWC
                    images.append(samples[index - batch.start])
                yield np.stack(images)

        drawn = {"seed": self.seed, "classes": self.classes, "per_class": self.per_class, "checkpoint": loaded.digest}
        origin = {
            "reference": loaded.provenance.get("reference"),
            "options": {**options.sampling.model_dump(), **drawn},
            "made_from": {"checkpoint": loaded.digest},
        }
        size = loaded.tokenizer.cfg.autoencoder.resolution
        return ImageSet(str(self.ckpt), len(labels), size, labels, loaded.class_names, read, origin)

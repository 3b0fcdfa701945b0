"""sample: a checkpoint -> a folder of images; and the images that `eval --ckpt` scores without a folder between.

Legend: B samples, T steps, S positions of the flattened grid."""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
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
from rdpm_cli.data.pixels import Cut, Pixels, cells, center_crop, chw, to_model
from rdpm_cli.distributed import one_thread, pick_device
from rdpm_cli.engine.watch import decode_prefixes
from rdpm_cli.errors import UsageError, rdpm_command
from rdpm_cli.evaluation.judge import ClassJudge
from rdpm_cli.generator import registry, sampler
from rdpm_cli.generator.config import SamplingConfig
from rdpm_cli.generator.contract import Known, SampleOptions
from rdpm_cli.generator.registry import LoadedGenerator
from rdpm_cli.generator.sampler import KnownCodes, Samples
from rdpm_cli.runs import Result, stop_on_signal
from rdpm_cli.schema import parse_yaml

CLASSES_SHOWN, SAMPLES_SHOWN = 16, 8  # classes in the previews, samples of each
GRID, STEPS_GIF, STEPS_SHEET = "previews/grid.png", "previews/steps.gif", "previews/steps.png"
WAIT_SECONDS = 0.2  # between two looks at the files of other processes
UNFINISHED = "shard written; other shards are still missing"

Draw = Callable[[Sequence[int], Sequence[int]], Samples]  # indices and labels -> samples
# A process draws micro-batch `first` of every `stride`; it is `rank` of the `ranks` processes of its command.
Share = tuple[int, int, int, int]


@dataclass(frozen=True)
class Outputs:
    """The files to write next to samples.json."""

    png: bool = True
    npz: bool = False
    grid: bool = True
    gif: bool = False


@dataclass(frozen=True)
class Edit:
    """An image, whose codes are drawn again where the mask is white (None: everywhere), from a step on."""

    init: str
    mask: str | None = None
    from_step: int = 1


@dataclass(frozen=True)
class Reject:
    """Best of n: of `tries` candidates per sample, the one that the judge likes best is kept."""

    tries: int
    judge: str


def sample(
    ckpt: Path, classes: str = "all", per_class: int = 8, out: Path = Path("samples"), *, seed: int = 0,
    sampling: Mapping[str, Any] | None = None, preset: str | None = None, outputs: Outputs | None = None,
    edit: Edit | None = None, reject: Reject | None = None, shard: str = "1/1", device: str = "auto",
) -> Result:  # fmt: skip
    """Draw samples into `out`; continues an interrupted job. sampling: over the preset's and the checkpoint's own."""
    outputs = outputs or Outputs()
    if not (outputs.png or outputs.npz):
        raise UsageError("--no-png without --npz keeps no sample", "add --npz")
    share, picked = share_of(shard), pick_device(device)
    loaded, options, picked_classes = load(ckpt, classes, seed, sampling or {}, preset)
    labels = sampler.balanced_labels(picked_classes, per_class, seed)
    digests, known = digests_of(loaded, options), None
    recorded = {**options.sampling.model_dump(exclude={"guide"}), "seed": seed}  # of a guide the digest counts
    if edit:
        image_digests, known = open_edit(edit, loaded, seed)
        digests |= image_digests
        recorded["edit"] = {"from_step": edit.from_step, "masked": edit.mask is not None}
    size = loaded.tokenizer.cfg.autoencoder.resolution
    judge = ClassJudge(reject.judge, loaded.class_names, size, picked) if reject else None
    if reject and judge:
        facts = {"keep": 1 / reject.tries, "candidates": reject.tries, "judge": judge.name}
        recorded["reject"] = {**facts, "judge_sha256": judge.sha256}
    record = folder.picture_record(
        "rdpm-samples", digests, recorded, resolution=size, class_names=loaded.class_names,
        reference=loaded.provenance.get("reference"), rows=folder.sample_rows(labels, png=True),
    )  # fmt: skip
    record["checkpoint"] = str(ckpt.resolve())
    with folder.one_at_a_time(out):
        folder.claim(out, record)
    job = loaded.to(picked, options.sampling.compile).job(options, known)
    draw: Draw = partial(job.best, tries=reject.tries, judge=judge) if reject and judge else job.draw
    files = SampleFiles(out, len(labels), job.micro_batch, png=outputs.png)
    _work(files, share, job, draw, labels, record, outputs)
    passes = loaded.generator.passes(options, edit.from_step if edit else 1) * (reject.tries if reject else 1)
    return _result(out, record, options.sampling, outputs, passes)


def load(
    ckpt: Path, classes: str, seed: int, sampling: Mapping[str, Any], preset: str | None
) -> tuple[LoadedGenerator, SampleOptions, list[int]]:
    """The generator of a checkpoint, the options checked against it, and the labels of `classes`."""
    loaded = registry.load(ckpt)
    if loaded.text:
        raise UsageError(f"{ckpt} draws speech", "give --text or --list; score it by `rdpm eval speech`")
    return loaded, loaded.options(seed, preset, sampling), parse_classes(classes, loaded.class_names)


def digests_of(loaded: LoadedGenerator, options: SampleOptions) -> dict[str, str]:
    """Of the models that make samples under these options."""
    return {"checkpoint": loaded.digest} | ({"guide": options.guide.digest} if options.guide else {})


def share_of(shard: str) -> Share:
    """This process's share, by --shard I/N (1/4 to 4/4) and by torchrun's or --gpus' environment. Raises UsageError."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    first, _, count = shard.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise UsageError(f"--shard {shard} is not I/N", "write 1/4, 2/4, 3/4 and 4/4 for four shards")
    return (int(first) - 1) * ranks + rank, int(count) * ranks, rank, ranks


def shared(
    out: Path, share: Share, batches: Sequence[Sequence[int]], unit: str, is_missing: Callable[[Any], bool],
    make: Callable[[Any], None], finish: Callable[[], None],
) -> None:  # fmt: skip
    """Make the batches of this process that are missing in `out`; the last process finishes. unit: of a sample."""
    first, stride, rank, ranks = share
    mine = batches[first::stride]
    total = sum(map(len, mine))
    with folder.writing(out, first, stride), stop_on_signal(interrupt=ranks > 1) as stop:
        with progress.Bar("sample", total, unit) as bar:
            for batch in mine:
                if not is_missing(batch):
                    bar.resume_at(bar.done + len(batch))
                    continue
                make(batch)
                bar.advance(len(batch))
                if bar.done < total:
                    stop.leave(f"{bar.done} of {total} samples are in {out}")
        if rank > 0:
            return
        for other in range(ranks):  # the first process of a command ends last
            for batch in batches[first + other :: stride]:
                while is_missing(batch):
                    stop.leave(f"finished samples are in {out}")
                    time.sleep(WAIT_SECONDS)
        with folder.one_at_a_time(out):
            if missing := sum(len(batch) for batch in batches if is_missing(batch)):
                progress.say(f"{missing} samples of other shards are missing; the last shard writes {folder.RECORD}")
                return
            finish()


def _work(
    files: SampleFiles, share: Share, job: sampler.Job, draw: Draw, labels: list[int], record: dict[str, Any],
    outputs: Outputs,
) -> None:  # fmt: skip
    """Draw the micro-batches of this process that have no files yet; the last process writes the job's record."""
    shown = previewed(labels)
    shown_codes: dict[int, Tensor] = {}  # (T, S) by index, of the samples drawn here

    def make(batch: range) -> None:
        pixels = files.read(batch)  # from the other kind of file, which an earlier run has written
        if pixels is None:
            samples = draw(batch, [labels[index] for index in batch])
            shown_codes.update((i, codes) for i, codes in zip(batch, samples.codes_BTS, strict=True) if i in shown)
            pixels = samples.pixels_BHWC
            files.note(job.made_with)
        files.write(batch, pixels)

    def finish() -> None:
        _save_previews(files, job, draw, labels, shown_codes, record["class_names"], outputs)
        if outputs.npz:
            files.save_npz(record["resolution"], labels)
        # The record lists all that the folder has, also the other kind of file of an earlier run.
        packed = {"npz": folder.NPZ} if (files.folder / folder.NPZ).is_file() else {}
        rows = folder.sample_rows(labels, all(map(files.has_pngs, files.batches)))
        folder.finish(files.folder, {**record, **packed, "made_with": files.notes(), "samples": rows})

    shared(files.folder, share, files.batches, "images", files.is_missing, make, finish)


def previewed(labels: Sequence[int]) -> list[int]:
    """Indices of the first few samples of each of the first classes, class by class."""
    by_class: dict[int, list[int]] = {label: [] for label in sorted(set(labels))[:CLASSES_SHOWN]}
    for index, label in enumerate(labels):
        if label in by_class and len(by_class[label]) < SAMPLES_SHOWN:
            by_class[label].append(index)
    return [index for indices in by_class.values() for index in indices]


def _save_previews(
    files: SampleFiles, job: sampler.Job, draw: Draw, labels: list[int], shown_codes: dict[int, Tensor],
    class_names: list[str], outputs: Outputs,
) -> None:  # fmt: skip
    """The labelled grid, one class per row; the T partial decodes as a GIF of it, and as a sheet of one per class."""
    shown, root = previewed(labels), files.folder
    names = [class_names[label] for label in sorted({labels[index] for index in shown})]
    columns = -(-len(shown) // len(names))
    if outputs.grid:
        images: dict[int, Pixels] = {}
        for batch in files.batches:
            if indices := [index for index in batch if index in shown]:
                pixels = files.read(batch)
                assert pixels is not None
                images |= {index: pixels[index - batch.start] for index in indices}
        sheet = pictures.grid(np.stack([images[index] for index in shown]), columns, names)
        pictures.save_png(root / GRID, sheet)
    if outputs.gif:
        if absent := [index for index in shown if index not in shown_codes]:  # drawn by others, or before a restart
            samples = draw(absent, [labels[index] for index in absent])
            shown_codes |= dict(zip(absent, samples.codes_BTS, strict=True))
        codes_BTS = torch.stack([shown_codes[index] for index in shown]).to(job.device)
        frames = decode_prefixes(job.tokenizer, codes_BTS)
        T = len(frames)
        titled = [pictures.grid(x, columns, names, f"t = {t} of {T}") for t, x in enumerate(frames, 1)]
        pictures.save_gif(root / STEPS_GIF, titled)
        rows = np.stack([frame[::columns] for frame in frames], 1)  # (classes, T, H, W, 3)
        sheet = pictures.grid(rows.reshape(-1, *rows.shape[2:]), T, names, f"t = 1 to {T}")
        pictures.save_png(root / STEPS_SHEET, sheet)


def _result(out: Path, record: dict[str, Any], sampling: SamplingConfig, outputs: Outputs, passes: int) -> Result:
    """The requested files that are there, and the options that differ from the family's defaults."""
    finished = (out / folder.RECORD).is_file()
    defaults, options = type(sampling)().model_dump(), record["options"]
    changed = {name: options[name] for name in defaults if name == "cfg" or options[name] != defaults[name]}
    paths = {"grid": GRID} if outputs.grid else {}
    paths |= {"gif": STEPS_GIF, "sheet": STEPS_SHEET} if outputs.gif else {}
    paths |= {"npz": folder.NPZ} if outputs.npz else {}
    labels = [row["label"] for row in record["samples"]]
    values = {"folder": str(out), "samples": len(labels), "classes": len(set(labels))}
    values |= {"checkpoint": record["made_from"]["checkpoint"], **changed, "passes": passes}
    values |= {name: options[name] for name in ("seed", "edit", "reject") if name in options}
    if not finished:
        return Result(UNFINISHED, values)
    values |= {name: str(out / path) for name, path in paths.items()}
    return Result("samples written", values, rdpm_command("eval", "fid", out))


def open_edit(edit: Edit, loaded: LoadedGenerator, seed: int) -> tuple[dict[str, str], KnownCodes]:
    """The digests of image and mask, and the function from sample indices to the codes to keep.

    The codes kept in sample i are the image's codes under the noise of sample i: the network sees a pair of noise and
    codes that the tokenizer would produce, and each sample has different codes of the same image. Raises UsageError for
    an impossible mask or step, or one that the family cannot keep to, ImageError for a bad image."""
    tokenizer = loaded.tokenizer
    size, T, first = tokenizer.cfg.autoencoder.resolution, tokenizer.quantizer.steps, edit.from_step
    if not 1 <= first <= T:
        raise UsageError(f"--from-step {first} is not in 1..{T}", f"this checkpoint has T = {T}")
    image = open_item(edit.init)
    pixels = center_crop(image, size)
    digests = {"init": hashlib.sha256(pixels.tobytes()).hexdigest()}
    drawn_S = torch.ones(tokenizer.latent_shape[1], dtype=torch.bool)
    if edit.mask is not None:
        mask = open_item(edit.mask)
        if mask.size not in (image.size, (size, size)):
            message = f"--mask {edit.mask} is {mask.width}×{mask.height}, the image {image.width}×{image.height}"
            raise UsageError(message, f"give a mask of the image's size, or of {size}×{size} after the centre crop")
        white = center_crop(mask, size)
        digests["mask"] = hashlib.sha256(white.tobytes()).hexdigest()
        drawn_S = torch.from_numpy(cells(white, tokenizer.grid).reshape(-1))
        if not drawn_S.any():
            raise UsageError(f"--mask {edit.mask} has no white pixel inside the crop", "white is drawn again")
    keep_TS = ~((torch.arange(1, T + 1).view(-1, 1) >= first) & drawn_S)
    loaded.generator.check_known(keep_TS[None])

    @cache
    def latents() -> Tensor:  # not before the tokenizer is on its device
        with one_thread():
            return tokenizer.latents(to_model(chw(np.stack([pixels]))).to(tokenizer.quantizer.books.device))

    def known(indices: Sequence[int]) -> Known:
        z_BCS, n = latents(), len(indices)
        eps_BTCS = tokenizer.noise("sample", seed, indices, [0] * n).to(z_BCS.device)
        with one_thread():
            codes_BTS = tokenizer.quantizer.encode(z_BCS.expand(n, -1, -1), eps_BTCS)
        return Known(codes_BTS, keep_TS.expand(n, -1, -1))

    return digests, torch.no_grad()(known)


def edit_options(init: str | None, mask: str | None, from_step: int | None) -> Edit | None:
    """--init, --mask and --from-step; None without any. Raises UsageError if they do not go together."""
    if init is None:
        if mask is not None or from_step is not None:
            raise UsageError("--mask and --from-step edit an image", "name it with --init IMAGE")
        return None
    if mask is None and from_step is None:
        raise UsageError("only --init keeps the whole image", "add --mask MASK or --from-step K")
    return Edit(init, mask, 1 if from_step is None else from_step)


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
    pairs = [text.partition("=") for text in texts]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        raise UsageError(f"'{wrong[0]}' is not key=value", hint)
    return {key: parse_yaml(value, f"'{key}={value}'") for key, _, value in pairs}


@dataclass(frozen=True)
class Drawn:
    """A set of samples of a checkpoint for each seed, to be scored.

    overrides: `key=value` sampling options, over the preset's."""

    ckpt: Path
    classes: str = "all"
    per_class: int = 8
    seeds: range = range(1)
    overrides: tuple[str, ...] = ()
    preset: str | None = None
    cut: Cut = "round"

    def sets(self, device: torch.device) -> list[ImageSet]:
        """The samples of each seed, drawn as they are read; each process draws only those that it reads."""
        requested = key_values(self.overrides, "write it as cfg=1.5; with --ckpt there is no TARGET")
        loaded, options, classes = load(self.ckpt, self.classes, self.seeds[0], requested, self.preset)
        size = loaded.tokenizer.cfg.autoencoder.resolution

        def images(seed: int) -> ImageSet:
            labels = sampler.balanced_labels(classes, self.per_class, seed)

            def read(pieces: Iterable[range]) -> Iterator[Pixels]:
                loaded.to(device, options.sampling.compile)
                job = loaded.job(replace(options, seed=seed), cut=self.cut)
                for piece in pieces:
                    yield job.draw(piece, labels[piece.start : piece.stop]).pixels_BHWC

            drawn = {"seed": seed, "classes": self.classes, "per_class": self.per_class, "checkpoint": loaded.digest}
            drawn |= {} if self.cut == "round" else {"dtype_cut": self.cut}
            record = {
                "reference": loaded.provenance.get("reference"),
                "options": {**options.sampling.model_dump(), **drawn},
                "made_from": digests_of(loaded, options),
            }
            return ImageSet(str(self.ckpt), len(labels), size, labels, loaded.class_names, read, record)

        return [images(seed) for seed in self.seeds]

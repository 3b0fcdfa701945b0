"""sample: a checkpoint -> images."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpm_cli import files, progress, recipe_files
from rdpm_cli.engine import pictures
from rdpm_cli.engine.runs import Result
from rdpm_cli.errors import UsageError

if TYPE_CHECKING:
    from rdpm_cli.config import SamplingConfig
    from rdpm_cli.generator.model import LoadedGenerator


def parse_classes(text: str, class_names: Sequence[str]) -> list[int]:
    """`1,2,3`, `0-9`, `all`, `name:goldfish`, and mixtures, in order, each once. Raises UsageError."""
    chosen: list[int] = []
    for part in (p.strip() for p in text.split(",")):
        low, dash, high = part.partition("-")
        if part == "all":
            chosen += range(len(class_names))
        elif part.startswith("name:"):
            chosen.append(_class_named(part.removeprefix("name:"), class_names))
        elif part.isdecimal():
            chosen.append(int(part))
        elif dash and low.isdecimal() and high.isdecimal() and int(low) <= int(high):
            chosen += range(int(low), int(high) + 1)
        else:
            raise UsageError(f"--classes: '{part}' is not a class", "write 1,2,3 or 0-9 or all or name:goldfish")
    if outside := [c for c in chosen if c >= len(class_names)]:
        raise UsageError(f"--classes: there is no class {outside[0]}", f"this checkpoint has 0..{len(class_names) - 1}")
    return list(dict.fromkeys(chosen))


def _class_named(name: str, class_names: Sequence[str]) -> int:
    if name in class_names:
        return list(class_names).index(name)
    near = difflib.get_close_matches(name, class_names, 3)
    hint = f"did you mean {', '.join(near)}?" if near else "see the names with `rdpm inspect CKPT`"
    raise UsageError(f"--classes: no class is named '{name}'", hint)


def sample(
    ckpt: Path,
    classes: str = "all",
    per_class: int = 8,
    out: Path = Path("samples"),
    *,
    seed: int = 0,
    asked: Mapping[str, Any] | None = None,
    grid: bool = True,
    gif: bool = False,
    npz: bool = False,
    device: str = "auto",
) -> Result:
    """Checkpoint -> PNGs, samples.json, previews. asked: the family's options; those left out are the checkpoint's."""
    from rdpm_cli.generator import model, sampler
    from rdpm_cli.generator.contract import SampleOptions

    loaded = model.load(ckpt)
    sampling = _sampling_options(loaded, asked or {})
    options = SampleOptions(sampling, seed)
    labels = sampler.balanced_labels(parse_classes(classes, loaded.class_names), per_class, seed)
    loaded.generator.check(options)
    record = pictures.picture_record(
        "rdpm-samples",
        {"checkpoint": loaded.digest},
        {**sampling.model_dump(), "seed": seed},
        resolution=loaded.tokenizer.cfg.autoencoder.resolution,
        class_names=loaded.class_names,
        reference=loaded.provenance.get("reference"),
        rows=[{"file": f"{i:06d}.png", "index": i, "label": label} for i, label in enumerate(labels)],
    )
    with files.only_writer(out):
        pictures.claim(out, record)
        preview = _write_samples(loaded, labels, options, sampling.micro_batch, out, device)
        pictures.finish(out, {**record, "checkpoint": str(ckpt.resolve())})
        previews = _write_previews(loaded, preview, out, grid, gif)
        if npz:
            previews["npz"] = _write_npz(out, record)
    values = {"folder": str(out), "samples": len(labels), "classes": len(set(labels)), "checkpoint": loaded.digest}
    return Result("samples written", {**values, **record["options"], **previews}, f"rdpm eval fid {out}")


def _sampling_options(loaded: LoadedGenerator, asked: Mapping[str, Any]) -> SamplingConfig:
    """The checkpoint's sampling section with what is asked for. Raises UsageError for options of another family."""
    own, family = type(loaded.sampling), loaded.generator.cfg.family
    if foreign := [name for name in asked if name not in own.model_fields]:
        known = ", ".join(_option(name) for name in own.model_fields if name != "micro_batch")
        raise UsageError(f"{_option(foreign[0])} is no option of {family}, the checkpoint's family", f"it has {known}")
    return recipe_files.validate(own, {**loaded.sampling.model_dump(), **asked}, "sampling options")


def _option(name: str) -> str:
    """A field as the command line writes it."""
    return f"--{name.replace('_', '-')}"


PREVIEWED = 8  # samples a class in the preview grid


def _previewed(labels: list[int]) -> set[int]:
    """Indices of the first few samples of each of the first 16 classes."""
    left = dict.fromkeys(sorted(set(labels))[:16], PREVIEWED)
    chosen = set()
    for index, label in enumerate(labels):
        if left.get(label, 0) > 0:
            left[label] -= 1
            chosen.add(index)
    return chosen


def _write_samples(
    loaded: LoadedGenerator, labels: list[int], options: Any, micro_batch: int, out: Path, device: str
) -> list[tuple[int, Any, Any]]:
    """Write the PNGs that are missing. -> (label, pixels, codes) of the previewed samples, by label."""
    from rdpm_cli.generator import sampler
    from rdpm_cli.images import writers
    from rdpm_cli.signals import stop_on_signal
    from rdpm_cli.training.distributed import process_group

    shown = _previewed(labels)
    there = {index for index in range(len(labels)) if (out / f"{index:06d}.png").is_file()}
    preview: list[tuple[int, Any, Any]] = []

    def wanted(indices: list[int]) -> bool:
        return not there.issuperset(indices) or not shown.isdisjoint(indices)

    with (
        process_group(device) as chosen,
        stop_on_signal() as stop,
        progress.Bar("sample", len(labels), "images") as bar,
    ):
        loaded.to(chosen)
        for part in sampler.sample(loaded.generator, loaded.tokenizer, labels, options, micro_batch, wanted):
            for place, (index, label) in enumerate(zip(part.indices, part.labels, strict=True)):
                if index not in there:
                    writers.save_png(out / f"{index:06d}.png", part.pixels_BHWC[place])
                if index in shown:
                    preview.append((label, part.pixels_BHWC[place], part.codes_BTHW[place]))
            bar.resume_at(part.indices[0])
            bar.advance(len(part.indices))
            if bar.done < len(labels):
                stop.leave(f"the first {bar.done} of {len(labels)} samples are in {out}")
    return sorted(preview, key=lambda row: row[0])


def _write_npz(out: Path, record: dict[str, Any]) -> str:
    from rdpm_cli.evaluation.reference import open_samples
    from rdpm_cli.images import writers

    images, size = open_samples(out), record["resolution"]
    assert images.labels is not None
    writers.save_npz(out / "samples.npz", (images.count, size, size, 3), images.batches, images.labels)
    return str(out / "samples.npz")


def _write_previews(
    loaded: LoadedGenerator, preview: list[tuple[int, Any, Any]], out: Path, grid: bool, gif: bool
) -> dict[str, str]:
    import numpy as np
    import torch

    from rdpm_cli.engine import observers
    from rdpm_cli.images import writers

    names = [loaded.class_names[label] for label in dict.fromkeys(row[0] for row in preview)]
    columns = -(-len(preview) // len(names))
    written = {}
    if grid:
        sheet = writers.grid(np.stack([row[1] for row in preview]), columns, names)
        writers.save_png(out / "previews" / "grid.png", sheet)
        written["grid"] = str(out / "previews" / "grid.png")
    if gif:
        device = next(loaded.tokenizer.parameters()).device
        frames = observers.decode_prefixes(loaded.tokenizer, torch.stack([row[2] for row in preview]).to(device))
        titled = [writers.grid(f, columns, names, f"t = {t} of {len(frames)}") for t, f in enumerate(frames, 1)]
        writers.save_gif(out / "previews" / "steps.gif", titled)
        written["gif"] = str(out / "previews" / "steps.gif")
    return written

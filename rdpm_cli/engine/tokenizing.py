"""tokenize: images -> code store."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rdpm_cli import crew, files, progress
from rdpm_cli.codes.work import Work
from rdpm_cli.engine.runs import Result, versions
from rdpm_cli.errors import CheckpointError, Stopped

if TYPE_CHECKING:
    import torch

    from rdpm_cli.codes.manifest import BadImage, Manifest, Plan
    from rdpm_cli.images.sources import ImageSource
    from rdpm_cli.team import Team
    from rdpm_cli.tokenizer.model import Tokenizer

SHARD_IMAGES = 4096


def find_tokenizer(given: Path | None) -> Path:
    """--tokenizer, else $RDPM_TOKENIZER, else ./tokenizer.pt. Raises CheckpointError saying how to make one."""
    if given is not None:
        return given
    if named := os.environ.get("RDPM_TOKENIZER"):
        return Path(named)
    if Path("tokenizer.pt").is_file():
        return Path("tokenizer.pt")
    raise CheckpointError(
        "no tokenizer: --tokenizer is not given, $RDPM_TOKENIZER is not set, and there is no ./tokenizer.pt",
        "make one with `rdpm train-tokenizer IMAGES --recipe NAME`, then pass its tokenizer.pt",
    )


@dataclass(frozen=True)
class StoreOptions:
    """What fixes a store beside images and tokenizer. precision, micro_batch: None for the device's own."""

    views: int = 1
    flip: bool = False
    latents: bool = False
    draft: bool = False
    seed: int = 0
    shard_images: int = SHARD_IMAGES
    precision: Literal["fp32", "bf16"] | None = None
    micro_batch: int | None = None


def tokenize(
    images: str,
    out: Path,
    tokenizer: Path | None = None,
    options: StoreOptions | None = None,
    work: Work | None = None,
    *,
    workers: int | None = None,
    dry_run: bool = False,
    device: str = "auto",
    team: Team | None = None,
) -> Result:
    """Images -> code store. Resumes at the first missing shard; a finished store is left alone.

    workers: processes, default one a core. dry_run: say what would be done, write nothing. team: as --gpus.
    """
    path = find_tokenizer(tokenizer)
    if not dry_run:
        files.refuse_second_writer(out)
    from rdpm_cli.images.sources import open_source

    source = open_source(images)
    from rdpm_cli.codes import encode
    from rdpm_cli.codes.manifest import Manifest
    from rdpm_cli.tokenizer import model
    from rdpm_cli.training.distributed import barrier, process_group

    loaded, content = model.load(path)
    if team and team.processes > 1 and not dry_run:
        _tokenize_by(team, device, out)
        return _answer(out, Manifest.load(out))
    with process_group(device, several=True) as chosen:
        chosen_options = asdict(options or StoreOptions())
        plan = encode.make_plan(source, loaded, content["digest"], device=chosen, **chosen_options)
        how = replace(work or Work(), workers=workers or _default_workers(), together=barrier)
        _place(loaded, plan, chosen)
        if dry_run:
            return _forecast(out, source, loaded, path.read_bytes(), plan, how)
        _write(out, source, loaded, path.read_bytes(), plan, how)
    return _answer(out, Manifest.load(out))


def _default_workers() -> int:
    """The cores of this process's share of the node."""
    return max(1, crew.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _place(tokenizer: Tokenizer, plan: Plan, device: torch.device) -> None:
    """Move the network to the device, in the layout of its precision."""
    import torch

    form = torch.channels_last if plan.precision == "bf16" else torch.contiguous_format
    tokenizer.to(device).to(memory_format=form)


def _write(out: Path, source: ImageSource, tokenizer: Tokenizer, tokenizer_file: bytes, plan: Plan, work: Work) -> None:
    """Write the store with progress. A signal ends it after a piece of work, or in a long one; whole shards stay."""
    from rdpm_cli.codes import writing
    from rdpm_cli.codes.make import write_store
    from rdpm_cli.signals import stop_on_signal
    from rdpm_cli.step import world

    record = {"argv": sys.argv, "processes": world()[1], "workers": work.workers, "versions": versions()}
    saved = f"finished shards are kept in {out}"
    with (
        stop_on_signal(interrupt=world()[1] > 1, saved=saved) as stop,
        progress.Bar("tokenize", len(source), "images") as bar,
    ):
        pieces = write_store(out, source, tokenizer, tokenizer_file, plan, record, work)
        try:
            bar.resume_at(next(pieces))
            if writing.is_finished(out):
                progress.say(f"{out} was finished already; the images' names were compared with it, not their pixels")
            for done in pieces:
                bar.advance(done)
                if bar.done < len(source) or world()[1] > 1:
                    stop.leave(saved)
        finally:
            pieces.close()


def _tokenize_by(team: Team, device: str, out: Path) -> None:
    """Let the team write the store."""
    from rdpm_cli.training import launch

    launch.check(team, device)
    try:
        launch.launch(team)
    except Stopped:
        if not (out / "manifest.json").exists():  # the signal came after the last shard
            raise


def _answer(out: Path, m: Manifest) -> Result:
    size = sum((out / name).stat().st_size for shard in m.shards for name in shard.sha256)
    values = {
        "store": str(out),
        "digest": m.digest(),
        "tokenizer": m.tokenizer,
        "images": m.images,
        "bad": m.bad,
        "classes": len(m.class_names),
        "views": m.views,
        "shape": [m.steps, *m.grid],
        "bytes": size,
        "bytes_per_image": round(size / m.images, 1),
        "psnr": round(sum(s.psnr for s in m.samples) / len(m.samples), 2),
    }
    return Result("codes written", values, f"rdpm train-gen {out} --recipe NAME")


def _forecast(
    out: Path, source: ImageSource, tokenizer: Tokenizer, tokenizer_file: bytes, plan: Plan, work: Work
) -> Result:
    """What the same command without --dry-run would do. Raises UsageError, RunError and ImageError as it would."""
    from rdpm_cli.codes import make, writing

    files.check_folder(out)
    writing.check(out, plan)
    finished = writing.is_finished(out)
    todo = [] if finished else writing.missing_shards(out, plan)
    beside = len(tokenizer_file) + len(writing.name_lines(source.names))
    if not finished:
        files.need_space(out, writing.bytes_missing(plan, todo) + beside)
    images = sum(len(plan.shard_range(shard)) for shard in todo)
    batch_seconds, bad = _time_batch(source, tokenizer, plan, todo[0] if todo else 0)
    if bad and todo and work.on_bad == "stop":
        raise make.bad_image(source, bad[0])
    batches = sum(-(-len(plan.shard_range(shard)) // plan.micro_batch) for shard in todo)
    at_once = min(work.workers, crew.cores(), max(1, batches)) if plan.device == "cpu" else 1
    values = {
        "store": str(out),
        "images": len(source),
        "classes": len(plan.class_names),
        "images_missing": images,
        "shards": plan.shard_count,
        "shards_missing": len(todo),
        "bytes_of_shards": plan.image_bytes() * len(source),
        "bytes_missing": 0 if finished else writing.bytes_missing(plan, todo) + beside,
        "bytes_free": files.free_bytes(out),
        "workers": work.workers,
        "micro_batch": plan.micro_batch,
        "bad_in_first_micro_batch": len(bad),
        "seconds_per_micro_batch": round(batch_seconds, 4),
        "seconds": round(-(-batches // at_once) * batch_seconds, 1),
    }
    return Result("nothing written: this is a dry run", values)


WARM_SECONDS = 5.0  # a first micro-batch that takes longer than this is not repeated


def _time_batch(source: ImageSource, tokenizer: Tokenizer, plan: Plan, shard: int) -> tuple[float, list[BadImage]]:
    """Seconds of a shard's first micro-batch, all of it in this process, once warm; its images that cannot be read."""
    from rdpm_cli.codes import encode

    part = encode.parts(plan, shard)[0]
    for _ in range(2):
        start = time.perf_counter()
        bad = encode.encode_part(source, tokenizer, plan, part).bad
        seconds = time.perf_counter() - start
        if seconds > WARM_SECONDS:
            break
    return seconds, bad


def source_of(manifest: Manifest) -> ImageSource | None:
    """The images a store was made from, where they are still here and the same."""
    from rdpm_cli.images.sources import is_there, open_source

    name = manifest.data.source
    if is_there(name):
        source = open_source(name)
        if source.digest() == manifest.data.digest:
            return source
    return None

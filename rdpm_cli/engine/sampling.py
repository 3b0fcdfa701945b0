"""sample: a checkpoint -> images."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpm_cli import progress
from rdpm_cli.engine import editing, pictures, runs, sample_files
from rdpm_cli.engine.editing import Edit
from rdpm_cli.engine.runs import Result
from rdpm_cli.engine.sample_files import NPZ, Files, Part
from rdpm_cli.engine.sample_forecast import forecast
from rdpm_cli.engine.sample_options import Reject, choose, parse_classes
from rdpm_cli.engine.sample_previews import Previews
from rdpm_cli.errors import Stopped, UsageError

if TYPE_CHECKING:
    from rdpm_cli.config import SamplingConfig
    from rdpm_cli.evaluation.rejection import ClassJudge
    from rdpm_cli.generator.contract import SampleOptions
    from rdpm_cli.generator.model import LoadedGenerator
    from rdpm_cli.generator.sampler import Given, Job, Samples
    from rdpm_cli.images.transform import Pixels
    from rdpm_cli.signals import StopRequest
    from rdpm_cli.team import Team


@dataclass(frozen=True)
class Outputs:
    """What is written beside samples.json. trajectory: how the shown samples came about."""

    png: bool = True
    npz: bool = False
    grid: bool = True
    gif: bool = False
    trajectory: bool = False

    def check(self) -> None:
        """Raise UsageError where no sample would be kept."""
        if not (self.png or self.npz):
            raise UsageError("--no-png without --npz keeps no sample", "add --npz")


@dataclass
class Request:
    """A job as it was asked for, checked."""

    loaded: LoadedGenerator
    labels: list[int]
    options: SampleOptions
    out: Path
    outputs: Outputs
    original: editing.Original | None
    edit: Edit | None
    reject: Reject | None
    record: dict[str, Any]

    @property
    def passes(self) -> int:
        """Rows through the network for one sample that is kept: those of all its candidates."""
        of_one = self.loaded.generator.passes(self.options, self.edit.first if self.edit else 1)
        return of_one * (self.reject.tries if self.reject else 1)

    def files(self, device_type: str) -> Files:
        """Its files, in pieces of this device's micro-batches."""
        at_once = self.options.sampling.images_at_once(device_type)
        return Files(self.out, len(self.labels), at_once, png=self.outputs.png, npz=self.outputs.npz)


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
    dry_run: bool = False,
    device: str = "auto",
    team: Team | None = None,
) -> Result:
    """Checkpoint -> PNGs, samples.npz, samples.json, previews. Sampling options left out are the checkpoint's own.

    sampling: fields of the family's section. shard: as --shard. team: as --gpus.
    dry_run: say what would be done, write nothing.
    """
    runs.need_generator(ckpt)
    from rdpm_cli.generator import model
    from rdpm_cli.training import distributed

    outputs, part = outputs or Outputs(), sample_files.part_of(shard)
    outputs.check()
    if team and not dry_run:
        from rdpm_cli.training import launch

        launch.check(team, device)
    loaded = model.load(ckpt)
    chosen = choose(loaded.sampling, preset, sampling or {})
    request = _request(loaded, chosen, classes, per_class, out, seed, outputs, edit, reject)
    request.record["checkpoint"] = str(ckpt.resolve())
    if dry_run:
        return forecast(request, part, device)
    if not team:
        distributed.pick_device(device)  # before the folder is claimed
    with sample_files.one_at_a_time(out):
        pictures.claim(out, request.record)
    if team and team.processes > 1:
        _sample_by(team, out)
    else:
        with sample_files.writing(out, part):
            _draw_all(request, part, device)
    return _answer(request)


def _request(
    loaded: LoadedGenerator,
    sampling: SamplingConfig,
    classes: str,
    per_class: int,
    out: Path,
    seed: int,
    outputs: Outputs,
    edit: Edit | None,
    reject: Reject | None,
) -> Request:
    from rdpm_cli.generator import sampler
    from rdpm_cli.generator.contract import SampleOptions, Trajectories

    options = SampleOptions(sampling, seed)
    loaded.generator.check(options)
    if outputs.trajectory and reject:
        raise UsageError("--trajectory follows a sample, --reject draws several", "leave one of them out")
    if outputs.trajectory and not isinstance(loaded.generator, Trajectories):
        raise UsageError("this checkpoint's family tells nothing of its trajectories", "leave out --trajectory")
    original = editing.read(edit, loaded.tokenizer) if edit else None
    labels = sampler.balanced_labels(parse_classes(classes, loaded.class_names), per_class, seed)
    told = {**sampling.model_dump(), "seed": seed}
    if edit:
        told["edit"] = {"from_step": edit.first, "masked": edit.mask is not None}
    if reject:
        told["reject"] = {"keep": 1 / reject.tries, "candidates": reject.tries, **_judge_of(reject, loaded)}
    record = pictures.picture_record(
        "rdpm-samples",
        {"checkpoint": loaded.digest, **(original.digests if original else {})},
        told,
        resolution=loaded.tokenizer.cfg.autoencoder.resolution,
        class_names=loaded.class_names,
        reference=loaded.provenance.get("reference"),
        rows=sample_files.rows_of(labels, png=True),
    )
    return Request(loaded, labels, options, out, outputs, original, edit, reject, record)


def _judge_of(reject: Reject, loaded: LoadedGenerator) -> dict[str, str]:
    judge = _open_judge(reject, loaded, "cpu")
    return {"judge": judge.name, "judge_sha256": judge.sha256}


def _open_judge(reject: Reject, loaded: LoadedGenerator, device: Any) -> ClassJudge:
    import torch

    from rdpm_cli.evaluation import rejection

    return rejection.open_judge(reject.judge, loaded.class_names, torch.device(device))


def _sample_by(team: Team, out: Path) -> None:
    """Let the team draw the samples."""
    from rdpm_cli.training import launch

    try:
        launch.launch(team)
    except Stopped:
        if not (out / pictures.RECORD).is_file():  # the signal came after the last sample
            raise


def _draw_all(request: Request, part: Part, device: str) -> None:
    """Draw this process's pieces; the first process then also waits for those of its command, and finishes."""
    from rdpm_cli.generator import sampler
    from rdpm_cli.signals import stop_on_signal
    from rdpm_cli.training.distributed import pick_device

    chosen = pick_device(device)
    written, options = request.files(chosen.type), request.options
    loaded = request.loaded.to(chosen, options.sampling.compile)
    given: Given | None = None
    if request.original:
        given = editing.given(request.original, loaded.tokenizer, options.seed, chosen)
    with (
        stop_on_signal(interrupt=part.ranks > 1) as stop,
        sampler.job(loaded.generator, loaded.tokenizer, options, written.micro_batch, given) as job,
    ):
        drawing = _Drawing(request, written, job, Previews(loaded, request.labels, request.out), stop)
        drawing.pieces(written.pieces[part.place :: part.count])
        if part.rank == 0:
            shard = [piece for r in range(1, part.ranks) for piece in written.pieces[part.place + r :: part.count]]
            written.wait(shard, stop)
            with sample_files.one_at_a_time(request.out):
                drawing.finish()


class _Drawing:
    """One process's work at a job."""

    def __init__(self, request: Request, written: Files, job: Job, previews: Previews, stop: StopRequest) -> None:
        self.request, self.written, self.job, self.previews, self.stop = request, written, job, previews, stop
        self.judge = _open_judge(request.reject, request.loaded, job.device) if request.reject else None

    def draw(self, indices: Sequence[int]) -> Samples:
        """Samples by index."""
        labels, reject = [self.request.labels[index] for index in indices], self.request.reject
        if reject and self.judge:
            return self.job.best(indices, labels, reject.tries, self.judge)
        return self.job.draw(indices, labels)

    def pieces(self, own: Sequence[range]) -> None:
        """Make what is missing of these."""
        total = sum(map(len, own))
        with progress.Bar("sample", total, "images") as bar:
            for piece in own:
                if self.written.lacks(piece):
                    self._piece(piece, bar, total)
                else:
                    bar.resume_at(bar.done + len(piece))

    def _piece(self, piece: range, bar: progress.Bar, total: int) -> None:
        import numpy as np

        made: list[Pixels] = []
        for part in sample_files.parts_of(piece, self.written.micro_batch):
            pixels = self.written.read(part)
            if pixels is None:
                samples = self.draw(part)
                self.written.note(self.job.made_with)
                self.previews.note(samples)
                pixels = samples.pixels_BHWC
                bar.advance(len(part))
            else:
                bar.resume_at(bar.done + len(part))
            self.written.write_pngs(part, pixels)
            made.append(pixels)
            if bar.done < total:
                self.stop.leave(
                    f"{bar.done} of {total} samples are there; finished ones are kept in {self.written.out}"
                )
        self.written.write_chunk(piece, np.concatenate(made))

    def finish(self) -> None:
        """Once every piece of the job is there: pictures, samples.npz, and samples.json last."""
        request, written = self.request, self.written
        if missing := sum(len(piece) for piece in written.pieces if written.lacks(piece)):
            progress.say(f"{missing} samples of other shards are missing; who ends last writes {pictures.RECORD}")
            return
        outputs = request.outputs
        if outputs.grid:
            self.previews.grid(written, self.draw)
        if outputs.gif:
            self.previews.steps(self.draw)
        if outputs.trajectory:
            self.previews.trajectory(self.job)
        if outputs.npz:
            written.save_npz(request.record["resolution"], request.labels)
        png = written.has_pngs(range(len(request.labels)))
        packed = {"npz": NPZ} if (request.out / NPZ).is_file() else {}
        rows = sample_files.rows_of(request.labels, png)
        made = {"made_with": written.notes(pictures.finished(request.out).get("made_with", []))}
        pictures.finish(request.out, {**request.record, **packed, **made, "samples": rows})
        shutil.rmtree(request.out / sample_files.PARTS, ignore_errors=True)


SHOWN = {"grid": "grid.png", "gif": "steps.gif", "sheet": "steps.png", "trajectory": "trajectory.json"}


def _answer(request: Request) -> Result:
    """What was asked for and is there."""
    out, own = request.out, request.options.sampling
    finished = (out / pictures.RECORD).is_file()
    wanted = {"sheet" if name == "gif" else name for name, on in vars(request.outputs).items() if on}
    wanted |= {"gif"} if request.outputs.gif else set()
    shown = {name: str(out / "previews" / file) for name, file in SHOWN.items() if finished and name in wanted}
    packed = {"npz": str(out / NPZ)} if finished and request.outputs.npz else {}
    standard = type(own)().model_dump()
    told = {name: value for name, value in own.model_dump().items() if name == "cfg" or value != standard[name]}
    values = {
        "folder": str(out),
        "samples": len(request.labels),
        "classes": len(set(request.labels)),
        "checkpoint": request.loaded.digest,
        **told,
        "passes": request.passes,
        **{
            name: request.record["options"][name]
            for name in ("seed", "edit", "reject")
            if name in request.record["options"]
        },
        **shown,
        **packed,
    }
    title = "samples written" if finished else "shard written; other shards are still missing"
    return Result(title, values, f"rdpm eval fid {out}" if finished else "")

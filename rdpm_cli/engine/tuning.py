"""tune-sampling: a small search over a checkpoint's sampling options -> a checkpoint with the best as its defaults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpm_cli import files, progress
from rdpm_cli.engine import drawing, runs
from rdpm_cli.engine.runs import Result, versions
from rdpm_cli.errors import RecipeError, UsageError

if TYPE_CHECKING:
    import torch

    from rdpm_cli.config import SamplingConfig
    from rdpm_cli.generator.model import LoadedGenerator

NOTE = "one seed and few samples: it compares options, and is no score to report"


@dataclass
class Search:
    """One field after the other, each of its values with the others at their best, until nothing gets better.

    `score` gives a number to options, smaller is better, None for options that cannot be used. It is asked `budget`
    times at most, never twice for the same samples: without guidance its schedule changes nothing.
    """

    score: Callable[[SamplingConfig], float | None]
    budget: int
    found: dict[str, float] = field(default_factory=dict)  # by what differs from the start
    best: SamplingConfig | None = None
    value: float = float("inf")

    def run(self, start: SamplingConfig) -> SamplingConfig:
        """The best options found."""
        self._start, self._asked = start, set[str]()
        best = start
        self._ask(start)
        while self.budget > 0:
            before = best
            for candidate in self._neighbours(before):
                if self._ask(candidate):
                    best = candidate
            if best == before:
                break
        return best

    def _neighbours(self, centre: SamplingConfig) -> Iterator[SamplingConfig]:
        """Fields in order; those after the first are varied around the best so far."""
        for name, values in type(centre).search.items():
            for value in values:
                now = self.best or centre
                if not (name.startswith("cfg_") and now.cfg == 0):
                    yield now.model_copy(update={name: value})

    def _ask(self, options: SamplingConfig) -> bool:
        """Score the options, unless that is done or too much. Are they the best so far?"""
        key = options.model_dump_json()
        if key in self._asked or self.budget <= 0:
            return False
        self._asked.add(key)
        value = self.score(options)
        if value is None:
            return False
        self.budget -= 1
        self.found[differing(options, self._start)] = value
        if value >= self.value:
            return False
        self.best, self.value = options, value
        return True


class Tried:
    """Scores of finished candidates in a file, so that a search that was stopped goes on where it was."""

    def __init__(self, path: Path, plan: dict[str, Any]) -> None:
        """plan: what fixes a score. Raises UsageError where the file is of another plan."""
        before = files.read_json(path) if path.is_file() else {"plan": plan, "values": {}}
        if changed := files.differences(before["plan"], plan):
            raise UsageError(
                f"{path} is of another search: {'; '.join(changed[:4])}", "remove it, or name another file with --out"
            )
        self.path, self.plan, self.values = path, plan, before["values"]
        if self.values:
            progress.say(f"{len(self.values)} candidates are there from before, in {path}")

    def score(self, options: SamplingConfig, measure: Callable[[SamplingConfig], float | None]) -> float | None:
        """From the file, or measured and written to it."""
        key = options.model_dump_json()
        if key not in self.values:
            self.values[key] = measure(options)
            files.write_json(self.path, {"plan": self.plan, "values": self.values})
        value: float | None = self.values[key]
        return value

    def done(self) -> None:
        """The search has ended, and its result is written."""
        self.path.unlink(missing_ok=True)


def differing(options: SamplingConfig, start: SamplingConfig) -> str:
    """`cfg=1.5 tau=1.2`: what differs from the start."""
    before = start.model_dump()
    changed = {name: value for name, value in options.model_dump().items() if value != before[name]}
    return " ".join(f"{name}={value}" for name, value in changed.items()) or "as recorded"


def tune_sampling(
    ckpt: Path,
    out: Path | None = None,
    *,
    samples: int = 500,
    budget: int = 24,
    seed: int = 1,
    ref: str | None = None,
    extractor: Path | None = None,
    weights: Path | None = None,
    device: str = "auto",
) -> Result:
    """Search for the options of the smallest Fréchet distance, and write a checkpoint that has them as its defaults.

    All candidates draw the same samples' noise, so that differences are those of the options. Same weights, config and
    digest; the search is noted in the new file's provenance. Finished candidates are kept beside it until it is there.
    """
    runs.need_generator(ckpt)
    out = out or ckpt.with_name(f"{ckpt.stem}-tuned.pt")
    if out.exists():
        raise UsageError(f"{out} is there already", "name another file with --out, or remove it")
    files.check_folder(out.absolute().parent)
    from rdpm_cli import modelfile
    from rdpm_cli.generator import model, transformer
    from rdpm_cli.training.distributed import pick_device

    loaded, content = model.load(ckpt), modelfile.load(ckpt, model.KIND)
    chosen = pick_device(device)
    metric, notes, score = _ruler(loaded.to(chosen), ckpt, samples, seed, ref, extractor, weights, chosen)
    plan = {**metric, "n": samples, "seed": seed, "checkpoint": loaded.digest}
    tried = Tried(out.with_name(f"{out.name}.tried.json"), {**plan, "start": loaded.sampling.model_dump(mode="json")})
    with (
        transformer.remembering(transformer.trunk_of(loaded.generator.network)),
        progress.Bar("tune", budget, "candidates") as bar,
    ):

        def watched(options: SamplingConfig) -> float | None:
            value = tried.score(options, score)
            if value is not None:
                bar.advance(1, f"{differing(options, loaded.sampling)}: {value:.4g}")
            return value

        search = Search(watched, budget)
        best = search.run(loaded.sampling)
    facts = {**metric, "n": samples, "seed": seed, "notes": [NOTE, *notes], "tried": search.found}
    provenance = {**content["provenance"], "tuned": {**facts, **versions()}}
    modelfile.save(out, {**content, "sampling": best.model_dump(mode="json"), "provenance": provenance})
    tried.done()
    ordered = dict(sorted(search.found.items(), key=lambda row: row[1]))
    values = {"generator": str(out), "digest": loaded.digest, **facts, "tried": ordered}
    values |= {"best": differing(best, loaded.sampling), "value": search.value, "before": search.found["as recorded"]}
    following = (
        f"rdpm sample --ckpt {out} --seed {seed + 1} --classes all --per-class 50, then rdpm eval fid: the score"
    )
    return Result("sampling tuned", values, following)


def _ruler(
    loaded: LoadedGenerator,
    ckpt: Path,
    samples: int,
    seed: int,
    ref: str | None,
    extractor: Path | None,
    weights: Path | None,
    device: torch.device,
) -> tuple[dict[str, Any], list[str], Callable[[SamplingConfig], float | None]]:
    """What is measured, notes on it, and the measurement of options. Features of the reference are computed once."""
    from rdpm_cli.evaluation import features, metrics, reference, scores
    from rdpm_cli.generator.contract import SampleOptions

    eye = features.make_extractor(extractor, weights, device)
    size = loaded.tokenizer.cfg.autoencoder.resolution
    origin = {"reference": loaded.provenance.get("reference")}
    names = loaded.class_names
    drawn = reference.ImageSet(str(ckpt), samples, size, None, names, lambda pieces: iter(()), origin=origin)
    against_images = reference.open_reference(ref, drawn)
    against = metrics.statistics(features.collect(eye, against_images.batches).features_ND)
    labels = drawing.spread_labels(samples, len(names))

    def score(options: SamplingConfig) -> float | None:
        chosen = SampleOptions(options, seed)
        try:
            type(options).model_validate(options.model_dump())
            loaded.generator.check(chosen)
        except (ValueError, RecipeError, UsageError):
            return None
        found = drawing.features_of(eye, loaded.generator, loaded.tokenizer, labels, chosen, device)
        return float(metrics.frechet_distance(metrics.statistics(found.features_ND), against))

    told = {
        "metric": "frechet_distance",
        "extractor": {"name": eye.name, "sha256": eye.sha256},
        "reference": against_images.name,
    }
    return told, scores.rank_notes(samples, len(against.mean_D), "features"), score

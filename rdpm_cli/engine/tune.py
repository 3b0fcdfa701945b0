"""tune-sampling: a small search over a checkpoint's sampling options -> a checkpoint with the best as its defaults."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from rdpm_cli import checkpoint, files, progress
from rdpm_cli.data.folder import ImageSet
from rdpm_cli.device import pick_device
from rdpm_cli.engine.score import Ruler
from rdpm_cli.errors import RecipeError, UsageError
from rdpm_cli.evaluation import features, metrics, reference, score
from rdpm_cli.evaluation.features import Extractor
from rdpm_cli.generator import registry, sampler
from rdpm_cli.generator.config import SamplingConfig
from rdpm_cli.generator.contract import SampleOptions
from rdpm_cli.generator.registry import LoadedGenerator
from rdpm_cli.runs import Result, versions

NOTE = "one seed and few samples: this compares options and is not a score to report"
Measure = Callable[[SamplingConfig], float | None]  # smaller is better; None for options that cannot be used


class Search:
    """One field after the other, each of its values with the others at their best, until nothing improves.

    Each set of options is measured once, and `budget` sets at most. Every value goes into `path` at once, so that a
    search that was interrupted continues: a value that is there is not measured again.
    """

    def __init__(self, start: SamplingConfig, measure: Measure, budget: int, path: Path, plan: dict[str, Any]) -> None:
        """plan: everything else that a value depends on. Raises UsageError if the file is of another plan."""
        self.start, self.measure, self.budget = start, measure, budget
        self.path, self.content = path, {"plan": plan, "values": {}}
        if path.is_file():
            self.content = files.read_json(path)
            if changed := files.differences(self.content["plan"], plan):
                hint = "remove it, or name another file with --out"
                raise UsageError(f"{path} belongs to another search: {'; '.join(changed[:4])}", hint)
            progress.say(f"{len(self.content['values'])} candidates are there from an earlier run, in {path}")
        self.visited: set[str] = set()
        self.tried: dict[str, float] = {}  # by what differs from the start
        self.best, self.value = start, float("inf")

    def run(self) -> SamplingConfig:
        """The best options."""
        with progress.Bar("tune", self.budget, "candidates") as self.bar:
            self._improves(self.start)
            improved = True
            while improved and self.budget > 0:
                improved = False
                for options in self._neighbours():
                    improved |= self._improves(options)
        return self.best

    def _neighbours(self) -> Iterator[SamplingConfig]:
        """Options that differ from the best so far in one field."""
        for name, values in type(self.start).search.items():
            for value in values:
                if not (name.startswith("cfg_") and self.best.cfg == 0):  # without guidance its schedule has no effect
                    yield self.best.model_copy(update={name: value})

    def _improves(self, options: SamplingConfig) -> bool:
        """Whether the options are better than all before them, as far as the budget lets them be measured."""
        key, values = options.model_dump_json(), self.content["values"]
        if key in self.visited or self.budget <= 0:
            return False
        self.visited.add(key)
        if key not in values:
            values[key] = self.measure(options)
            files.write_json(self.path, self.content)
        value: float | None = values[key]
        if value is None:
            return False
        self.budget -= 1
        self.tried[differing(options, self.start)] = value
        self.bar.advance(1, f"{differing(options, self.start)}: {value:.4g}")
        if value >= self.value:
            return False
        self.best, self.value = options, value
        return True


def differing(options: SamplingConfig, start: SamplingConfig) -> str:
    """`cfg=1.5 tau=1.2`: the fields that differ from the start."""
    recorded = start.model_dump()
    changed = {name: value for name, value in options.model_dump().items() if value != recorded[name]}
    return " ".join(f"{name}={value}" for name, value in changed.items()) or "as recorded"


def tune_sampling(
    ckpt: Path,
    out: Path | None = None,
    *,
    samples: int = 500,
    budget: int = 24,
    seed: int = 1,
    ref: str | None = None,
    ruler: Ruler | None = None,
    device: str = "auto",
) -> Result:
    """Search for the options of the smallest Fréchet distance, and write a checkpoint that has them as its defaults.

    All candidates draw under the same noise, so that differences are those of the options. Weights, config and digest
    stay the same; the search is noted in the new file's provenance.
    """
    out = out or ckpt.with_name(f"{ckpt.stem}-tuned.pt")
    if out.exists():
        raise UsageError(f"{out} exists already", "name another file with --out, or remove it")
    content, picked = checkpoint.load(ckpt, registry.KIND), pick_device(device)
    loaded = registry.load(ckpt).to(picked)
    extractor = (ruler or Ruler()).open(picked)
    target = _reference(loaded, ckpt, samples, ref)
    metric = {
        "metric": "frechet_distance",
        "extractor": {"name": extractor.name, "sha256": extractor.sha256},
        "reference": target.name,
        "n": samples,
        "seed": seed,
    }
    plan = {**metric, "checkpoint": loaded.digest, "start": loaded.sampling.model_dump(mode="json")}
    measure = _measure(loaded, extractor, target, samples, seed, picked)
    search = Search(loaded.sampling, measure, budget, out.with_name(f"{out.name}.tried.json"), plan)
    best = search.run()
    facts = {**metric, "notes": [NOTE, *score.rank_notes(samples, extractor.width, "features")], "tried": search.tried}
    provenance = {**content["provenance"], "tuned": {**facts, **versions()}}
    checkpoint.save(out, {**content, "sampling": best.model_dump(mode="json"), "provenance": provenance})
    search.path.unlink()
    ordered = dict(sorted(search.tried.items(), key=lambda item: item[1]))
    values = {"generator": str(out), "digest": loaded.digest, **facts, "tried": ordered}
    values |= {"best": differing(best, loaded.sampling), "value": search.value, "before": search.tried["as recorded"]}
    command = f"rdpm sample --ckpt {out} --seed {seed + 1} --classes all --per-class 50, then rdpm eval fid: the score"
    return Result("sampling tuned", values, command)


def _reference(loaded: LoadedGenerator, ckpt: Path, samples: int, ref: str | None) -> ImageSet:
    """The images of `ref`, else those that the checkpoint records."""
    size, origin = loaded.tokenizer.cfg.autoencoder.resolution, {"reference": loaded.provenance.get("reference")}
    drawn = ImageSet(str(ckpt), samples, size, None, loaded.class_names, lambda pieces: iter(()), origin)
    return reference.open_reference(ref, drawn)


def _measure(
    loaded: LoadedGenerator, extractor: Extractor, target: ImageSet, samples: int, seed: int, device: torch.device
) -> Measure:
    """The Fréchet distance of samples under some options. The features of the reference are computed once."""
    statistics = metrics.statistics(features.collect(extractor, target).features_ND)
    labels = [index * len(loaded.class_names) // samples for index in range(samples)]  # balanced

    def measure(candidate: SamplingConfig) -> float | None:
        options = SampleOptions(candidate, seed)
        try:
            type(candidate).model_validate(candidate.model_dump())
            loaded.generator.check(options)
        except (ValueError, RecipeError, UsageError):  # fields that do not go together
            return None
        micro_batch = candidate.images_at_once(device.type)
        drawn = sampler.sample(loaded.generator, loaded.tokenizer, labels, options, micro_batch)
        sampled = features.collect(extractor, (part.pixels_BHWC for part in drawn))
        return metrics.frechet_distance(metrics.statistics(sampled.features_ND), statistics)

    return measure

"""tune-sampling: a small search over a checkpoint's sampling options -> a checkpoint with the best as its defaults."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rdpm_cli import checkpoint, files, progress
from rdpm_cli.data.folder import ImageSet
from rdpm_cli.distributed import process_group
from rdpm_cli.errors import RecipeError, UsageError, rdpm_command
from rdpm_cli.evaluation import score
from rdpm_cli.evaluation.backbones import open_extractor
from rdpm_cli.evaluation.features import Extractor, collect
from rdpm_cli.evaluation.metrics import frechet_distance, statistics
from rdpm_cli.evaluation.reference import Reference, open_reference
from rdpm_cli.generator import registry, sampler
from rdpm_cli.generator.config import SamplingConfig
from rdpm_cli.generator.contract import SampleOptions
from rdpm_cli.generator.registry import LoadedGenerator
from rdpm_cli.runs import Result, versions

NOTE = "one seed and few samples: this compares options and is not a score to report"
Measure = Callable[[SamplingConfig], float | None]  # smaller is better; None for options that cannot be used


class Search:
    """One field after the other, each of its values with the others at their best, until nothing improves.

    `budget` sets of options are measured at most, each once: a search that was interrupted reads its values in `path`.
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
        self.visited, self.tried = set[str](), dict[str, float]()  # tried: value by what differs from the start
        self.best, self.value = start, float("inf")

    def run(self) -> SamplingConfig:
        """The best options."""
        with progress.Bar("tune", self.budget, "candidates") as bar:
            improved = self._improves(self.start, bar)
            while improved and self.budget > 0:
                improved = False
                for name, values in type(self.start).search.items():
                    for value in values:
                        # without guidance its schedule has no effect
                        if not (name.startswith("cfg_") and self.best.cfg == 0):
                            improved |= self._improves(self.best.model_copy(update={name: value}), bar)
        return self.best

    def _improves(self, options: SamplingConfig, bar: progress.Bar) -> bool:
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
        bar.advance(1, f"{differing(options, self.start)}: {value:.4g}")
        if better := value < self.value:
            self.best, self.value = options, value
        return better


def differing(options: SamplingConfig, start: SamplingConfig) -> str:
    """`cfg=1.5 tau=1.2`: the fields that differ from the start."""
    fields = options.model_dump().items()
    return " ".join(f"{name}={value}" for name, value in fields if value != getattr(start, name)) or "as recorded"


def tune_sampling(
    ckpt: Path, out: Path | None = None, *, samples: int = 500, budget: int = 24, seed: int = 1, ref: str | None = None,
    extractor: str | Path | None = None, weights: Path | None = None, device: str = "auto",
    reading: dict[str, Any] | None = None,
) -> Result:  # fmt: skip
    """Search for the options of the smallest Fréchet distance, and write a checkpoint that has them as its defaults."""
    out = out or ckpt.with_name(f"{ckpt.stem}-tuned.pt")
    if out.exists():
        raise UsageError(f"{out} exists already", "name another file with --out, or remove it")
    with process_group(device) as picked:
        content = checkpoint.load(ckpt, registry.KIND)
        loaded = registry.unpack(content, str(ckpt)).to(picked)
    loaded.check(SampleOptions(loaded.sampling, seed))
    size, opened = loaded.tokenizer.cfg.autoencoder.resolution, open_extractor(extractor, weights, picked)
    recorded = {"reference": loaded.provenance.get("reference")}
    drawn = ImageSet(str(ckpt), samples, size, None, loaded.class_names, lambda pieces: iter(()), recorded)
    reference = open_reference(ref, drawn, opened, reading)
    facts = {
        "metric": "frechet_distance", "extractor": {"name": opened.name, "sha256": opened.sha256},
        "reference": reference.name, "n": samples, "seed": seed,
    }  # fmt: skip
    plan = {**facts, "checkpoint": loaded.digest, "start": loaded.sampling.model_dump(mode="json")}
    measure = _measure(loaded, opened, reference, samples, seed)
    search = Search(loaded.sampling, measure, budget, out.with_name(f"{out.name}.tried.json"), plan)
    best = search.run()
    facts |= {"notes": [NOTE, *score.rank_notes(samples, opened.width)], "tried": search.tried}
    provenance = {**content["provenance"], "tuned": {**facts, **versions()}}
    checkpoint.save(out, {**content, "sampling": best.model_dump(mode="json"), "provenance": provenance})
    search.path.unlink()
    values = {
        "generator": str(out), "digest": loaded.digest, **facts,
        "tried": dict(sorted(search.tried.items(), key=lambda item: item[1])),
        "best": differing(best, loaded.sampling), "value": search.value, "before": search.tried["as recorded"],
    }  # fmt: skip
    command = rdpm_command("sample", "--ckpt", out, "--seed", seed + 1, "--per-class", 50)
    return Result("sampling tuned", values, f"{command} && rdpm eval fid samples")


def _measure(
    loaded: LoadedGenerator, extractor: Extractor, reference: ImageSet | Reference, samples: int, seed: int
) -> Measure:
    """The Fréchet distance of samples under some options, all under the same noise."""
    if isinstance(reference, Reference):
        target = reference.pool
    else:
        target = statistics(collect(extractor, reference).features_ND)
    labels = [index * len(loaded.class_names) // samples for index in range(samples)]  # balanced

    def measure(candidate: SamplingConfig) -> float | None:
        options = SampleOptions(candidate, seed)
        try:
            type(candidate).model_validate(candidate.model_dump())
            loaded.check(options)
        except (ValueError, RecipeError, UsageError):  # fields that do not go together
            return None
        micro_batch = candidate.images_at_once(extractor.device.type)
        drawn = sampler.sample(loaded.generator, loaded.tokenizer, labels, options, micro_batch)
        features = collect(extractor, (part.pixels_BHWC for part in drawn))
        return frechet_distance(statistics(features.features_ND), target)

    return measure

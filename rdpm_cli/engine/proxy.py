"""The proxy score: the Fréchet distance of a few samples while a generator trains (config.ProxyConfig)."""

from functools import cache
from pathlib import Path
from typing import Any

import torch

from rdpm_cli.codes.manifest import Manifest
from rdpm_cli.config import GeneratorConfig, ProxyConfig
from rdpm_cli.engine import drawing, observers, pictures
from rdpm_cli.evaluation import features, metrics, reference, scores
from rdpm_cli.evaluation.features import Extractor
from rdpm_cli.evaluation.metrics import Statistics
from rdpm_cli.evaluation.reference import ImageSet
from rdpm_cli.generator.contract import Generator, SampleOptions
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.training.loop import Observer, Run

REFERENCES = 10_000  # images of the store's data at most, evenly spaced


def check(cfg: ProxyConfig, m: Manifest, store: Path) -> None:
    """Look up extractor and reference, before a run folder is claimed. Raises DataError and CheckpointError."""
    _extractor(cfg, torch.device("cpu"))
    _reference(m, store)


def score(generator: Generator, tokenizer: Tokenizer, cfg: GeneratorConfig, m: Manifest, store: Path) -> Observer:
    """`proxy/frechet_distance`, and `proxy/class_accuracy` where a judge knows the classes; of the averaged weights."""
    options = SampleOptions(cfg.sampling)
    labels = drawing.spread_labels(cfg.proxy.samples, len(m.class_names))

    @cache
    def ruler(device: torch.device) -> tuple[Extractor, Statistics]:
        extractor = _extractor(cfg.proxy, device)
        return extractor, metrics.statistics(features.collect(extractor, _reference(m, store).batches).features_ND)

    def observe(run: Run, logs: dict[str, float] | None) -> dict[str, Any] | None:
        if not observers.due(run, cfg.train):
            return None
        extractor, against = ruler(run.device)
        with observers.as_kept(generator, run):
            found = drawing.features_of(extractor, generator, tokenizer, labels, options, run.device)
        names = list(m.class_names)
        accuracy = scores.class_accuracy(extractor, labels, names, found.predicted_N)
        distance = metrics.frechet_distance(metrics.statistics(found.features_ND), against)
        return {"proxy/frechet_distance": distance} | ({} if accuracy is None else {"proxy/class_accuracy": accuracy})

    return observe


def _extractor(cfg: ProxyConfig, device: torch.device) -> Extractor:
    judge, weights = (Path(name) if name else None for name in (cfg.extractor, cfg.weights))
    return features.make_extractor(judge, weights, device)


def _reference(m: Manifest, store: Path) -> ImageSet:
    hint = "go on without the score by proxy.samples=0"
    return reference.open_recorded(pictures.store_reference(store, m), str(store), hint, REFERENCES)

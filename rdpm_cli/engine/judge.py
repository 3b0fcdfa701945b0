"""eval judge: the training of a judge."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rdpm_cli import checkpoint, progress
from rdpm_cli.data.audio import AudioSource, open_audio
from rdpm_cli.data.open import check_output, open_source
from rdpm_cli.data.source import Source
from rdpm_cli.engine.train import Training, recipe_settings, train_once
from rdpm_cli.errors import DataError, UsageError, rdpm_command
from rdpm_cli.evaluation import judge, speech_judge
from rdpm_cli.evaluation.judge import JudgeConfig
from rdpm_cli.evaluation.reference import crop_side
from rdpm_cli.evaluation.speech_judge import SpeechBatches, SpeechJudge, SpeechJudgeConfig, SpeechJudgeTask
from rdpm_cli.recipes import Recipe, load_recipe
from rdpm_cli.runs import Result, versions
from rdpm_cli.training.log import last_metrics


def eval_judge(
    images: str, out: Path, recipe: str = "judge", overrides: Sequence[str] = (), *, heldout: str | None = None,
    resolution: int | None = None, device: str = "auto", reading: dict[str, Any] | None = None,
) -> Result:  # fmt: skip
    """A classifier of real images -> OUT/judge.pt, with its accuracy on `heldout` or a tenth of them. Resumes OUT.

    By a recipe whose judge section is one of sound: a recogniser of words and speakers."""
    loaded = load_recipe(recipe, overrides, "judge")
    cfg = loaded.judge
    assert cfg
    if out.suffix == ".pt":
        raise UsageError(f"{out} is not a run folder", f"give {out.with_suffix('')}; judge.pt is written into it")
    check_output(out, images)
    if isinstance(cfg, SpeechJudgeConfig):
        if resolution:
            raise UsageError("--resolution is for images", "leave it out")
        return _speech_judge(images, out / "judge.pt", loaded, heldout, device, reading or {})
    whole, final = open_source(images, **(reading or {})), out / "judge.pt"
    source, unseen = judge.split(whole) if heldout is None else (whole, open_source(heldout, **(reading or {})))
    for part in (source, unseen):
        part.need_labels()
    if source.class_names != unseen.class_names:
        hint = "hold out images of the same class folders"
        raise DataError(f"{unseen.spec} has other classes than {source.spec}", hint)
    of_recipe = loaded.tokenizer.autoencoder.resolution if loaded.tokenizer else None
    size = resolution or of_recipe or crop_side(source, unseen)
    data = {**source.record(), "resolution": size}
    data |= {"heldout": unseen.spec, "heldout_digest": unseen.digest()}
    settings = {"command": "train-judge", "recipe": recipe_settings(loaded, "judge"), "data": data}
    train_once(final, loaded.seed, settings, device, partial(_train, source, unseen, cfg, size))
    _, content = judge.load(final)
    values = {"judge": str(final), "digest": content["digest"], "resolution": size, "images": len(source)}
    measured = ("heldout", "heldout_images", "heldout_accuracy", "factor_errors")
    values |= {name: content["provenance"][name] for name in measured if name in content["provenance"]}
    values |= {f"train_{name}": value for name, value in last_metrics(out, ["loss", "accuracy"]).items()}
    return Result("judge trained", values, rdpm_command("eval", "fid", "samples/", "--extractor", final))


def _train(source: Source, unseen: Source, cfg: JudgeConfig, size: int, training: Training) -> dict[str, Any]:
    """Train and measure a judge. -> the content of its file."""
    has_factors = source.factors is not None
    network = judge.Judge(size, cfg.width, cfg.features, len(source.class_names), cfg.blocks, has_factors)
    progress.say(f"{len(source):,} images, {len(source.class_names):,} classes, {size}×{size}")
    batches = judge.JudgeBatches(source, cfg, size, training.seed)
    task = judge.JudgeTask(network.to(training.device).train())
    trained = training.fit([task], batches, cfg.train, len(source))
    assert isinstance(trained, judge.Judge)
    measured = judge.measure(trained.eval(), unseen, training.device)
    provenance = {
        "data": source.spec, "heldout": unseen.spec, **measured, "heldout_images": len(unseen),
        "recipe": cfg.model_dump(mode="json"), "digest": source.digest(), **versions(),
    }  # fmt: skip
    return checkpoint.pack(judge.KIND, trained.config, trained, class_names=source.class_names, provenance=provenance)


@dataclass
class Recordings:
    """The recordings of a source that a judge of speech trains on, or is measured on."""

    source: AudioSource
    indices: list[int]


def _speech_judge(
    spec: str, final: Path, loaded: Recipe, heldout: str | None, device: str, reading: dict[str, Any]
) -> Result:
    """A recogniser of the words and speakers of real recordings."""
    cfg, whole = loaded.judge, open_audio(spec, **reading)
    assert isinstance(cfg, SpeechJudgeConfig)
    if heldout is None:
        seen, unseen = (Recordings(whole, indices) for indices in judge.split_indices(whole))
    else:
        other = open_audio(heldout, **reading)
        seen, unseen = (Recordings(source, list(range(len(source)))) for source in (whole, other))
    untrained = speech_judge.make_judge(cfg, seen.source)
    speech_judge.check_known(untrained, unseen.source, unseen.indices)
    data = {**whole.record(), "heldout": unseen.source.spec, "heldout_digest": unseen.source.digest()}
    settings = {"command": "train-judge", "recipe": recipe_settings(loaded, "judge"), "data": data}
    train_once(final, loaded.seed, settings, device, partial(_train_speech, seen, unseen, cfg))
    _, content = speech_judge.load(final)
    provenance, config = content["provenance"], content["config"]
    values = {"judge": str(final), "digest": content["digest"], "features": config["features"]}
    values |= {"words": len(config["words"]), "speakers": len(config["speakers"]), "recordings": len(seen.indices)}
    values |= {name: value for name, value in provenance.items() if name.startswith("heldout")}
    metrics = last_metrics(final.parent, ["loss", "ctc", "speaker_accuracy"])
    values |= {f"train_{name}": value for name, value in metrics.items()}
    return Result("judge trained", values, rdpm_command("eval", "speech", "samples/", "--judge", final))


def _train_speech(seen: Recordings, unseen: Recordings, cfg: SpeechJudgeConfig, training: Training) -> dict[str, Any]:
    """Train and measure a judge of speech. -> the content of its file."""
    network = speech_judge.make_judge(cfg, seen.source)
    batches = SpeechBatches(seen.source, seen.indices, network, cfg.train.batch, training.seed)
    network.scale.measure(batches.batch_at(0, range(min(cfg.train.batch, len(seen.indices)))).x_BMF)
    words, speakers = len(network.words), len(network.speaker_names)
    progress.say(f"{len(seen.indices):,} recordings, {words:,} words, {speakers} speakers")
    task = SpeechJudgeTask(network.to(training.device).train())
    trained = training.fit([task], batches, cfg.train, len(seen.indices))
    assert isinstance(trained, SpeechJudge)
    measured = speech_judge.measure(trained.eval(), unseen.source, unseen.indices)
    provenance = {
        "data": seen.source.spec, "heldout": unseen.source.spec, **measured, "heldout_recordings": len(unseen.indices),
        "recipe": cfg.model_dump(mode="json"), "digest": seen.source.digest(), **versions(),
    }  # fmt: skip
    names = list(trained.words)
    return checkpoint.pack(speech_judge.KIND, trained.config, trained, class_names=names, provenance=provenance)

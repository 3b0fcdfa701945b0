"""The subcommands of `rdpm eval`. --help needs no engine, and so no torch."""

import functools
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rdpm_cli.cli import app as cli
from rdpm_cli.cli.app import READING, app, command
from rdpm_cli.errors import UsageError

evaluation = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Scores that record how they were computed.")
app.add_typer(evaluation, name="eval")

# Options that the commands share, by their names in cli.SHARED.
JUDGE = "overrides seed resolution print_config gpus device"
SCORING = "extractor weights download gpus device"

METRICS = {
    "fid": "Fréchet distance to a reference: Inception by default, never silently another extractor.",
    "sfid": "Fréchet distance of spatial features (sFID), which only Inception has.",
    "is": "Inception Score: ADM's mean over splits of 5,000 images, and an order-free value; needs no reference.",
    "pr": "Precision and recall of the 3-nearest-neighbour manifolds, exact.",
    "dc": "Density and coverage of the reference's 5-nearest-neighbour balls, exact.",
    "kid": "Kernel distance (KID), with its spread over subsets.",
    "mind": "Sliced Wasserstein distance of as many images of either side (MIND).",
    "cmmd": "Maximum mean discrepancy of unit features (CMMD, whose extractor is clip).",
    "fd-infinity": "Fréchet distance extrapolated to infinitely many images.",
    "fdr": "Fréchet distance over that of held-out images (FDr), averaged over extractors: --extractor A,B,C.",
    "all": "Every score of images, from one pass over them.",
}


Arguments = Annotated[list[str] | None, typer.Argument(metavar="TARGET|[KEY=VALUE]...", help="to score")]


def evaluate(
    metric: str,
    arguments: Arguments = None,
    ckpt: Annotated[Path | None, cli.CKPT] = None,
    seed: Annotated[int | None, cli.SEED] = None,
    seeds: cli.Seeds = 1,
    heldout: cli.Heldout = None,
    features: Annotated[Path | None, typer.Option(metavar="FILE.npz", help="save activations, or reuse")] = None,
    subset: Annotated[int | None, typer.Option(min=2, help="fid: mean over balanced subsets of N images")] = None,
    ci: Annotated[bool, typer.Option("--ci", help="fid, is: 95% intervals, by leaving images out")] = False,
    dtype_cut: cli.DtypeCut = "round",
    **shared: Any,
) -> cli.Result:
    """With --ckpt instead of TARGET the samples are drawn without files in between, as --classes, --per-class, --seed,
    --preset and any sampling option as KEY=VALUE say. With --seeds each score is its mean over the samples of several
    seeds, next to its standard deviation; details of one set, such as its spread over splits, are left out."""
    from rdpm_cli.engine import score

    if seeds > 1 and (features or subset or ci):
        raise UsageError("--features, --subset and --ci are for samples of one seed", "leave --seeds out")
    target = to_score(arguments or [], ckpt, seed, seeds, dtype_cut, shared)
    return score.eval_images(metric, target, heldout=heldout, features=features, subset=subset, ci=ci, **shared)


def to_score(
    arguments: list[str], ckpt: Path | None, seed: int | None, seeds: int, dtype_cut: cli.DtypeCut,
    shared: dict[str, Any],
) -> Any:  # fmt: skip
    """TARGET, or what draws the samples of --ckpt; takes the options of drawing out of `shared`. Raises UsageError."""
    classes, per_class, preset = (shared.pop(name) for name in ("classes", "per_class", "preset"))
    if ckpt is not None:
        from rdpm_cli.engine import sample

        sample_seeds = range(seed or 0, (seed or 0) + seeds)
        options = tuple(arguments)
        return sample.Drawn(ckpt, classes, per_class, sample_seeds, options, preset, dtype_cut).sets
    drawing = {
        "--classes": classes != "all", "--per-class": per_class != 8, "--seed": seed, "--seeds": seeds > 1,
        "--preset": preset, "--dtype-cut": dtype_cut != "round",
    }  # fmt: skip
    words = [*arguments, *(name for name, value in drawing.items() if value)]
    if not arguments or len(words) > 1:  # ignoring some of them would score other samples than those asked for
        raise UsageError(f"expected one TARGET, got {' '.join(words) or 'none'}", "the other options belong to --ckpt")
    return arguments[0]


for _metric, _summary in METRICS.items():
    _score = functools.partial(evaluate, _metric.replace("-", "_"))
    _score.__doc__ = f"{_summary}\n\n    {evaluate.__doc__}"
    _example = f"eval {_metric} samples/" + ("" if _metric == "is" else " --ref reference.npz")
    _example += " --heldout imagenet/val" if _metric == "fdr" else ""
    command(evaluation, _example, f"classes per_class preset ref resolution {SCORING} {READING}", name=_metric)(_score)


@command(
    evaluation, "eval memory samples/ --ref imagenet/train --heldout imagenet/val --sheet pairs.png",
    f"classes per_class preset ref resolution {SCORING} {READING}",
)  # fmt: skip
def memory(
    arguments: Arguments = None,
    ckpt: Annotated[Path | None, cli.CKPT] = None,
    seed: Annotated[int | None, cli.SEED] = None,
    heldout: cli.Heldout = None,
    sheet: Annotated[Path | None, typer.Option(metavar="FILE.png", help="picture of the closest pairs")] = None,
    codes: cli.Codes = None,
    **shared: Any,
) -> cli.Result:
    """Whether TARGET, or the samples of --ckpt, are copies of the training images, which --ref names.

    `near_copies`: share of samples at most a third as far from the nearest training image as from the second nearest,
    by their pixels. `authpct`: share that is farther from its nearest training image than that is from the others, by
    features. Only next to the same shares of --heldout, images that were not trained on, do they mean anything.
    `recalled`, with --codes: share of training images that --ckpt draws again under the noise of their codes;
    `recalled_unseen`: under noise that it has not seen."""
    from rdpm_cli.engine import memory as engine

    if codes and not ckpt:
        raise UsageError("--codes is for the samples of a checkpoint", "give --ckpt instead of TARGET")
    replay = engine.Replay(ckpt, codes, tuple(arguments or ()), shared["preset"]) if ckpt and codes else None
    target = to_score(arguments or [], ckpt, seed, 1, "round", shared)
    return engine.eval_memory(target, heldout=heldout, sheet=sheet, replay=replay, **shared)


@command(evaluation, "eval reference imagenet/ ref.npz", f"resolution {SCORING} {READING}")
def reference(
    images: cli.Images,
    out: Annotated[Path, typer.Argument(metavar="REF.npz", help="the file to write")],
    features: Annotated[int, typer.Option(min=4, help="images whose features it holds")] = 10_000,
    **shared: Any,
) -> cli.Result:
    """Statistics of IMAGES, cropped as in training, as an .npz for --ref that records its extractor."""
    from rdpm_cli.engine import score

    return score.eval_reference(images, out, features=features, **shared)


@command(evaluation, "eval recon digits:heldout --seeds 4", f"tokenizer limit {SCORING} {READING}")
def recon(
    images: cli.Images,
    seed: cli.Seed = 0,
    seeds: cli.Seeds = 4,
    lpips_alex: Annotated[Path | None, typer.Option(metavar="FILE", help="AlexNet weight file, for LPIPS")] = None,
    lpips_vgg: Annotated[Path | None, typer.Option(metavar="FILE", help="VGG16 weight file, for LPIPS")] = None,
    perturb: Annotated[float, typer.Option(metavar="SHARE", min=0, max=1, help="of codes, replaced by neighbours")] = 0,
    dtype_cut: cli.DtypeCut = "round",
    **shared: Any,
) -> cli.Result:
    """rFID, PSNR, SSIM, LPIPS, MSE and latent error of reconstructions, with their spread over noise seeds.

    `continuous` are those of z itself, not quantised. rFID is that of the first seed. It and LPIPS need weights: if
    they are absent, the score is left out and names the file it needs. With --perturb the rFID is a pFID: a generator's
    errors are imitated, by codes near the right ones."""
    from rdpm_cli.engine import recon as engine

    return engine.eval_recon(
        images, seed=seed, seeds=seeds, lpips={"alex": lpips_alex, "vgg": lpips_vgg}, perturb=perturb, cut=dtype_cut,
        **shared,
    )  # fmt: skip


@command(
    evaluation, "eval baselines digits --heldout digits:heldout --extractor runs/judge/judge.pt",
    f"tokenizer ref resolution {SCORING} {READING}",
)  # fmt: skip
def baselines(
    images: cli.Images,
    heldout: cli.Heldout = None,
    codes: cli.Codes = None,
    per_class: Annotated[int, cli.PER_CLASS] = 80,
    seed: cli.Seed = 0,
    seeds: cli.Seeds = 5,
    **shared: Any,
) -> cli.Result:
    """Scores that need no generator: a Gaussian a class on 64 principal components of the pixels, IMAGES drawn again,
    their reconstructions, and held-out images. Mean and standard deviation over sample seeds.

    Scores by which the Gaussian is as good as a generator do not rank generators. The reference is IMAGES unless --ref
    names another. Reconstructions need a tokenizer; they are of the held-out images where there are any. With --codes
    the tokenizer is the store's, and `linear` has samples of train-gen's linear baseline, a floor for generators."""
    from rdpm_cli.engine import baselines as engine

    sample_seeds = range(seed, seed + seeds)
    return engine.eval_baselines(
        images, heldout=heldout, codes=codes, per_class=per_class, seeds=sample_seeds, **shared
    )  # fmt: skip


@command(evaluation, "eval judge cifar10-train.zip runs/judge width=64", f"{JUDGE} {READING}", section="judge")
def judge(
    images: cli.Images,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="run folder; the judge is OUT/judge.pt")],
    heldout: cli.Heldout = None,
    recipe: cli.Recipe = "judge",
    **shared: Any,
) -> cli.Result:
    """Train a small classifier of IMAGES that scores samples where Inception says little.

    Without --heldout a tenth of the images is held out.
    Its accuracy on held-out images is in its file and next to every score it makes. The same command again resumes."""
    from rdpm_cli.engine import judge as engine

    return engine.eval_judge(images, out, recipe, heldout=heldout, **shared)


@command(
    evaluation,
    "eval speech samples/ --judge runs/judge/judge.pt",
    f"asr speaker tokenizer vocoder limit device {READING}",
)
def speech(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="recordings with texts, or samples of sound")],
    judge: cli.Judge = None,
    **shared: Any,
) -> cli.Result:
    """Scores of TARGET: error rates of words and characters, speaker accuracy, similarity of the voice to that of the
    prompt (SIM-o: the original, SIM-r: as decoded), Fréchet distance of the judge's features to real recordings.

    The judge is one that `rdpm eval judge` trained on recordings; --asr and --speaker together do without it. Papers
    take hubert-ctc and wavlm-tdnn. With --tokenizer, which has no default here,
    recordings are passed through it and a vocoder: scores of these, and mel distance, PESQ and STOI."""
    from rdpm_cli.engine import speech_scores as engine

    return engine.eval_speech(target, judge, **shared)


@command(
    evaluation,
    "eval tts generator.pt LibriSpeech/test-clean --asr hubert-ctc:hubert_fairseq_large_ll60k_asr_ls960.pth"
    " --speaker wavlm-tdnn:wavlm_large_finetune.pth --task cross --out tts",
    f"asr speaker vocoder limit device {READING}",
)
def tts(
    ckpt: Annotated[Path, typer.Argument(metavar="CKPT", help="generator checkpoint")],
    recordings: Annotated[str, typer.Argument(metavar="RECORDINGS", help="of sentences, with texts and speakers")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="sampling: cfg=1.5")] = None,
    task: Annotated[
        Literal["continuation", "cross"], typer.Option(help="prompt: 3 s of the utterance, or of another one")
    ] = "continuation",
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder of prompts and samples")] = Path("tts"),
    seed: cli.Seed = 0,
    judge: cli.Judge = None,
    **shared: Any,
) -> cli.Result:
    """Zero-shot speech as papers test it: draw the utterances of 4 to 10 s of RECORDINGS, each in the voice of 3 s of
    sound; score them and the recordings by the same judges, next to published numbers.

    Generators with network.align=durations need to know when the words of a prompt are said, those with cross only for
    --task cross: by word_seconds of RECORDINGS, by --judge, or by --asr hubert-ctc. The same command again resumes."""
    from rdpm_cli.engine import speech_protocol as engine

    return engine.eval_tts(ckpt, recordings, out, task, settings=settings or (), judge=judge, seed=seed, **shared)


@command(evaluation, "eval report demo score.json -o report.html")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUNS...", help="runs, stores, samples, .pt and score files")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="file to write; default report.FORMAT")] = None,
    form: Annotated[str | None, typer.Option("--format", help="html, md, json; default: suffix of --out")] = None,
    title: Annotated[str | None, typer.Option(help="of the page")] = None,
) -> cli.Result:
    """One page of runs and their scores: provenance, scores, curves, pictures. It needs no network."""
    from rdpm_cli.engine import report as engine

    return engine.make_report(runs, out, form, title)

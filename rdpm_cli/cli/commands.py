"""Every subcommand, in the order of the data. --help needs no engine, and so no torch."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rdpm_cli import files
from rdpm_cli.cli import app as cli
from rdpm_cli.cli.app import READING, app, command
from rdpm_cli.errors import UsageError

evaluation = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Scores that record how they were computed.")
app.add_typer(evaluation, name="eval")

# Options that the commands share, by their names in cli.SHARED.
TRAINING = "from_weights overrides seed keep gpus track dry_run gpu utilisation print_config device"
JUDGE = "overrides seed resolution print_config gpus device"
SAMPLING = "cfg cfg_schedule tau top_k top_p skip_steps steps"
SPEECH = "text prompt prompt_text lines seconds length duration_scale sentences start end vocoder"
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


@command(app, "demo --out demo", "overrides")
def demo(
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="folder of everything it makes; default demo")] = None,
    seed: cli.Seed = 0,
    family: Annotated[Literal["rdpm", "resgen", "both"] | None, typer.Option(help="demo speech: default rdpm")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="RECORDINGS", help="demo speech: of single words, as FSDD")
    ] = None,
    **shared: Any,
) -> cli.Result:
    """From images to scores on real handwritten digits, in minutes on a CPU: train, tokenize, sample, score.

    `rdpm demo speech` does the same with spoken digits: from a text and a two-word prompt to sound and a page of it."""
    overrides = shared["overrides"]
    if overrides[:1] == ["speech"]:
        from rdpm_cli.engine import speech_demo

        return speech_demo.run(out or Path("demo-speech"), seed, family or "rdpm", data, overrides[1:])
    if family or data:
        raise UsageError("--family and --data belong to `rdpm demo speech`", "leave them out, or write demo speech")
    from rdpm_cli.engine import demo as engine

    return engine.run(out or Path("demo"), seed, **shared)


@command(app, "train-tokenizer imagenet/ train.lr=1e-4", f"{TRAINING} {READING}", section="tokenizer")
def train_tokenizer(
    images: cli.Images,
    recipe: cli.Recipe = "imagenet256-tokenizer",
    out: cli.RunFolder = None,
    **shared: Any,
) -> cli.Result:
    """Train a tokenizer on IMAGES. The same command again resumes."""
    from rdpm_cli.engine import tokenizer

    return tokenizer.train_tokenizer(images, out, recipe, **shared)


@command(app, "tokenize imagenet/ out/codes", f"tokenizer gpus engine device unlabelled {READING}")
def tokenize(
    images: cli.Images,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder of the code store")],
    views: Annotated[int, typer.Option(min=1, help="noise draws an image")] = 1,
    flip: Annotated[bool, typer.Option("--flip", help="mirror the image in every second view")] = False,
    units: Annotated[Literal["words", "bytes", "phones"] | None, typer.Option(help="kept of texts")] = None,
    align: Annotated[Path | None, typer.Option(metavar="FILE", help="judge.pt: aligns words of sound")] = None,
    split: Annotated[
        Literal["row", "speaker"], typer.Option(help="of sound: train-gen holds out recordings, or whole speakers")
    ] = "row",
    keep: Annotated[Literal["latents"] | None, typer.Option(help="store z too, for objective.noise=fresh")] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="images a shard")] = 4096,
    seed: cli.Seed = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default: one a core")] = None,
    shards: Annotated[str | None, typer.Option(metavar="A-B", help="only shards 0-99, 7 or 3,7-8; no manifest")] = None,
    finish: Annotated[bool, typer.Option("--finish", help="make no shard, write the manifest of all")] = False,
    on_bad: Annotated[Literal["stop", "skip"], typer.Option(help="stop at an unreadable item, or skip it")] = "stop",
    max_bad: Annotated[float, typer.Option(min=0, max=1, help="share that --on-bad skip may leave out")] = 0.0001,
    precision: Annotated[Literal["fp32", "bf16"] | None, typer.Option(help="on a GPU; default there: bf16")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="images a forward pass, on a GPU")] = None,
    **shared: Any,
) -> cli.Result:
    """Turn IMAGES into a store of the codes of every step. The same command again resumes.

    Processes on any machines may each make some --shards of one OUT at the same time; --finish ends it."""
    from rdpm_cli.engine import tokenizer as engine

    options = engine.StoreOptions(
        views=views, flip=flip, latents=keep is not None, seed=seed, shard_images=shard_size, precision=precision,
        micro_batch=micro_batch, text=units, split=split,
    )  # fmt: skip
    make: Callable[..., cli.Result] = engine.tokenize
    if shared.pop("engine") == "ray":
        from rdpm_cli.engine import ray_tasks

        make = ray_tasks.tokenize
    return make(
        images, out, options=options, workers=workers, shards=shards, finish=finish, on_bad=on_bad, max_bad=max_bad,
        align=align, **shared,
    )  # fmt: skip


@command(app, "reconstruct imagenet/ out/recon --limit 64", f"tokenizer vocoder limit device {READING}")
def reconstruct(
    target: Annotated[str, typer.Argument(metavar="IMAGES|CODES", help="images, or a code store to decode")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder of the PNGs")],
    seed: cli.Seed = 0,
    **shared: Any,
) -> cli.Result:
    """Pass images through the tokenizer and back: PNGs, a side-by-side grid, PSNR and SSIM."""
    from rdpm_cli.engine import tokenizer

    return tokenizer.reconstruct(target, out, seed=seed, **shared)


@command(app, "train-gen out/codes train.batch=256", f"{TRAINING} {READING}", section="generator")
def train_gen(
    codes: Annotated[Path, typer.Argument(metavar="CODES", help="code store written by rdpm tokenize")],
    recipe: cli.Recipe = "imagenet256-d16",
    out: cli.RunFolder = None,
    heldout: cli.Heldout = None,
    **shared: Any,
) -> cli.Result:
    """Train a generator on CODES. The same command again resumes.

    It is measured on the 2% of the items that are held out of CODES, and on 256 or more of --heldout."""
    from rdpm_cli.engine import generator

    return generator.train_gen(codes, out, recipe, heldout=heldout, **shared)


@command(
    app,
    "sample --ckpt d16.pt --classes 1,2,3 --cfg 1.5",
    f"classes per_class {SAMPLING} {SPEECH} preset gpus engine device",
)
def sample(
    ckpt: Annotated[Path, cli.CKPT],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="as draw=inverse")] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder of the samples")] = Path("samples"),
    seed: cli.Seed = 0,
    init: Annotated[str | None, typer.Option(metavar="IMAGE", help="edit this image: a file, or SOURCE#N")] = None,
    mask: Annotated[str | None, typer.Option(metavar="MASK", help="draw --init again where this is white")] = None,
    from_step: Annotated[int | None, typer.Option(metavar="K", help="draw --init again from step K on")] = None,
    reject: Annotated[str | None, typer.Option(metavar="keep=RATE", help="keep=0.25: the best of 4 by --judge")] = None,
    judge: cli.Judge = None,
    npz: Annotated[bool, typer.Option("--npz", help="also samples.npz, in ADM's format")] = False,
    no_png: Annotated[bool, typer.Option("--no-png", help="no PNG a sample")] = False,
    grid: Annotated[bool, typer.Option(help="labelled grid under previews/")] = True,
    gif: Annotated[bool, typer.Option("--gif", help="GIF and contact sheet of the T partial decodes")] = False,
    shard: Annotated[str, typer.Option(metavar="I/N", help="only part I of N: 1/4 to 4/4")] = "1/1",
    **shared: Any,
) -> cli.Result:
    """Draw samples. Sampling options that are left out are those recorded in the checkpoint.

    Each family has options of its own, given as KEY=VALUE. The same command again resumes. Generators of sound take
    --text and --prompt, or --list, instead of --classes; --judge aligns the words of the prompt. With --init SOUND
    --from and --to name the stretch that is drawn again."""
    from rdpm_cli.engine import sample as engine

    sampling = {name: value for name in SAMPLING.split() if (value := shared.pop(name)) is not None}
    sampling |= engine.key_values(settings or ())
    words = {name: shared.pop(name) for name in SPEECH.split()}
    by_ray, device = shared.pop("engine") == "ray", shared.pop("device")
    draw: Callable[..., cli.Result]
    if any(value != cli.SHARED[name][1] for name, value in words.items()):
        from rdpm_cli.engine import speech

        images = {
            "--classes": shared["classes"] != "all", "--per-class": shared["per_class"] != 8, "--mask": mask,
            "--from-step": from_step, "--reject": reject, "--npz": npz, "--gif": gif, "--no-png": no_png,
        }  # fmt: skip
        if unused := [name for name, value in images.items() if value]:
            raise UsageError(f"{unused[0]} is for images; --text, --prompt and --list are for sound", "leave it out")
        draw = functools.partial(
            speech.sample_words, ckpt, out, words, init, seed=seed, sampling=sampling, preset=shared["preset"],
            judge=judge,
        )  # fmt: skip
    else:
        draw = functools.partial(
            engine.sample, ckpt, out=out, seed=seed, sampling=sampling,
            outputs=engine.Outputs(png=not no_png, npz=npz, grid=grid, gif=gif),
            edit=engine.edit_options(init, mask, from_step), reject=engine.reject_options(reject, judge), **shared,
        )  # fmt: skip
    if by_ray:
        from rdpm_cli.engine import ray_tasks

        return ray_tasks.sample(draw, shard, device)
    return draw(shard=shard, device=device)


@command(app, "tune-sampling d16.pt --budget 24", f"ref extractor weights device {READING}")
def tune_sampling(
    ckpt: Annotated[Path, typer.Argument(metavar="CKPT", help="generator checkpoint")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="the new checkpoint; default CKPT-tuned.pt")] = None,
    samples: Annotated[int, typer.Option(min=2, help="samples a candidate, balanced over classes")] = 500,
    budget: Annotated[int, typer.Option(min=1, help="candidates to score")] = 24,
    seed: cli.Seed = 1,
    **shared: Any,
) -> cli.Result:
    """Search guidance, its schedule, tau and skipped steps; write a checkpoint that has the best as its defaults.

    All candidates share the noise of --seed."""
    from rdpm_cli.engine import tune

    return tune.tune_sampling(ckpt, out, samples=samples, budget=budget, seed=seed, **shared)


@command(app, "ema runs/d16 --length 0.15 --out d16-0.15.pt")
def ema(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="finished run of train-gen or train-tokenizer")],
    length: Annotated[
        float, typer.Option(min=0.015, max=0.25, help="sigma_rel: width of the average, as a share of all steps")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="the new model file")],
) -> cli.Result:
    """Choose the length of the weights' average after a training with train.ema=power (EDM2's post-hoc EMA).

    `error` is that of the least-squares fit to the run's snapshots, relative to the average asked for."""
    from rdpm_cli.engine import ema as engine

    return engine.average(run, length, out)


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
    **shared: Any,
) -> cli.Result:
    """Whether TARGET, or the samples of --ckpt, are copies of the training images, which --ref names.

    `near_copies`: share of samples at most a third as far from the nearest training image as from the second nearest,
    by their pixels. `authpct`: share that is farther from its nearest training image than that is from the others, by
    features. Only next to the same shares of --heldout, images that were not trained on, do they mean anything."""
    from rdpm_cli.engine import memory as engine

    target = to_score(arguments or [], ckpt, seed, 1, "round", shared)
    return engine.eval_memory(target, heldout=heldout, sheet=sheet, **shared)


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
    codes: Annotated[Path | None, typer.Option(metavar="CODES", help="code store, for the linear baseline")] = None,
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


@command(app, "inspect imagenet256-d16 --json", READING)
def inspect(
    target: Annotated[str, typer.Argument(metavar="PATH|RECIPE", help="file, folder or recipe")], **shared: Any
) -> cli.Result:
    """Describe images, a file, a folder or a recipe: kind, classes, sizes, config, parameters, provenance, digests."""
    if Path(target).suffix == ".pt":
        files.check_tensors(Path(target), files.HINTS[""])
    from rdpm_cli.engine import look

    return look.inspect(target, **shared)


@command(app, "play d16.pt", "device")
def play(
    ckpt: Annotated[Path, typer.Argument(metavar="CKPT", help="generator checkpoint")],
    host: Annotated[str, typer.Option(help="address to serve on; 0.0.0.0: to other machines too")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="default: the first free one from 7860 on")] = None,
    **shared: Any,
) -> cli.Result:
    """Open a page to draw samples in a browser: by class, inside an image that is painted on, or speech from a text.

    Only this machine can reach it, unless --host says otherwise."""
    from rdpm_cli.engine import play as engine

    return engine.play(ckpt, host, port, **shared)


@command(app, "export d16.pt my-model samples/ fid.json --license mit")
def export(
    ckpt: Annotated[Path, typer.Argument(metavar="CKPT", help="generator.pt or tokenizer.pt")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="new folder")],
    shown: Annotated[
        list[Path] | None, typer.Argument(metavar="[SAMPLES|SCORES]...", help="of CKPT, for its card")
    ] = None,
    license: Annotated[str | None, typer.Option(help="of the weights, for the card: mit, cc-by-4.0, ...")] = None,
) -> cli.Result:
    """Write a checkpoint as a folder for the Hugging Face hub: model.safetensors, config.json and a model card.

    SAMPLES are folders of `rdpm sample`, SCORES what `rdpm eval ... --json` printed. Every command that takes a
    checkpoint also takes the folder, and hf://owner/name[@revision] once it has been uploaded."""
    from rdpm_cli.engine import share

    return share.export(ckpt, out, shown or (), license)


@command(app, "import hf://owner/name d16.pt", name="import")
def import_(
    ckpt: Annotated[Path, typer.Argument(metavar="DIR", help="folder of rdpm export, or hf://owner/name[@revision]")],
    out: Annotated[Path, typer.Argument(metavar="FILE.pt", help="checkpoint to write")],
) -> cli.Result:
    """Write an exported folder as a checkpoint again; its digest is that of the first one."""
    from rdpm_cli.engine import share

    return share.import_folder(ckpt, out)


@command(app, "verify out/codes")
def verify(path: Annotated[Path, typer.Argument(metavar="PATH", help="store, samples or model file")]) -> cli.Result:
    """Compare the bytes of a store, model file or training state with their checksums. Exit code 3: they differ."""
    if not path.exists():
        raise UsageError(f"{path} does not exist", "name a code store, a folder of samples or a .pt file")
    if path.is_file() and not path.name.startswith("step-"):  # a training state has its sha256 next to it
        files.check_tensors(path, files.HINTS[""])
    from rdpm_cli.engine import look

    return look.verify(path)


@command(app, "doctor --json")
def doctor() -> cli.Result:
    """Report versions, devices, disk, weight files and extras, and what is missing. Exit code 3: not ready."""
    from rdpm_cli.engine import look

    return look.doctor()

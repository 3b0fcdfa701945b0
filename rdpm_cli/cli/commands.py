"""Every subcommand but `eval`, in the order of the data. --help needs no engine, and so no torch."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rdpm_cli import files
from rdpm_cli.cli import app as cli
from rdpm_cli.cli.app import READING, app, command
from rdpm_cli.errors import UsageError

# Options that the commands share, by their names in cli.SHARED.
TRAINING = "from_weights overrides seed keep gpus track dry_run gpu utilisation print_config device"
SAMPLING = "cfg cfg_schedule guide tau top_k top_p skip_steps steps"
SPEECH = "text prompt prompt_text lines seconds length duration_scale sentences start end vocoder"


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
    store: Annotated[Path, typer.Argument(metavar="OUT", help="folder of the code store, or a URL")],
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
        images, store, options=options, workers=workers, shards=shards, finish=finish, on_bad=on_bad, max_bad=max_bad,
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

"""The shared core: one function a subcommand, joining rooms, training loop and observers.

Every function checks what is cheap before what is slow, returns a `Result`, and prints nothing but progress.
torch is imported inside the functions, so that the front door stays light.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpm_cli import __version__, config, files, progress
from rdpm_cli.config import Recipe
from rdpm_cli.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import torch

    from rdpm_cli.generator.model import LoadedGenerator
    from rdpm_cli.signals import StopRequest
    from rdpm_cli.tokenizer.model import Tokenizer
    from rdpm_cli.training.loop import Observer, Player

SHARD_IMAGES = 4096


@dataclass
class Result:
    """The answer of a command. values: what `--json` prints; next: the command that follows from here."""

    title: str
    values: dict[str, Any] = field(default_factory=dict)
    next: str = ""


# ---- runs ------------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    import numpy
    import torch

    return {
        "rdpm": __version__,
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


@contextlib.contextmanager
def training_run(out: Path, settings: dict[str, Any], device: str) -> Iterator[tuple[torch.device, StopRequest]]:
    """Hold a run folder: one writer, one recipe. Raises UsageError when it was begun with other settings."""
    from rdpm_cli.signals import stop_on_signal
    from rdpm_cli.step import world
    from rdpm_cli.training.distributed import process_group

    with process_group(device) as chosen, contextlib.ExitStack() as stack:
        if world()[0] == 0:
            stack.enter_context(files.only_writer(out))
            note = out / "run.json"
            if note.exists():
                before = files.read_json(note)["settings"]
                if changed := files.differences(before, settings):
                    text = "; ".join(changed[:6])
                    raise UsageError(f"{out} was begun with other settings: {text}", "choose another --out")
            elif foreign := [p.name for p in out.iterdir() if not p.name.startswith(".")]:
                raise UsageError(f"{out} is not empty ({foreign[0]}, ...) and not a run", "choose another --out")
            files.write_json(note, {"settings": settings, "argv": sys.argv, "versions": versions()})
        yield chosen, stack.enter_context(stop_on_signal())


def train(
    players: Sequence[Player],
    batch_at: Any,
    cfg: config.TrainConfig,
    images: int,
    *,
    out: Path,
    seed: int,
    device: torch.device,
    stop: StopRequest,
    observers: Sequence[Observer] = (),
) -> torch.nn.Module:
    """Fit with progress. -> the network to keep: the EMA where there is one."""
    from rdpm_cli import observers as watch
    from rdpm_cli.training import checkpoint
    from rdpm_cli.training.loop import Run, fit

    run = Run(out, seed, device, cfg.total_steps(images), cfg.warmup(images), stop)
    if there := checkpoint.found(out / "checkpoints"):
        progress.say(f"resuming step {there[-1][0]} of {run.steps} from {there[-1][1]}")
    with progress.Bar(f"train {players[0].name}", run.steps, "steps") as bar:
        fit(players, batch_at, cfg, run, [watch.progress(bar, cfg.batch), *observers])
    return run.ema.model if run.ema else players[0].model


def _first_process() -> bool:
    from rdpm_cli.step import world

    return world()[0] == 0


# ---- train-tokenizer ---------------------------------------------------------------------------------------------


def train_tokenizer(
    images: str, out: Path | None, recipe_name: str, overrides: Sequence[str] = (), device: str = "auto"
) -> Result:
    """Images -> RUN/tokenizer.pt. Resumes RUN; a finished run returns at once."""
    recipe = config.load_recipe(recipe_name, overrides, "tokenizer")
    cfg = recipe.tokenizer
    assert cfg is not None
    from rdpm_cli.images.sources import open_source

    source = open_source(images)
    out = out or Path("runs") / f"{recipe.name}-tokenizer"
    import torch

    from rdpm_cli import modelfile, observers
    from rdpm_cli.tokenizer import model
    from rdpm_cli.tokenizer.task import ImageBatches, TokenizerTask

    settings = {
        "command": "train-tokenizer",
        "recipe": {"seed": recipe.seed, "tokenizer": cfg.model_dump(mode="json")},
        "data": {"source": source.spec, "digest": source.digest()},
    }
    final = out / "tokenizer.pt"
    with training_run(out, settings, device) as (chosen, stop):
        if not final.exists():
            torch.manual_seed(recipe.seed)
            tokenizer = model.Tokenizer(cfg, cfg.loss.weight).to(chosen).train()
            kept = train(
                [TokenizerTask(tokenizer, cfg)],
                ImageBatches(source, cfg, recipe.seed).batch_at,
                cfg.train,
                len(source),
                out=out,
                seed=recipe.seed,
                device=chosen,
                stop=stop,
                observers=[observers.tokenizer_preview(tokenizer, source, cfg.train)],
            )
            assert isinstance(kept, model.Tokenizer)
            if _first_process():
                provenance = {"recipe": recipe.model_dump(mode="json"), "data": settings["data"], **versions()}
                modelfile.save(final, model.pack(kept, class_names=source.class_names, provenance=provenance))
                training_curves(out / "curves.png", tokenizer_run=out)
        elif _first_process():
            progress.say(f"{final} is finished already")
    tokenizer, content = model.load(final)
    values = {"tokenizer": str(final), "digest": content["digest"], **_last_metrics(out, ["loss", "recon", "quant"])}
    values["parameters"] = sum(p.numel() for p in tokenizer.parameters())
    return Result("tokenizer trained", values, f"rdpm tokenize {images} out/codes --tokenizer {final}")


def _last_metrics(folder: Path, names: Sequence[str]) -> dict[str, float]:
    from rdpm_cli.training.logging import read_metrics

    rows = [row for row in read_metrics(folder) if names[0] in row]
    return {name: rows[-1][name] for name in names if rows and name in rows[-1]}


def training_curves(path: Path, tokenizer_run: Path | None = None, generator_run: Path | None = None) -> None:
    """Draw the curves of one run or both: losses on a logarithmic axis, codebook and accuracy per t."""
    from rdpm_cli import observers
    from rdpm_cli.images import writers

    panels = observers.tokenizer_curves(tokenizer_run) if tokenizer_run else {}
    panels |= observers.generator_curves(generator_run) if generator_run else {}
    writers.save_curves(path, panels, log_panels=[title for title in panels if "loss" in title])


# ---- tokenize, reconstruct ---------------------------------------------------------------------------------------


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


def tokenize(
    images: str,
    out: Path,
    tokenizer: Path | None = None,
    *,
    views: int = 1,
    flip: bool = False,
    keep_latents: bool = False,
    seed: int = 0,
    shard_images: int = SHARD_IMAGES,
    device: str = "auto",
) -> Result:
    """Images -> code store. Resumes at the first missing shard."""
    path = find_tokenizer(tokenizer)
    from rdpm_cli.images.sources import open_source

    source = open_source(images)
    from rdpm_cli.codes import encode
    from rdpm_cli.codes.store import Manifest
    from rdpm_cli.signals import stop_on_signal
    from rdpm_cli.tokenizer import model
    from rdpm_cli.training.distributed import process_group

    loaded, content = model.load(path)
    with process_group(device) as chosen, stop_on_signal() as stop:
        plan = encode.make_plan(
            source,
            loaded.to(chosen),
            content["digest"],
            views=views,
            flip=flip,
            latents=keep_latents,
            seed=seed,
            shard_images=shard_images,
            device=chosen,
        )
        record = {"argv": sys.argv, "versions": versions()}
        with progress.Bar("tokenize", len(source), "images") as bar:
            for done in encode.write_store(out, source, loaded, path.read_bytes(), plan, record):
                bar.advance(done)
                if bar.done < len(source):
                    stop.leave(f"finished shards are kept in {out}")
    m = Manifest.load(out)
    size = sum((out / name).stat().st_size for shard in m.shards for name in shard.sha256)
    values = {
        "store": str(out),
        "digest": m.digest(),
        "tokenizer": m.tokenizer,
        "images": m.images,
        "views": m.views,
        "shape": [m.steps, *m.grid],
        "bytes": size,
    }
    return Result("codes written", values, f"rdpm train-gen {out} --recipe NAME")


def reconstruct(
    target: str, out: Path, tokenizer: Path | None = None, *, seed: int = 0, limit: int | None = None, device: str = "auto"
) -> Result:
    """Images, or a code store, -> PNGs; with images also a side-by-side grid and PSNR, SSIM."""
    from rdpm_cli.images.sources import is_builtin

    _writable(out)
    if not is_builtin(target) and (Path(target) / "manifest.json").is_file():
        return _decode_store(Path(target), out, tokenizer, limit, device)
    path = find_tokenizer(tokenizer)
    from rdpm_cli.images.sources import open_source

    source = open_source(target)
    import numpy as np

    from rdpm_cli.evaluation import evaluate
    from rdpm_cli.images import writers
    from rdpm_cli.tokenizer import model
    from rdpm_cli.training.distributed import process_group

    loaded, content = model.load(path)
    pairs, rows = [], []
    with process_group(device) as chosen, progress.Bar("reconstruct", limit or len(source), "images") as bar:
        for indices, originals, recon in evaluate.reconstructions(source, loaded.to(chosen), seed, chosen, limit):
            for index, pixels in zip(indices, recon, strict=True):
                writers.save_png(out / f"{index:06d}.png", pixels)
                rows.append({"file": f"{index:06d}.png", "source": source.names[index]})
            pairs.append((originals, recon))
            bar.advance(len(indices))
    shown = 16
    both = [np.concatenate(side)[:shown] for side in zip(*pairs, strict=True)]
    sheet = writers.grid(np.concatenate(both), min(shown, len(rows)), ["real", "recon"])
    writers.save_png(out / "previews" / "grid.png", sheet)
    scores = {"n": len(rows), "seed": seed, **evaluate.reconstruction_scores(pairs)}
    files.write_json(out / "reconstructions.json", {"tokenizer": content["digest"], **scores, "images": rows})
    values = {"folder": str(out), "grid": str(out / "previews" / "grid.png"), "tokenizer": content["digest"], **scores}
    return Result("images reconstructed", values)


def _decode_store(root: Path, out: Path, tokenizer: Path | None, limit: int | None, device: str) -> Result:
    import numpy as np
    import torch

    from rdpm_cli.codes.store import CodeStore
    from rdpm_cli.images import writers
    from rdpm_cli.images.transform import hwc, to_pixels
    from rdpm_cli.threads import one_thread
    from rdpm_cli.tokenizer import model
    from rdpm_cli.training.distributed import process_group

    loaded, content = model.load(tokenizer or root / "tokenizer.pt")
    store = CodeStore(root, content["digest"])
    chosen_rows = np.arange(0, len(store), store.manifest.views)[:limit]
    first = []
    with process_group(device) as chosen, progress.Bar("decode", len(chosen_rows), "images") as bar, one_thread():
        loaded.to(chosen)
        for start in range(0, len(chosen_rows), store.manifest.micro_batch):
            rows = chosen_rows[start : start + store.manifest.micro_batch]
            codes = torch.from_numpy(store.codes(rows).astype(np.int64)).to(chosen)
            pixels = hwc(to_pixels(loaded.decode(codes)))
            for index, picture in zip(store.index[rows], pixels, strict=True):
                writers.save_png(out / f"{index:06d}.png", picture)
            first.append(pixels)
            bar.advance(len(rows))
    shown = np.concatenate(first)[:64]
    writers.save_png(out / "previews" / "grid.png", writers.grid(shown, 8))
    values = {"folder": str(out), "grid": str(out / "previews" / "grid.png"), "images": len(chosen_rows)}
    return Result("codes decoded", {**values, "tokenizer": content["digest"], "store": store.manifest.digest()})


def _writable(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", "name a folder")


# ---- train-gen ---------------------------------------------------------------------------------------------------


def train_gen(
    codes: Path, out: Path | None, recipe_name: str, overrides: Sequence[str] = (), device: str = "auto"
) -> Result:
    """Code store -> RUN/generator.pt. Resumes RUN; a finished run returns at once."""
    recipe = config.load_recipe(recipe_name, overrides, "generator")
    cfg = recipe.generator
    assert cfg is not None
    out = out or Path("runs") / f"{recipe.name}-generator"
    import torch

    from rdpm_cli import modelfile, observers
    from rdpm_cli.codes.store import CodeStore
    from rdpm_cli.generator import model
    from rdpm_cli.generator.task import CodeBatches, GeneratorTask
    from rdpm_cli.tokenizer import model as tokenizer_file

    tokenizer, tokenizer_content = tokenizer_file.load(codes / "tokenizer.pt") if codes.is_dir() else (None, None)
    store = CodeStore(codes, tokenizer_content["digest"] if tokenizer_content else None)
    assert tokenizer is not None
    assert tokenizer_content is not None
    m = store.manifest
    batches = CodeBatches(store, cfg, tokenizer.quantizer.alphas, recipe.seed)
    settings = {
        "command": "train-gen",
        "recipe": {"seed": recipe.seed, "generator": cfg.model_dump(mode="json")},
        "store": m.digest(),
    }
    final = out / "generator.pt"
    with training_run(out, settings, device) as (chosen, stop):
        if not final.exists():
            torch.manual_seed(recipe.seed)
            generator = model.build(cfg, tokenizer.to(chosen), len(m.class_names))
            generator.network.to(chosen).train()
            progress.say(f"{model.parameters(generator):,} parameters, {batches.images:,} images × {m.views} views")
            loaded = model.LoadedGenerator(generator, tokenizer, cfg.sampling, list(m.class_names), "", {})
            generator.network = train(
                [GeneratorTask(generator)],
                batches.batch_at,
                cfg.train,
                batches.images,
                out=out,
                seed=recipe.seed,
                device=chosen,
                stop=stop,
                observers=[observers.generator_monitor(loaded, batches, cfg.train)],
            )
            if _first_process():
                provenance = {
                    "recipe": recipe.model_dump(mode="json"),
                    "store": {"path": str(codes.resolve()), "digest": m.digest()},
                    "reference": {
                        "source": m.data.source,
                        "digest": m.data.digest,
                        "resolution": m.resolution,
                        "transform": m.transform,
                    },
                    **versions(),
                }
                content = model.pack(generator, cfg, tokenizer_content, list(m.class_names), provenance=provenance)
                modelfile.save(final, content)
                training_curves(out / "curves.png", generator_run=out)
        elif _first_process():
            progress.say(f"{final} is finished already")
    loaded = model.load(final)
    values = {
        "generator": str(final),
        "digest": loaded.digest,
        "parameters": model.parameters(loaded.generator),
        **_last_metrics(out, ["ce", "accuracy"]),
        **_last_metrics(out, ["heldout/accuracy", "heldout/baseline"]),
    }
    return Result("generator trained", values, f"rdpm sample --ckpt {final} --classes all")


# ---- sample ------------------------------------------------------------------------------------------------------


def parse_classes(text: str, class_names: Sequence[str]) -> list[int]:
    """`1,2,3`, `0-9`, `all`, `name:goldfish`, and mixtures, in order, each once. Raises UsageError."""
    chosen: list[int] = []
    for part in (p.strip() for p in text.split(",")):
        low, dash, high = part.partition("-")
        if part == "all":
            chosen += range(len(class_names))
        elif part.startswith("name:"):
            chosen.append(_class_named(part.removeprefix("name:"), class_names))
        elif part.isdigit():
            chosen.append(int(part))
        elif dash and low.isdigit() and high.isdigit() and int(low) <= int(high):
            chosen += range(int(low), int(high) + 1)
        else:
            raise UsageError(f"--classes: '{part}' is not a class", "write 1,2,3 or 0-9 or all or name:goldfish")
    if outside := [c for c in chosen if c >= len(class_names)]:
        raise UsageError(f"--classes: there is no class {outside[0]}", f"this checkpoint has 0..{len(class_names) - 1}")
    return list(dict.fromkeys(chosen))


def _class_named(name: str, class_names: Sequence[str]) -> int:
    if name in class_names:
        return list(class_names).index(name)
    near = difflib.get_close_matches(name, class_names, 3)
    hint = f"did you mean {', '.join(near)}?" if near else "see the names with `rdpm inspect CKPT`"
    raise UsageError(f"--classes: no class is named '{name}'", hint)


def sample(
    ckpt: Path,
    classes: str = "all",
    per_class: int = 8,
    out: Path = Path("samples"),
    *,
    seed: int = 0,
    cfg: float | None = None,
    cfg_schedule: str | None = None,
    tau: float | None = None,
    skip_steps: int | None = None,
    grid: bool = True,
    gif: bool = False,
    npz: bool = False,
    device: str = "auto",
) -> Result:
    """Checkpoint -> PNGs, samples.json, previews. Options left out are the checkpoint's own."""
    from rdpm_cli.generator import model, sampler
    from rdpm_cli.generator.contract import SampleOptions

    loaded = model.load(ckpt)
    given = {"cfg": cfg, "cfg_schedule": cfg_schedule, "tau": tau, "skip_steps": skip_steps}
    asked = {name: value for name, value in given.items() if value is not None}
    sampling = config.validate(config.SamplingConfig, {**loaded.sampling.model_dump(), **asked}, "sampling options")
    options = SampleOptions(seed=seed, **sampling.model_dump(exclude={"micro_batch"}))
    labels = sampler.balanced_labels(parse_classes(classes, loaded.class_names), per_class, seed)
    record = {
        "format": "rdpm-samples",
        "version": 1,
        "checkpoint": {"path": str(ckpt.resolve()), "digest": loaded.digest},
        "options": {**sampling.model_dump(), "seed": seed},
        "resolution": loaded.tokenizer.cfg.autoencoder.resolution,
        "class_names": loaded.class_names,
        "reference": loaded.provenance.get("reference"),
        "versions": versions(),
        "samples": [{"file": f"{i:06d}.png", "index": i, "label": label} for i, label in enumerate(labels)],
    }
    _claim_samples(out, record)
    loaded.generator.check(options)
    with files.only_writer(out):
        preview = _write_samples(loaded, labels, options, sampling.micro_batch, out, device)
        files.write_json(out / "samples.json", record)
        if npz:
            _write_npz(out, record)
        pictures = _write_previews(loaded, preview, out, grid, gif)
    values = {"folder": str(out), "samples": len(labels), "classes": len(set(labels)), "checkpoint": loaded.digest}
    return Result("samples written", {**values, **record["options"], **pictures}, f"rdpm eval fid {out}")


def _claim_samples(out: Path, record: dict[str, Any]) -> None:
    """Refuse a folder that holds something else, before any work."""
    _writable(out)
    if (out / "samples.json").is_file():
        before = files.read_json(out / "samples.json")
        same = {k: before.get(k) for k in ("checkpoint", "options", "samples")}
        if same != {k: record[k] for k in same}:
            raise UsageError(f"{out} holds other samples", "choose another --out, or remove it")
    elif out.exists() and any(not p.name.startswith(".") for p in out.iterdir()):
        raise UsageError(f"{out} is not empty and holds no samples.json", "choose another --out")


PREVIEWED = 8  # samples a class in the preview grid


def _write_samples(
    loaded: LoadedGenerator, labels: list[int], options: Any, micro_batch: int, out: Path, device: str
) -> list[tuple[int, Any, Any]]:
    """Write the PNGs. -> (label, pixels, codes) of the first few of each of the first 16 classes, by label."""
    from rdpm_cli.generator import sampler
    from rdpm_cli.images import writers
    from rdpm_cli.signals import stop_on_signal
    from rdpm_cli.training.distributed import process_group

    preview: list[tuple[int, Any, Any]] = []
    shown = {label: 0 for label in sorted(set(labels))[:16]}
    with process_group(device) as chosen, stop_on_signal() as stop, progress.Bar("sample", len(labels), "images") as bar:
        for part in sampler.sample(loaded.to(chosen), labels, options, micro_batch):
            for place, (index, label) in enumerate(zip(part.indices, part.labels, strict=True)):
                writers.save_png(out / f"{index:06d}.png", part.pixels_BHWC[place])
                if shown.get(label, PREVIEWED) < PREVIEWED:
                    shown[label] += 1
                    preview.append((label, part.pixels_BHWC[place], part.codes_BTHW[place]))
            bar.advance(len(part.indices))
            if bar.done < len(labels):
                stop.leave(f"{bar.done} of {len(labels)} samples are in {out}")
    return sorted(preview, key=lambda row: row[0])


def _write_npz(out: Path, record: dict[str, Any]) -> None:
    from rdpm_cli.evaluation.reference import open_samples
    from rdpm_cli.images import writers

    images, size = open_samples(out), record["resolution"]
    assert images.labels is not None
    writers.save_npz(out / "samples.npz", (images.count, size, size, 3), images.batches, images.labels)


def _write_previews(
    loaded: LoadedGenerator, preview: list[tuple[int, Any, Any]], out: Path, grid: bool, gif: bool
) -> dict[str, str]:
    import numpy as np
    import torch

    from rdpm_cli import observers
    from rdpm_cli.images import writers

    names = [loaded.class_names[label] for label in dict.fromkeys(row[0] for row in preview)]
    columns = -(-len(preview) // len(names))
    written = {}
    if grid:
        sheet = writers.grid(np.stack([row[1] for row in preview]), columns, names)
        writers.save_png(out / "previews" / "grid.png", sheet)
        written["grid"] = str(out / "previews" / "grid.png")
    if gif:
        device = next(loaded.tokenizer.parameters()).device
        frames = observers.decode_prefixes(loaded.tokenizer, torch.stack([row[2] for row in preview]).to(device))
        titled = [writers.grid(f, columns, names, f"t = {t} of {len(frames)}") for t, f in enumerate(frames, 1)]
        writers.save_gif(out / "previews" / "steps.gif", titled)
        written["gif"] = str(out / "previews" / "steps.gif")
    return written


# ---- eval --------------------------------------------------------------------------------------------------------


def eval_fid(
    target: str,
    ref: str | None = None,
    *,
    extractor: Path | None = None,
    weights: Path | None = None,
    subset: int | None = None,
    resolution: int | None = None,
    device: str = "auto",
) -> Result:
    """Fréchet distance of samples, or of any images, to a reference."""
    from rdpm_cli.evaluation import evaluate, features
    from rdpm_cli.evaluation.reference import open_reference, open_target
    from rdpm_cli.training.distributed import process_group

    with process_group(device) as chosen:
        judge = features.make_extractor(extractor, weights, chosen)
        images = open_target(target, resolution)
        values = evaluate.frechet(judge, images, open_reference(ref, images), subset)
    return Result("score", {**values, "options": images.origin.get("options"), "versions": versions()})


def eval_recon(
    images: str, tokenizer: Path | None = None, *, seed: int = 0, seeds: int = 1, limit: int | None = None, device: str = "auto"
) -> Result:
    """MSE, PSNR and SSIM of reconstructions: mean over noise seeds seed..seed+seeds-1, and their spread."""
    path = find_tokenizer(tokenizer)
    from rdpm_cli.images.sources import open_source

    source = open_source(images)
    import numpy as np

    from rdpm_cli.evaluation import evaluate
    from rdpm_cli.tokenizer import model
    from rdpm_cli.training.distributed import process_group

    loaded, content = model.load(path)
    count = min(len(source), limit or len(source))
    scores = []
    with process_group(device) as chosen, progress.Bar("reconstruct", seeds * count, "images") as bar:
        for one in range(seed, seed + seeds):
            pairs = []
            for indices, originals, recon in evaluate.reconstructions(source, loaded.to(chosen), one, chosen, limit):
                pairs.append((originals, recon))
                bar.advance(len(indices))
            scores.append(evaluate.reconstruction_scores(pairs))
    values: dict[str, Any] = {"metric": "reconstruction", "n": count, "seeds": list(range(seed, seed + seeds))}
    for name in scores[0]:
        values[name] = float(np.mean([s[name] for s in scores]))
    values["spread_over_seeds"] = {n: float(np.std([s[n] for s in scores])) for n in scores[0]} if seeds > 1 else None
    values |= {"target": {"name": source.spec, "sha256": source.digest()}, "tokenizer": content["digest"]}
    return Result("score", {**values, "versions": versions()})


# ---- the judge ---------------------------------------------------------------------------------------------------


def train_judge(images: str, heldout: str, out: Path, recipe: Recipe, device: str = "auto") -> Result:
    """A classifier of real images -> RUN/judge.pt, with its accuracy on held-out images."""
    cfg = recipe.judge
    assert cfg is not None
    assert recipe.tokenizer is not None
    size = recipe.tokenizer.autoencoder.resolution
    import numpy as np
    import torch

    from rdpm_cli import modelfile
    from rdpm_cli.evaluation import judge
    from rdpm_cli.evaluation.reference import read_batches
    from rdpm_cli.images.sources import open_source
    from rdpm_cli.images.transform import chw, to_model

    source, unseen = open_source(images), open_source(heldout)
    settings = {"command": "train-judge", "recipe": {"seed": recipe.seed, "judge": cfg.model_dump(mode="json")}}
    final = out / "judge.pt"
    with training_run(out, settings, device) as (chosen, stop):
        if not final.exists():
            torch.manual_seed(recipe.seed)
            network = judge.Judge(size, cfg.width, cfg.features, len(source.class_names)).to(chosen).train()
            batches = judge.JudgeBatches(source, cfg, size, recipe.seed)
            kept = train(
                [judge.JudgeTask(network)], batches.batch_at, cfg.train, len(source),
                out=out, seed=recipe.seed, device=chosen, stop=stop,
            )  # fmt: skip
            assert isinstance(kept, judge.Judge)
            with torch.no_grad():
                logits = [kept.eval()(to_model(chw(x)).to(chosen))[1].argmax(1).cpu() for x in read_batches(unseen, size)]
            accuracy = float(np.mean(torch.cat(logits).numpy() == np.array(unseen.need_labels())))
            provenance = {"data": source.spec, "heldout": unseen.spec, "heldout_accuracy": accuracy, **versions()}
            modelfile.save(final, judge.pack(kept, source.class_names, provenance=provenance))
    _, content = judge.load(final)
    values = {"judge": str(final), "heldout_accuracy": content["provenance"]["heldout_accuracy"]}
    return Result("judge trained", values)


# ---- inspect -----------------------------------------------------------------------------------------------------


def inspect(target: str) -> Result:
    """What is this file, folder or recipe?"""
    from rdpm_cli import inspection

    kind, values = inspection.describe(target)
    return Result(kind, values)


def copy_file(source: Path, target: Path) -> None:
    """Copy a finished file, atomically."""
    with source.open("rb") as opened:
        files.write_atomic(target, lambda file: shutil.copyfileobj(opened, file))

"""The commands of the tokenizer: train-tokenizer, tokenize, reconstruct."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rdpm_cli import checkpoint, files, progress
from rdpm_cli.codes.encode import StoreOptions as StoreOptions
from rdpm_cli.codes.encode import make_plan, report_killed_worker
from rdpm_cli.codes.store import MANIFEST, TOKENIZER, CodeStore, Ints, Manifest, read_names, source_of, store_reference
from rdpm_cli.codes.write import Work, is_finished, write_store
from rdpm_cli.data import folder, pictures
from rdpm_cli.data.open import is_builtin, open_source
from rdpm_cli.data.pixels import Pixels, hwc, to_pixels
from rdpm_cli.data.source import Source, spread
from rdpm_cli.device import one_thread
from rdpm_cli.distributed import is_first, process_group, world
from rdpm_cli.engine import plan, watch
from rdpm_cli.engine.train import Training, default_folder, recipe_settings, train_once
from rdpm_cli.errors import CheckpointError, UsageError
from rdpm_cli.evaluation.recon import PairScores, means, pair_scores, reconstructions
from rdpm_cli.recipes import load_recipe
from rdpm_cli.runs import Result, stop_on_signal, versions
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.config import TokenizerConfig
from rdpm_cli.tokenizer.importers import BOOKS, Imported, load_weights
from rdpm_cli.tokenizer.losses import Perceptual, load_perceptual
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.tokenizer.training import ImageBatches, initialise_codebook, players_of
from rdpm_cli.training.log import last_metrics
from rdpm_cli.training.loop import CHECKPOINTS

FINAL = "tokenizer.pt"  # of a run folder
WARM_START = "from_weights.json"  # of a run folder: which tensors its first process took from the file
SHOWN = 16  # images in the grid of reconstructions


# ---- train-tokenizer -----------------------------------------------------------------------------------------------


def train_tokenizer(
    images: str,
    out: Path | None,
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    device: str = "auto",
    from_weights: Path | None = None,
    track: str | None = None,
) -> Result:
    """Images -> RUN/tokenizer.pt. Resumes RUN; a finished run returns at once.

    from_weights: a file whose tensors a new run begins with. track: as --track.
    """
    loaded_recipe = load_recipe(recipe, overrides, "tokenizer")
    cfg, seed = loaded_recipe.tokenizer, loaded_recipe.seed
    assert cfg is not None
    out = out or default_folder(loaded_recipe, "tokenizer")
    identity = _weights_identity(from_weights)
    source = open_source(images)
    perceptual = _perceptual(cfg)
    warm = _warm_start(cfg, seed, out, from_weights)  # fails, if it does, before the run folder has these settings
    data = {"source": source.spec, "digest": source.digest()}
    backbone = {"name": perceptual.name, "sha256": perceptual.sha256} if perceptual else None

    def make(training: Training) -> dict[str, Any]:
        tokenizer = warm[0] if warm else Tokenizer(cfg, cfg.loss.weight)
        imported = _warm_record(out, identity, warm[1] if warm else None)
        has_books = warm is not None and BOOKS not in warm[1].fresh
        trained = _train(training, tokenizer.to(training.device).train(), source, perceptual, has_books)
        provenance = {"recipe": loaded_recipe.model_dump(mode="json"), "data": data, "perceptual": backbone, **imported}
        provenance |= {**_counts(tokenizer), **versions()}
        return model.pack(trained, class_names=source.class_names, provenance=provenance)

    binding = recipe_settings(loaded_recipe, "tokenizer")
    settings = {"command": "train-tokenizer", "recipe": binding, "data": data, "perceptual": backbone, **identity}
    final = out / FINAL
    train_once(final, seed, settings, device, make, track)
    tokenizer, content = model.load(final)
    losses = last_metrics(out, ["loss", "recon", "quant", "lpips", "gan"])
    values = {"tokenizer": str(final), "digest": content["digest"], **losses, **_counts(tokenizer)}
    return Result("tokenizer trained", values, f"rdpm tokenize {images} out/codes --tokenizer {final}")


def _counts(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"parameters": model.parameters(tokenizer), "parameters_of": model.parameter_table(tokenizer)}


def _train(
    training: Training, tokenizer: Tokenizer, source: Source, perceptual: Perceptual | None, has_books: bool
) -> Tokenizer:
    """Train in the run folder, with its curves. has_books: the codebook is not to be initialised from the data."""
    cfg = tokenizer.cfg
    assert isinstance(cfg, TokenizerConfig)
    batches = ImageBatches(source, cfg, training.seed)
    progress.say(
        f"{len(source):,} images, {len(source.class_names):,} classes; {model.parameters(tokenizer):,} parameters"
    )
    if not (has_books or training.started):
        first = batches.batch_at(0, range(cfg.train.batch))
        initialise_codebook(tokenizer, first, training.seed, lambda: training.stop.leave("nothing is trained yet"))
    players = players_of(tokenizer, cfg, training.device, perceptual and perceptual.to(training.device))

    def draw() -> None:
        watch.training_curves(training.out / "curves.png", tokenizer_run=training.out)

    observers = [
        watch.tokenizer_preview(tokenizer, source, cfg.train),
        watch.curves(cfg.train, draw),
        watch.codebook_alarm(cfg),
    ]
    trained = training.fit(players, batches, cfg.train, len(source), observers, plan.tokenizer_flops(cfg))
    assert isinstance(trained, Tokenizer)
    if is_first():
        draw()
    return trained


def _perceptual(cfg: TokenizerConfig) -> Perceptual | None:
    """The perceptual network of a recipe, if it has one."""
    if cfg.loss.perceptual == "none":
        return None
    path = Path(cfg.loss.perceptual_weights) if cfg.loss.perceptual_weights else None
    option, without = "loss.perceptual_weights=FILE", "go on without it by loss.perceptual=none"
    return load_perceptual("vgg", path, option, without, cfg.autoencoder.resolution)


def _weights_identity(path: Path | None) -> dict[str, Any]:
    """The run setting for the file of a warm start, wherever it is; {} without one. Raises CheckpointError."""
    if path is None:
        return {}
    if not path.is_file():
        raise CheckpointError(f"--from-weights: {files.describe_missing(path)}", "give the file of the weights")
    return {"from_weights": {"sha256": files.sha256_file(path)}}


def _warm_start(cfg: TokenizerConfig, seed: int, out: Path, path: Path | None) -> tuple[Tokenizer, Imported] | None:
    """A new tokenizer that took what fits of a file; None without a file, or if the run has a state of its own.

    Raises CheckpointError for a file of which nothing fits this recipe.
    """
    if path is None or (out / FINAL).exists() or checkpoint.states(out / CHECKPOINTS):
        return None
    torch.manual_seed(seed)  # what the file does not fill is a function of the seed, as in every run
    tokenizer = Tokenizer(cfg, cfg.loss.weight)
    return tokenizer, load_weights(tokenizer, path)


def _warm_record(out: Path, identity: dict[str, Any], imported: Imported | None) -> dict[str, Any]:
    """The provenance of a warm start. Printed and kept in the run folder when it happens, read from there later."""
    if not identity:
        return {}
    if imported is None:
        return {"from_weights": files.read_json(out / WARM_START)}
    record = {**identity["from_weights"], "file": imported.file, **imported.record()}
    if is_first():
        for line in imported.lines():
            progress.say(line)
        files.write_json(out / WARM_START, record)
    return {"from_weights": record}


# ---- tokenize ------------------------------------------------------------------------------------------------------


def find_tokenizer(path: Path | None) -> Path:
    """--tokenizer, else $RDPM_TOKENIZER, else ./tokenizer.pt. Raises CheckpointError saying how to make one."""
    if path is not None:
        return path
    if named := os.environ.get("RDPM_TOKENIZER"):
        return Path(named)
    if Path(FINAL).is_file():
        return Path(FINAL)
    raise CheckpointError(
        "no tokenizer: there is no --tokenizer, no $RDPM_TOKENIZER, and no ./tokenizer.pt",
        "make one with `rdpm train-tokenizer IMAGES --recipe NAME`, then pass its tokenizer.pt",
    )


def tokenize(
    images: str,
    out: Path,
    tokenizer: Path | None = None,
    options: StoreOptions | None = None,
    *,
    workers: int | None = None,
    on_bad: str = "stop",
    max_bad: float = 0.0001,
    device: str = "auto",
) -> Result:
    """Images -> code store. Resumes at the first missing shard; a finished store is left alone.

    workers: processes, default one for each core of this rank. on_bad: stop or skip.
    """
    path = find_tokenizer(tokenizer)
    source = open_source(images)
    loaded, content = model.load(path)
    saved = f"finished shards are kept in {out}"
    with (
        report_killed_worker(),
        process_group(device, several=True) as rank_device,
        stop_on_signal(interrupt=world()[1] > 1, saved=saved) as stop,
    ):
        store_plan = make_plan(source, loaded, content["digest"], options or StoreOptions(), rank_device)
        layout = torch.channels_last if store_plan.precision == "bf16" else torch.contiguous_format
        loaded.to(rank_device).to(memory_format=layout)
        work = Work(workers or _cores(), "skip" if on_bad == "skip" else "stop", max_bad)
        pieces = write_store(out, source, loaded, path.read_bytes(), store_plan, work)
        with progress.Bar("tokenize", len(source), "images") as bar, contextlib.closing(pieces):
            bar.resume_at(next(pieces))
            if is_first() and is_finished(out):
                progress.say(f"{out} is finished already; the names of the images were compared, not their pixels")
            for count in pieces:
                bar.advance(count)
                if bar.done < len(source) or world()[1] > 1:  # else only the manifest is left to write
                    stop.leave(saved)
    return _store_result(out)


def _cores() -> int:
    """CPU cores of this rank: an equal share of those that the process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _store_result(root: Path) -> Result:
    m = Manifest.load(root)
    size = sum((root / name).stat().st_size for shard in m.shards for name in shard.sha256)
    values = {
        "store": str(root),
        "digest": m.digest(),
        "tokenizer": m.tokenizer,
        "images": m.images,
        "bad": m.bad,
        "classes": len(m.class_names),
        "views": m.views,
        "shape": [m.steps, *m.grid],
        "bytes": size,
        "bytes_per_image": round(size / m.images, 1),
        "psnr": round(sum(item.psnr for item in m.samples) / len(m.samples), 2),
    }
    return Result("codes written", values, f"rdpm train-gen {root} --recipe NAME")


# ---- reconstruct ---------------------------------------------------------------------------------------------------

Reconstructed = tuple[list[int], Pixels | None, Pixels]  # source indices, originals, reconstructions (n, H, W, 3)


def reconstruct(
    target: str,
    out: Path,
    tokenizer: Path | None = None,
    *,
    seed: int = 0,
    limit: int | None = None,
    device: str = "auto",
) -> Result:
    """Images, or a code store, -> PNG files; where the images are known, a side-by-side grid, PSNR and SSIM too."""
    if not is_builtin(target) and (Path(target) / MANIFEST).is_file():
        if seed:
            raise UsageError("--seed is only for images: a code store has its own noise", "leave it out")
        return _decode_store(Path(target), out, tokenizer, limit, device)
    path = find_tokenizer(tokenizer)
    source = open_source(target)
    loaded, content = model.load(path)
    size, indices = loaded.cfg.autoencoder.resolution, spread(len(source), limit)
    labels = [None] * len(source) if source.labels is None else list(map(int, source.labels))
    record = folder.picture_record(
        "rdpm-reconstructions",
        {"tokenizer": content["digest"]},
        {"seed": seed},
        resolution=size,
        class_names=source.class_names,
        reference=folder.source_reference(source, size),
        rows=[_row(i, source.names[i], labels[i]) for i in indices],
    )
    with process_group(device) as rank_device:
        batches = reconstructions(source, loaded.to(rank_device), seed, rank_device, limit)
        values = _write_pictures(out, record, batches, {"n": len(indices), "seed": seed})
    return Result("images reconstructed", values, f"rdpm eval fid {out}")


def _decode_store(root: Path, out: Path, tokenizer: Path | None, limit: int | None, device: str) -> Result:
    """Decode the first view of every item in a store."""
    loaded, content = model.load(tokenizer or root / TOKENIZER)
    store = CodeStore(root, content["digest"])
    m, names, labels = store.manifest, read_names(root), store.columns["labels"]
    rows = np.array(spread(m.images, limit)) * m.views
    record = folder.picture_record(
        "rdpm-reconstructions",
        {"tokenizer": content["digest"], "store": m.digest()},
        {"view": 0},
        resolution=m.resolution,
        class_names=list(m.class_names),
        reference=store_reference(root, m),
        rows=[_row(int(store.index[r]), names[int(store.index[r])], int(labels[r])) for r in rows],
    )
    source = source_of(m)
    if source is None:
        progress.say(f"the images {m.data.source} are not here, or have changed: no scores, no originals in the grid")
    with process_group(device) as rank_device:
        batches = _decoded(store, rows, loaded.to(rank_device), source)
        values = _write_pictures(out, record, batches, {"n": len(rows)})
    return Result("codes decoded", values, f"rdpm eval fid {out}")


def _decoded(store: CodeStore, rows: Ints, tokenizer: Tokenizer, source: Source | None) -> Iterator[Reconstructed]:
    """Rows of a store, decoded in its own micro-batch on one thread, with their originals where there is a source."""
    m, device = store.manifest, tokenizer.quantizer.books.device
    for start in range(0, len(rows), m.micro_batch):
        batch = rows[start : start + m.micro_batch]
        codes = torch.from_numpy(store.codes(batch).astype(np.int64)).to(device)
        with one_thread():
            pixels = hwc(to_pixels(tokenizer.decode(codes)))
        indices = store.index[batch].tolist()
        yield indices, np.stack([source.pixels(i, m.resolution) for i in indices]) if source else None, pixels


def _write_pictures(
    out: Path, record: dict[str, Any], batches: Iterator[Reconstructed], facts: dict[str, Any]
) -> dict[str, Any]:
    """Write the PNG files, a grid of the first batch and the folder's record. -> the values of the result."""
    count = len(record["samples"])
    scores: list[PairScores] = []
    sheet: list[Pixels] = []
    with files.only_writer(out), stop_on_signal() as stop, progress.Bar("reconstruct", count, "images") as bar:
        folder.claim(out, record)
        for indices, originals, recon in batches:
            for index, pixels in zip(indices, recon, strict=True):
                pictures.save_png(out / folder.png_name(index), pixels)
            if originals is not None:
                scores.append(pair_scores(originals, recon))
            sheet = sheet or [side[:SHOWN] for side in (originals, recon) if side is not None]
            bar.advance(len(indices))
            stop.leave(f"{bar.done} of {count} pictures are in {out}")
        path = out / "previews" / "grid.png"
        labels = ["real", "recon"][-len(sheet) :]
        pictures.save_png(path, pictures.grid(np.concatenate(sheet), len(sheet[0]), labels))
        record["scores"] = {**facts, **(means(scores) if scores else {})}
        folder.finish(out, record)
    return {"folder": str(out), "grid": str(path), **record["made_from"], **record["scores"]}


def _row(index: int, name: str, label: int | None) -> dict[str, Any]:
    return {"file": folder.png_name(index), "index": index, "label": label, "source": name}

"""The commands of the tokenizer: train-tokenizer, tokenize, reconstruct."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from rdpm_cli import checkpoint, files, progress
from rdpm_cli.codes import write
from rdpm_cli.codes.store import MANIFEST, TOKENIZER, CodeStore, Manifest, Plan, read_names, source_of, store_reference
from rdpm_cli.codes.write import StoreOptions as StoreOptions
from rdpm_cli.data import folder, pictures
from rdpm_cli.data.audio import AudioSource
from rdpm_cli.data.open import check_output, is_builtin
from rdpm_cli.data.pixels import TRANSFORM, Pixels, hwc, to_pixels
from rdpm_cli.data.remote import Place
from rdpm_cli.data.source import ItemSource, Source, spread
from rdpm_cli.distributed import is_first, one_thread, pick_device, process_group, world
from rdpm_cli.engine import plan, watch
from rdpm_cli.engine.mirror import Mirror
from rdpm_cli.engine.speech import reconstruct as reconstruct_speech
from rdpm_cli.engine.train import (
    Training,
    default_folder,
    is_new,
    recipe_settings,
    train_once,
    warm_start_record,
    weights_setting,
)
from rdpm_cli.errors import AudioError, CheckpointError, DataError, UsageError, rdpm_command
from rdpm_cli.evaluation import speech_judge
from rdpm_cli.evaluation.recon import PairScores, means, pair_scores, reconstructions
from rdpm_cli.recipes import load_recipe
from rdpm_cli.runs import Result, read_run, stop_on_signal, versions
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.config import TokenizerConfig
from rdpm_cli.tokenizer.importers import BOOKS, warm_start
from rdpm_cli.tokenizer.inputs import inputs_of
from rdpm_cli.tokenizer.losses import Perceptual, open_perceptual
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.tokenizer.training import ItemBatches, initialise, players_of
from rdpm_cli.training.log import last_metrics
from rdpm_cli.training.loop import CHECKPOINTS

FINAL = "tokenizer.pt"  # of a run folder
FINISH = "the same command with --finish instead of --shards"
UNFINISHED = "shards written; other shards are still missing"
SHOWN = 16  # images in the grid of reconstructions

Reading = dict[str, Any]  # of --follow-links and the like: fields of data.source.Reading
Reconstructed = tuple[list[int], Pixels | None, Pixels]  # source indices, originals, reconstructions (n, H, W, 3)


def train_tokenizer(
    images: str, out: Path | None, recipe: str, overrides: Sequence[str] = (), *, device: str = "auto",
    from_weights: Path | None = None, track: str | None = None, reading: Reading | None = None,
) -> Result:  # fmt: skip
    """Images -> RUN/tokenizer.pt; resumes RUN. from_weights: a file whose tensors a new run begins with."""
    resolved = load_recipe(recipe, overrides, "tokenizer")
    cfg = resolved.tokenizer
    assert cfg is not None
    final = (out or default_folder(resolved, "tokenizer")) / FINAL
    check_output(final.parent, images)
    source = inputs_of(cfg.autoencoder).open(images, **(reading or {}))
    perceptual = open_perceptual(cfg)
    origin: dict[str, Any] = {"data": source.record()}
    origin["perceptual"] = perceptual and perceptual.record()
    setting = weights_setting(from_weights)
    warm, imported = None, None
    if from_weights and is_new(final):  # fails, if it does, before the run folder has these settings
        warm, imported = warm_start(cfg, resolved.seed, from_weights)

    def make(training: Training) -> dict[str, Any]:
        tokenizer = warm or Tokenizer(cfg, cfg.loss.weight)
        record = warm_start_record(training.out, setting, imported)
        has_books = imported is not None and BOOKS not in imported.fresh
        trained = _train(training, tokenizer.to(training.device).train(), ItemBatches(source, cfg, resolved.seed),
                         perceptual, has_books)  # fmt: skip
        provenance = {"recipe": resolved.model_dump(mode="json"), **origin, **record, **_counts(tokenizer)}
        return model.pack(trained, class_names=source.class_names, provenance={**provenance, **versions()})

    settings = {"command": "train-tokenizer", "recipe": recipe_settings(resolved, "tokenizer"), **origin, **setting}
    train_once(final, resolved.seed, settings, device, make, track)
    tokenizer, content = model.load(final)
    losses = last_metrics(final.parent, ["loss", "recon", "quant", "lpips", "gan"])
    values = {"tokenizer": str(final), "digest": content["digest"], **losses, **_counts(tokenizer)}
    return Result("tokenizer trained", values, rdpm_command("tokenize", images, "out/codes", "--tokenizer", final))


def _counts(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"parameters": model.parameters(tokenizer), "parameters_of": model.parameter_table(tokenizer)}


def _train(
    training: Training, tokenizer: Tokenizer, batches: ItemBatches, perceptual: Perceptual | None, has_books: bool
) -> Tokenizer:
    """Train in the run folder, with its curves. has_books: the codebook is not to be initialised from the data."""
    cfg, source = tokenizer.cfg, batches.source
    assert isinstance(cfg, TokenizerConfig)
    count = f"{len(source):,} items, {len(source.class_names):,} classes"
    progress.say(f"{count}; {model.parameters(tokenizer):,} parameters")
    if not (has_books or checkpoint.states(training.out / CHECKPOINTS)):
        first = batches.batch_at(0, range(cfg.train.batch))
        initialise(tokenizer, first, training.seed)
    players = players_of(tokenizer, cfg, perceptual and perceptual.to(training.device))
    for player in players:
        player.model.to(training.device)
    draw = partial(watch.training_curves, training.out / "curves.png", tokenizer_run=training.out)
    observers = [watch.tokenizer_preview(tokenizer, source, cfg.train), watch.codebook_alarm(cfg)]
    trained = training.fit(players, batches, cfg.train, len(source), observers, plan.tokenizer_flops(cfg), draw)
    assert isinstance(trained, Tokenizer)
    return trained


def find_tokenizer(path: Path | None) -> Path:
    """--tokenizer, else $RDPM_TOKENIZER, else ./tokenizer.pt. Raises CheckpointError saying how to make one."""
    if path is None and "RDPM_TOKENIZER" not in os.environ and not Path(FINAL).is_file():
        raise CheckpointError(
            "no tokenizer: there is no --tokenizer, no $RDPM_TOKENIZER, and no ./tokenizer.pt",
            "make one with `rdpm train-tokenizer IMAGES --recipe NAME`, then pass its tokenizer.pt",
        )
    return path or Path(os.environ.get("RDPM_TOKENIZER") or FINAL)


def tokenize(
    images: str, out: Path, tokenizer: Path | None = None, options: StoreOptions | None = None, *,
    workers: int | None = None, on_bad: str = "stop", max_bad: float = 0.0001, align: Path | None = None,
    shards: str | None = None, finish: bool = False, device: str = "auto", reading: Reading | None = None,
) -> Result:  # fmt: skip
    """Items -> code store; resumes at the first missing shard. workers: processes. on_bad: stop or skip.

    align: a judge of speech, which finds the durations of the words of texts. shards: only these, as `0-99`, and no
    manifest. finish: only the manifest. out: may be a URL."""
    if shards is not None and finish:
        raise UsageError("--shards makes shards, and --finish makes none", "give --finish when all shards are there")
    path = find_tokenizer(tokenizer)
    mirror = Mirror(str(out)) if files.is_url(str(out)) else None
    name = mirror.remote if mirror else out
    if mirror:
        out = mirror.folder
    check_output(out, images)
    loaded, content = model.load(path)
    source = loaded.inputs.open(images, **(reading or {}))
    if align and (options is None or options.text != "words"):
        raise UsageError("--align finds the durations of words", "give --units words, or leave --align out")
    if align:
        _align(source, align, on_bad)
    saved = f"finished shards are kept in {name}"
    if workers is None:  # an equal share of the cores that this process may use
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    with process_group(device, several=True) as picked, stop_on_signal(world()[1] > 1) as stop:
        store_plan = write.make_plan(source, loaded, content["digest"], options or StoreOptions(), picked)
        layout = torch.channels_last if store_plan.precision == "bf16" else torch.contiguous_format
        loaded.to(picked).to(memory_format=layout)
        every = range(len(store_plan.shard_ranges))
        numbers = every if shards is None else write.shards_of(shards, len(every))
        skip: Literal["skip", "stop"] = "skip" if on_bad == "skip" else "stop"
        listed, total = None if shards is None else numbers, write.items_of(store_plan, numbers)
        work = write.Work(workers, skip, max_bad, listed, not finish, lambda: bool(stop.name))
        if mirror and is_first():
            mirror.fetch(listed, store_plan)
        if finish and is_first() and not read_run(out):
            raise DataError(f"{name} has no shards", "name the OUT of --shards")
        pieces = write.write_store(out, source, loaded, checkpoint.file_bytes(path), store_plan, work)
        if mirror and is_first():
            pieces = mirror.sending(pieces)
        item = "recording" if store_plan.speech else "image"
        with progress.Bar("tokenize", total, f"{item}s") as bar, contextlib.closing(pieces):
            bar.resume_at(next(pieces))
            if is_first() and write.is_finished(out):
                progress.say(f"{name} is finished already; the names of the {item}s were compared, not their content")
            for count in pieces:
                bar.advance(count)
                if bar.done < total or world()[1] > 1:  # else only the manifest is left to write
                    stop.leave(saved)
    if mirror and shards is not None:  # the copy lacks the shards of other machines
        return Result("shards written", {"store": str(name), "written": len(numbers)}, FINISH)
    return _store_result(images, out, item, name) if write.is_finished(out) else _shards_result(out, store_plan)


def _shards_result(out: Path, store_plan: Plan) -> Result:
    """What an unfinished store has and lacks."""
    count, missing = len(store_plan.shard_ranges), write.unwritten_shards(out, store_plan)
    values = {"store": str(out), "shards": count, "written": count - len(missing)}
    if missing:
        return Result(UNFINISHED, {**values, "missing": write.shards_text(missing)})
    return Result("all shards written", values, FINISH)


def _store_result(images: str, out: Path, item: str, name: Place) -> Result:
    """The facts of a finished store. item: image or recording. name: of the store, where `out` is a copy."""
    m = Manifest.load(out)
    size = sum((out / name).stat().st_size for shard in m.shards for name in shard.sha256)
    values = {
        "store": str(name), "digest": m.digest(), "tokenizer": m.tokenizer, **m.facts(), "bad": m.bad,
        "classes": len(m.class_names), "views": m.views, "shape": [m.steps, *m.grid], "bytes": size,
        f"bytes_per_{item}": round(size / m.images, 1),
    }  # fmt: skip
    if m.speech:  # whose items have any length
        values["shape"] = [m.steps]
    fidelity = [name for name in m.samples[0] if name != "index"]
    values |= {name: round(sum(item[name] for item in m.samples) / len(m.samples), 2) for name in fidelity}
    return Result("codes written", values, rdpm_command("train-gen", name, "--recipe", "NAME"))


def _align(source: ItemSource, judge: Path, on_bad: str) -> None:
    """Set the durations of the words of all recordings; of one that cannot be read, and is to be skipped, none."""
    if not isinstance(source, AudioSource) or source.texts is None:
        raise UsageError(f"--align is for recordings with texts, which {source.spec} is not", "leave it out")
    recogniser, _ = speech_judge.load(judge)
    seconds: list[list[float]] = []
    with progress.Bar("align", len(source), "recordings") as bar:
        for index, words in enumerate(source.texts):
            try:
                seconds.append(recogniser.align(source.wave(index, recogniser.features.rate), words))
            except AudioError:
                if on_bad == "stop":
                    raise
                seconds.append([])
            bar.advance(1)
    source.word_seconds = seconds


def reconstruct(
    target: str, out: Path, tokenizer: Path | None = None, *, seed: int = 0, limit: int | None = None,
    vocoder: str | None = None, device: str = "auto", reading: Reading | None = None,
) -> Result:  # fmt: skip
    """Images, or a code store, -> PNG files; where the images are known, a side-by-side grid, PSNR and SSIM too.

    Recordings -> WAV files, by a vocoder; None: Griffin-Lim."""
    if not is_builtin(target) and (Path(target) / MANIFEST).is_file():
        if seed or vocoder:
            name = "--seed" if seed else "--vocoder"
            raise UsageError(f"{name} is not for a code store: it has its own noise, and no sound", "leave it out")
        return _decode_store(Path(target), out, tokenizer, limit, device)
    check_output(out, target)
    loaded, content = model.load(find_tokenizer(tokenizer))
    source = loaded.inputs.open(target, **(reading or {}))
    if isinstance(source, AudioSource):
        loaded.to(pick_device(device))
        return reconstruct_speech(source, loaded, content["digest"], out, seed, spread(len(source), limit), vocoder)
    if vocoder:
        raise UsageError(f"--vocoder is for sound, and {target} holds images", "leave it out")
    assert isinstance(source, Source)
    size, indices = loaded.cfg.autoencoder.resolution, spread(len(source), limit)
    labels = [None if source.labels is None else int(source.labels[i]) for i in indices]
    record = folder.picture_record(
        "rdpm-reconstructions", {"tokenizer": content["digest"]}, {"seed": seed}, resolution=size,
        class_names=source.class_names,
        reference={**source.record(), "resolution": size, "transform": TRANSFORM},
        rows=_rows(indices, [source.names[i] for i in indices], labels),
    )  # fmt: skip
    with process_group(device) as rank_device:
        recons = reconstructions(source, loaded.to(rank_device), [seed], rank_device, indices)
        batches = ((batch, originals, by_seed[0][0]) for batch, originals, by_seed in recons)
        values = _write_pictures(out, record, batches, {"n": len(indices), "seed": seed})
    return Result("images reconstructed", values, rdpm_command("eval", "fid", out))


def _decode_store(root: Path, out: Path, tokenizer: Path | None, limit: int | None, device: str) -> Result:
    """Decode the first view of every item in a store."""
    loaded, content = model.load(tokenizer or root / TOKENIZER)
    if Manifest.load(root).speech:
        raise UsageError(f"{root} holds codes of sound", "name the recordings, with --tokenizer FILE")
    store = CodeStore(root, content["digest"])
    m, names, source = store.manifest, read_names(root), source_of(store.manifest)
    rows = np.array(spread(m.images, limit)) * m.views
    indices = store.index[rows].tolist()
    record = folder.picture_record(
        "rdpm-reconstructions", {"tokenizer": content["digest"], "store": m.digest()}, {"view": 0},
        resolution=m.resolution, class_names=list(m.class_names), reference=store_reference(root, m),
        rows=_rows(indices, [names[i] for i in indices], store.columns["labels"][rows].tolist()),
    )  # fmt: skip
    if source is None:
        progress.say(f"the images {m.data.source} are not here, or have changed: no scores, no originals in the grid")

    def decode(device: torch.device) -> Iterator[Reconstructed]:
        """In the store's own micro-batch on one thread, with the originals where there is a source."""
        loaded.to(device)
        for start in range(0, len(rows), m.micro_batch):
            part = slice(start, start + m.micro_batch)
            codes = torch.from_numpy(store.codes(rows[part]).astype(np.int64)).to(device)
            with one_thread():
                pixels = hwc(to_pixels(loaded.decode(codes)))
            originals = np.stack([source.pixels(i, m.resolution) for i in indices[part]]) if source else None
            yield indices[part], originals, pixels

    with process_group(device) as rank_device:
        values = _write_pictures(out, record, decode(rank_device), {"n": len(rows)})
    return Result("codes decoded", values, rdpm_command("eval", "fid", out))


def _rows(indices: list[int], names: list[str], labels: Sequence[int | None]) -> list[dict[str, Any]]:
    return [
        {"file": folder.png_name(index), "index": index, "label": label, "source": name}
        for index, name, label in zip(indices, names, labels, strict=True)
    ]


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

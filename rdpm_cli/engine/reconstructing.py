"""reconstruct: images, or a code store, -> pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpm_cli import files, progress
from rdpm_cli.engine import pictures
from rdpm_cli.engine.runs import Result
from rdpm_cli.engine.tokenizing import find_tokenizer, source_of
from rdpm_cli.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rdpm_cli.codes.store import CodeStore
    from rdpm_cli.images.sources import ImageSource
    from rdpm_cli.images.transform import Pixels
    from rdpm_cli.tokenizer.model import Tokenizer

    Reconstructed = tuple[list[int], Pixels | None, Pixels]  # indices, originals, reconstructions

SHOWN = 16  # images in the grid of reconstructions


def reconstruct(
    target: str,
    out: Path,
    tokenizer: Path | None = None,
    *,
    seed: int = 0,
    limit: int | None = None,
    device: str = "auto",
) -> Result:
    """Images, or a code store, -> PNGs; where the images are there, also a side-by-side grid and PSNR, SSIM."""
    from rdpm_cli.images.sources import is_builtin

    if not is_builtin(target) and (Path(target) / "manifest.json").is_file():
        if seed:
            raise UsageError("--seed means nothing for a code store, which has its own noise", "leave it out")
        return _decode_store(Path(target), out, tokenizer, limit, device)
    path = find_tokenizer(tokenizer)
    from rdpm_cli.images.sources import open_source, spread

    source = open_source(target)
    from rdpm_cli.evaluation import evaluate
    from rdpm_cli.tokenizer import model
    from rdpm_cli.training.distributed import process_group

    loaded, content = model.load(path)
    images, size = spread(len(source), limit), loaded.cfg.autoencoder.resolution
    record = pictures.picture_record(
        "rdpm-reconstructions",
        {"tokenizer": content["digest"]},
        {"seed": seed},
        resolution=size,
        class_names=source.class_names,
        reference=pictures.source_reference(source, size),
        rows=[_row(i, source.names[i], source.labels[i] if source.labels else None) for i in images],
    )
    with process_group(device) as chosen:
        batches = evaluate.reconstructions(source, loaded.to(chosen), seed, chosen, limit)
        grid, scores = _write_pictures(out, record, batches, {"n": len(images), "seed": seed})
    values = {"folder": str(out), "grid": grid, **record["made_from"], **scores}
    return Result("images reconstructed", values, f"rdpm eval fid {out}")


def _decode_store(root: Path, out: Path, tokenizer: Path | None, limit: int | None, device: str) -> Result:
    """The first view of every image in a store, decoded."""
    import numpy as np

    from rdpm_cli.codes.manifest import NAMES, read_lines
    from rdpm_cli.codes.store import CodeStore
    from rdpm_cli.images.sources import spread
    from rdpm_cli.tokenizer import model
    from rdpm_cli.training.distributed import process_group

    loaded, content = model.load(tokenizer or root / "tokenizer.pt")
    store = CodeStore(root, content["digest"])
    m = store.manifest
    rows = np.array(spread(m.images, limit)) * m.views
    names = [line["name"] for line in read_lines(root / NAMES)]
    record = pictures.picture_record(
        "rdpm-reconstructions",
        {"tokenizer": content["digest"], "store": m.digest()},
        {"view": 0},
        resolution=m.resolution,
        class_names=list(m.class_names),
        reference=pictures.store_reference(root, m),
        rows=[_row(int(store.index[r]), names[int(store.index[r])], int(store.labels[r])) for r in rows],
    )
    with process_group(device) as chosen:
        source = source_of(m)
        if source is None:
            progress.say(
                f"the images {m.data.source} are not here, or are others now: no scores, no originals in the grid"
            )
        batches = _decoded(store, rows, loaded.to(chosen), source)
        grid, scores = _write_pictures(out, record, batches, {"n": len(rows)})
    values = {"folder": str(out), "grid": grid, **record["made_from"], **scores}
    return Result("codes decoded", values, f"rdpm eval fid {out}")


def _decoded(
    store: CodeStore, rows: NDArray[np.int64], tokenizer: Tokenizer, source: ImageSource | None
) -> Iterator[Reconstructed]:
    """Rows of a store, decoded in its own micro-batch on one thread, beside their originals where those are there."""
    import numpy as np
    import torch

    from rdpm_cli.codes.encode import original
    from rdpm_cli.images.tensors import hwc, to_pixels
    from rdpm_cli.threads import one_thread

    m, device = store.manifest, tokenizer.quantizer.books.device
    for start in range(0, len(rows), m.micro_batch):
        part = rows[start : start + m.micro_batch]
        codes = torch.from_numpy(store.codes(part).astype(np.int64)).to(device)
        with one_thread():
            recon = hwc(to_pixels(tokenizer.decode(codes)))
        indices = store.index[part].tolist()
        yield indices, np.stack([original(source, m, i) for i in indices]) if source else None, recon


def _write_pictures(
    out: Path, record: dict[str, Any], batches: Iterable[Reconstructed], facts: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Reconstructions -> PNGs, a grid of the first batch, and the folder's record. -> grid, facts and scores."""
    from rdpm_cli.evaluation import evaluate
    from rdpm_cli.signals import stop_on_signal

    count, sums = len(record["samples"]), evaluate.ReconstructionScores()
    shown: list[Pixels] = []
    with files.only_writer(out), stop_on_signal() as stop, progress.Bar("reconstruct", count, "images") as bar:
        pictures.claim(out, record)
        for indices, originals, recon in batches:
            _save_all(out, indices, recon)
            if originals is not None:
                sums.add(originals, recon)
            shown = shown or [side[:SHOWN] for side in (originals, recon) if side is not None]
            bar.advance(len(indices))
            stop.leave(f"{bar.done} of {count} pictures are in {out}")
    grid = _save_grid(out, shown, ["real", "recon"][-len(shown) :])
    scores = {**facts, **(sums.means() if sums.count else {})}
    pictures.finish(out, {**record, "scores": scores})
    return grid, scores


def _row(index: int, name: str, label: int | None) -> dict[str, Any]:
    return {"file": f"{index:06d}.png", "index": index, "label": None if label is None else int(label), "source": name}


def _save_all(out: Path, indices: Iterable[int], images: Iterable[Pixels]) -> None:
    from rdpm_cli.images import writers

    for index, pixels in zip(indices, images, strict=True):
        writers.save_png(out / f"{index:06d}.png", pixels)


def _save_grid(out: Path, rows: list[Pixels], labels: Sequence[str] = ()) -> str:
    """Rows of images under one another -> the file's name."""
    import numpy as np

    from rdpm_cli.images import writers

    path = out / "previews" / "grid.png"
    writers.save_png(path, writers.grid(np.concatenate(rows), len(rows[0]), labels))
    return str(path)

"""verify: is a code store, or a model file, what was written?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpm_cli import files
from rdpm_cli.engine.runs import Result
from rdpm_cli.engine.tokenizing import source_of
from rdpm_cli.errors import CheckpointError, DataError, UsageError

if TYPE_CHECKING:
    from rdpm_cli.codes.manifest import Manifest

CLOSE = 0.05  # dB: another machine's last bits move a PSNR by less
HINT = "name a code store of `rdpm tokenize`, or a tokenizer.pt, generator.pt, judge.pt or checkpoints/step-*.pt"


def verify(target: Path, decode: int = 0, device: str = "auto") -> Result:
    """Look at every byte. decode: also decode so many images of a store. Raises DataError naming what is damaged."""
    if not target.exists():
        raise UsageError(f"{target} does not exist", HINT)
    if target.is_dir():
        if not any((target / name).is_file() for name in ("manifest.json", "run.json")):
            raise DataError(f"{target} is a folder without manifest.json, so no code store", HINT)
        return Result("the code store is whole", _store(target, decode, device))
    if decode:
        raise UsageError(f"--decode is for code stores, and {target} is a file", "leave it out")
    return Result("the checkpoint is whole", _checkpoint(target))


def _store(root: Path, decode: int, device: str) -> dict[str, Any]:
    from rdpm_cli.codes.check import check_store

    m = check_store(root)
    names = [*m.files, *(name for shard in m.shards for name in shard.sha256)]
    values = {
        "store": str(root),
        "digest": m.digest(),
        "tokenizer": m.tokenizer,
        "images": m.images,
        "bad": m.bad,
        "rows": m.rows,
        "shards": len(m.shards),
        "files": len(names) + 1,
        "bytes": sum((root / name).stat().st_size for name in names),
    }
    return {**values, **(_decoded(root, m, decode, device) if decode else {})}


def _decoded(root: Path, m: Manifest, count: int, device: str) -> dict[str, Any]:
    """Decode some of the recorded images again, and compare. Raises DataError where one is not what it was."""
    from rdpm_cli.codes.quality import decoded_psnr
    from rdpm_cli.codes.store import CodeStore
    from rdpm_cli.images.sources import spread
    from rdpm_cli.tokenizer import model
    from rdpm_cli.training.distributed import process_group

    source = source_of(m)
    if source is None:
        raise UsageError(
            f"--decode compares with the images {m.data.source}, which are not here, or are others now",
            "leave out --decode, or put them there",
        )
    chosen = [m.samples[place] for place in spread(len(m.samples), count)]
    tokenizer, content = model.load(root / "tokenizer.pt")
    with process_group(device) as place:
        found = decoded_psnr(CodeStore(root, content["digest"]), [s.index for s in chosen], tokenizer.to(place), source)
    for sample, value in zip(chosen, found, strict=True):
        if abs(value - sample.psnr) > CLOSE:
            raise DataError(
                f"{root}: image {sample.index} ({source.names[sample.index]}) decodes at {value:.2f} dB, and "
                f"{sample.psnr:.2f} dB was recorded",
                "the images have changed since, or this machine computes otherwise",
            )
    mean = sum(found) / len(found)
    return {
        "decoded": len(found),
        "psnr": round(mean, 2),
        "recorded": round(sum(s.psnr for s in chosen) / len(chosen), 2),
    }


def _checkpoint(path: Path) -> dict[str, Any]:
    """The seal of a file, then what loading it checks, the digests above all."""
    from rdpm_cli import modelfile, tensorfile
    from rdpm_cli.training import checkpoint

    step = checkpoint.NAME.fullmatch(path.name)
    try:
        sealed = checkpoint.check(path) if step else tensorfile.check_whole(path)
    except tensorfile.Unreadable as error:
        said = f"{path} is damaged, or no checkpoint: {tensorfile.reason(error)}"
        raise CheckpointError(said, "copy or make it again") from error
    seal = {} if sealed else {"seal": "absent: members compared with their CRC"}
    about = {**seal, "bytes": path.stat().st_size, "sha256": files.sha256_file(path)}
    if step:
        return {"file": str(path), "kind": "state of training", "step": int(step[1]), **about}
    content = modelfile.load(path)
    kind = modelfile.FORMATS[content["format"]]
    if kind == "generator":
        from rdpm_cli.generator import model as generator_file

        generator_file.load(path)
    elif kind == "judge":
        from rdpm_cli.evaluation import judge

        judge.load(path)
    else:
        from rdpm_cli.tokenizer import model as tokenizer_file

        tokenizer_file.unpack(content, str(path))
    return {
        "file": str(path),
        "kind": kind,
        "digest": content["digest"],
        **about,
    }

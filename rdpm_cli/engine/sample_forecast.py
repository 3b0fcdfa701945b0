"""`sample --dry-run`: what a job would draw and write, and what of it is there already."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rdpm_cli import files
from rdpm_cli.engine import pictures
from rdpm_cli.engine.runs import Result
from rdpm_cli.errors import RunError

if TYPE_CHECKING:
    from rdpm_cli.engine.sample_files import Part
    from rdpm_cli.engine.sampling import Request

PNG_OVERHEAD = 1024  # bytes of an image that does not compress, beside its pixels


def forecast(request: Request, part: Part, device: str) -> Result:
    """What the same command without --dry-run would do; nothing is drawn or written.

    Raises UsageError for a folder that holds something else, RunError where the disk is too small.
    """
    from rdpm_cli.training.distributed import pick_device

    out, chosen = request.out, pick_device(device)
    files.check_folder(out)
    pictures.check(out, request.record)
    written = request.files(chosen.type)
    own = written.pieces[part.place :: part.count]
    lacking = [piece for piece in own if written.lacks(piece)]
    size, free = sum(map(len, lacking)) * _image_bytes(request), files.free_bytes(out)
    if size > free:
        raise RunError(
            f"disk too small: {size:,} bytes at most are to be written to {out}, {free:,} are free",
            "free some space, or name a folder on another disk",
        )
    values = {
        "folder": str(out),
        "checkpoint": request.loaded.digest,
        "classes": len(set(request.labels)),
        "resolution": request.record["resolution"],
        "samples": len(request.labels),
        "samples_of_this_part": sum(map(len, own)),
        "samples_missing": sum(map(len, lacking)),
        "pieces": len(own),
        "pieces_missing": len(lacking),
        "micro_batch": written.micro_batch,
        "bytes_at_most": size,
        "free_bytes": free,
        "device": chosen.type,
        "options": request.record["options"],
    }
    return Result("nothing drawn or written: this is a dry run", values)


def _image_bytes(request: Request) -> int:
    """Bytes of a sample at most: its PNG, and twice its pixels while samples.npz is made from chunks."""
    pixels = 3 * request.record["resolution"] ** 2
    outputs = request.outputs
    return (pixels + PNG_OVERHEAD) * outputs.png + 2 * pixels * outputs.npz

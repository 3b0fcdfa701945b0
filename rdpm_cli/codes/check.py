"""Is a store what its manifest says? Every file is looked at; every one that is wrong is named."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdpm_cli.codes.manifest import (
    BAD,
    MANIFEST,
    NAMES,
    THESE_AGAIN,
    TOKENIZER,
    Manifest,
    Shard,
    npy_bytes,
    read_bad,
    read_lines,
    shard_arrays,
    shard_files,
    wrong_files,
)
from rdpm_cli.errors import DamagedError
from rdpm_cli.tokenizer import model

ROWS_AT_ONCE = 4096  # of codes looked at: memory is flat


def check_store(root: Path) -> Manifest:
    """Checksums, counts, ranges, order, the tokenizer's digest. Raises DataError naming every file that is wrong."""
    manifest = Manifest.load(root)
    found = [*_manifest_file(root, manifest), *_beside(root, manifest)]
    for number, shard in enumerate(manifest.shards):
        found += _shard(root, manifest, number, shard)
    if not found:
        found = [*_counts(manifest), *_names(root, manifest), *_left_out(root, manifest), *_tokenizer(root, manifest)]
    if found:
        raise DamagedError(root, found, THESE_AGAIN)
    return manifest


def _manifest_file(root: Path, manifest: Manifest) -> Iterator[str]:
    """Its content has its own checksum; what does not count as content must be as it was written, too."""
    if (root / MANIFEST).read_bytes() != manifest.text().encode():
        yield f"{MANIFEST} is not as it was written"


def _beside(root: Path, manifest: Manifest) -> Iterator[str]:
    beside = {TOKENIZER, NAMES, *([BAD] if manifest.bad else [])}
    if set(manifest.files) != beside:
        yield f"{MANIFEST} lists {', '.join(sorted(manifest.files))}, not {', '.join(sorted(beside))}"
    yield from wrong_files(root, manifest.files)


def _shard(root: Path, manifest: Manifest, number: int, shard: Shard) -> Iterator[str]:
    """A shard's files; their content is looked at where the checksums hold."""
    names = shard_files(number, manifest.latents)
    if list(shard.sha256) != list(names.values()):
        yield f"{MANIFEST} lists {', '.join(shard.sha256)} for shard {number}"
        return
    arrays = shard_arrays(manifest, shard.images)
    wrong = list(wrong_files(root, shard.sha256, {names[kind]: npy_bytes(*array) for kind, array in arrays.items()}))
    yield from wrong or _content(root, manifest, number, shard)


def _content(root: Path, manifest: Manifest, number: int, shard: Shard) -> Iterator[str]:
    names, arrays = shard_files(number, manifest.latents), {}
    for kind, (dtype, shape) in shard_arrays(manifest, shard.images).items():
        try:
            array: NDArray[Any] = np.load(
                root / names[kind], mmap_mode="r" if shard.images else None, allow_pickle=False
            )
        except (OSError, ValueError, EOFError) as error:
            yield f"{names[kind]} cannot be read: {error}"
            return
        if array.dtype != dtype or array.shape != shape:
            yield f"{names[kind]} holds {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}"
            return
        arrays[kind] = array
    codes, labels, index = arrays["codes"], arrays["labels"], arrays["index"]
    highest = max((int(codes[i : i + ROWS_AT_ONCE].max()) for i in range(0, len(codes), ROWS_AT_ONCE)), default=0)
    if highest >= manifest.codes:
        yield f"{names['codes']} holds code {highest}, and there are {manifest.codes}"
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(manifest.class_names):
        yield f"{names['labels']} holds labels {labels.min()} to {labels.max()} of {len(manifest.class_names)} classes"
    own, images = manifest.shard_range(number), index[:: manifest.views]
    ordered = np.array_equal(index, np.repeat(images, manifest.views)) and bool((np.diff(images) > 0).all())
    if len(images) and not (ordered and own.start <= images[0] and images[-1] < own.stop):
        yield f"{names['index']} is not in the order of the images {own.start} to {own.stop - 1}"
    if manifest.latents and not all(
        np.isfinite(arrays["latents"][i : i + ROWS_AT_ONCE]).all()
        for i in range(0, len(arrays["latents"]), ROWS_AT_ONCE)
    ):
        yield f"{names['latents']} holds values that are not finite"


def _counts(manifest: Manifest) -> Iterator[str]:
    images, rows = sum(s.images for s in manifest.shards), sum(s.rows for s in manifest.shards)
    told = (len(manifest.shards), manifest.images, manifest.rows, manifest.images + manifest.bad)
    found = (manifest.shard_count, images, rows, manifest.data.count)
    if told != found or rows != images * manifest.views:
        yield f"{MANIFEST} counts {told} shards, images, rows and all images, where there are {found}"


def _names(root: Path, manifest: Manifest) -> Iterator[str]:
    if [line.get("index") for line in read_lines(root / NAMES)] != list(range(manifest.data.count)):
        yield f"{NAMES} does not name the images 0 to {manifest.data.count - 1} in order"


def _left_out(root: Path, manifest: Manifest) -> Iterator[str]:
    """bad.jsonl names the images that the shards lack, in order, and no other."""
    kept: set[int] = set()
    for number in range(len(manifest.shards)):
        kept.update(np.load(root / shard_files(number, False)["index"], allow_pickle=False).tolist())
    lacking = [index for index in range(manifest.data.count) if index not in kept]
    if [bad.index for bad in read_bad(root / BAD)] != lacking:
        yield f"{BAD} does not name the {len(lacking)} images that were left out"


def _tokenizer(root: Path, manifest: Manifest) -> Iterator[str]:
    digest = model.load(root / TOKENIZER)[1]["digest"]
    if digest != manifest.tokenizer:
        yield f"{TOKENIZER} is tokenizer {digest[:12]}, and the codes are of {manifest.tokenizer[:12]}"

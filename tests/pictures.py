"""Pictures for tests: small files, zips, tars and parquet files of them, and the real images next to the project."""

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from numpy.typing import NDArray
from PIL import Image
from pyarrow import parquet

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def random_pixels(count: int, side: int) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def real(name: str) -> str:
    if not (REAL_DATA / name).exists():
        pytest.skip(f"../shared/data/{name} is not here")
    return str(REAL_DATA / name)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """The bytes of the image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_files(root: Path, *names: str) -> Path:
    """Small images of different colours under these relative names."""
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        random_image(20, 18, seed).save(root / name)
    return root


def make_zip(path: Path, *names: str) -> Path:
    """A .zip of one small PNG under each of these member names."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, encoded(random_image(8, 8)))
    return path


def make_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """An uncompressed .tar of these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_parquet(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[int | None] | None,
    class_names: Sequence[str] | None = None,
    group: int = 100,
) -> Path:
    """As Hugging Face's `datasets` packs images: struct columns, class names in the schema, small row groups."""
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    rows = [{"bytes": raw, "path": f"{row}.png"} for row, raw in enumerate(images)]
    columns = {"image": pyarrow.array(rows, kind)}
    features: dict[str, object] = {"image": {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pyarrow.array(labels, pyarrow.int64())
        features["label"] = {"_type": "ClassLabel", **({"names": list(class_names)} if class_names else {})}
    table = pyarrow.table(columns, metadata={"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=group, write_batch_size=8)
    return path


def adm_center_crop_arr(pil_image: Image.Image, image_size: int) -> NDArray[np.uint8]:
    """`center_crop_arr` of openai/guided-diffusion, image_datasets.py, transcribed with Pillow's new names."""
    while min(*pil_image.size) >= 2 * image_size:
        halved = tuple(x // 2 for x in pil_image.size)
        pil_image = pil_image.resize((halved[0], halved[1]), resample=Image.Resampling.BOX)
    scale = image_size / min(*pil_image.size)
    scaled = tuple(round(x * scale) for x in pil_image.size)
    pil_image = pil_image.resize((scaled[0], scaled[1]), resample=Image.Resampling.BICUBIC)
    arr = np.array(pil_image)
    crop_y = (arr.shape[0] - image_size) // 2
    crop_x = (arr.shape[1] - image_size) // 2
    return arr[crop_y : crop_y + image_size, crop_x : crop_x + image_size]

"""Folders of samples: samples.json both ways, the files of a job, and who may write them."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rdpm_cli import files
from rdpm_cli.data import folder, pictures
from rdpm_cli.data.folder import SampleFiles
from rdpm_cli.data.pixels import Pixels
from rdpm_cli.errors import DataError, RunError, UsageError

SIDE, COUNT = 8, 5
LABELS = [0, 1, 1, 0, 2]


def images(count: int = COUNT) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def record_of(*, png: bool = True, **options: Any) -> dict[str, Any]:
    return folder.picture_record(
        "rdpm-samples", {"checkpoint": "c" * 64}, {"cfg": 1.0, **options}, resolution=SIDE, class_names=list("abc"),
        reference=None, rows=folder.sample_rows(LABELS, png),
    )  # fmt: skip


def write_folder(out: Path, *, png: bool = True, npz: bool = False) -> Path:
    """A finished folder of `images()`."""
    record = record_of(png=png)
    folder.claim(out, record)
    sample_files = SampleFiles(out, COUNT, 2, png=png)
    for batch in sample_files.batches:
        sample_files.write(batch, images()[batch.start : batch.stop])
    if npz:
        sample_files.save_npz(SIDE, LABELS)
        record["npz"] = folder.NPZ
    folder.finish(out, record)
    return out


def read_all(opened: folder.ImageSet) -> Pixels:
    return np.concatenate(list(opened.read([range(2), range(2, opened.count)])))


# ---- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("png", "npz"), [(True, False), (False, True), (True, True)])
def test_a_written_folder_is_read_back(tmp_path: Path, png: bool, npz: bool) -> None:
    opened = folder.open_samples(write_folder(tmp_path, png=png, npz=npz))
    np.testing.assert_array_equal(read_all(opened), images())
    assert (opened.count, opened.resolution, opened.labels) == (COUNT, SIDE, LABELS)
    assert (opened.class_names, opened.record["options"]) == (list("abc"), {"cfg": 1.0})


def test_exactly_the_listed_files_are_read_and_labels_are_known_only_if_all_are(tmp_path: Path) -> None:
    record = files.read_json(write_folder(tmp_path) / folder.RECORD)
    pictures.save_png(tmp_path / "000009.png", images()[0])
    record["samples"][2]["label"] = None
    folder.finish(tmp_path, record)
    opened = folder.open_samples(tmp_path)
    assert (opened.count, opened.labels) == (COUNT, None)


@pytest.mark.parametrize(
    ("key", "value", "token", "npz"),
    [
        ("file", "absent.png", "absent.png", False),
        ("label", "many", "samples.json", False),
        ("resolution", None, "samples.json", False),
        ("resolution", 16, "000000.png", False),
        ("resolution", 16, "samples.npz", True),
    ],
)
def test_a_record_that_does_not_fit_its_folder_is_refused(
    tmp_path: Path, key: str, value: Any, token: str, npz: bool
) -> None:
    record = files.read_json(write_folder(tmp_path, png=not npz, npz=npz) / folder.RECORD)
    (record["samples"][1] if key in ("file", "label") else record)[key] = value
    files.write_json(tmp_path / folder.RECORD, record)
    with pytest.raises(DataError) as error:
        read_all(folder.open_samples(tmp_path))
    assert token in error.value.message


def test_an_npz_takes_options_and_labels_from_the_record_next_to_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_folder(tmp_path, npz=True) / folder.NPZ
    opened = folder.open_npz(path)
    assert (opened.labels, opened.class_names, opened.record["options"]) == (LABELS, list("abc"), {"cfg": 1.0})
    np.testing.assert_array_equal(read_all(opened), images())
    np.savez(tmp_path / "other.npz", images()[:3])
    other = folder.open_npz(tmp_path / "other.npz")
    assert (other.count, other.labels, other.record) == (3, None, {})
    np.savez(path, images(), np.array([2, 2, 2, 2, 2]))  # no longer the recorded one
    opened = folder.open_npz(path)
    assert (opened.labels, opened.record) == ([2] * 5, {})
    assert folder.RECORD in capsys.readouterr().err


# ---- claims --------------------------------------------------------------------------------------------------------


def test_a_folder_belongs_to_one_record(tmp_path: Path) -> None:
    for _ in range(2):  # the same job again
        folder.claim(tmp_path, record_of())
        assert folder.is_unfinished(tmp_path)
    with pytest.raises(UsageError) as error:
        folder.claim(tmp_path, record_of(cfg=2.0))
    assert "options.cfg: 1.0 -> 2.0" in error.value.message
    folder.finish(tmp_path, record_of())
    assert not folder.is_unfinished(tmp_path)


def test_a_folder_of_something_else_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "holiday.png").write_bytes(b"mine")
    with pytest.raises(UsageError) as error:
        folder.claim(tmp_path, record_of())
    assert str(tmp_path) in error.value.message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["holiday.png"]


@pytest.mark.parametrize(("index", "count"), [(0, 1), (1, 4)])
def test_two_writers_of_one_part_are_refused(tmp_path: Path, index: int, count: int) -> None:
    (tmp_path / ".000001.png.99.tmp").write_bytes(b"half")  # of a killed process
    with folder.writing(tmp_path, index, count), folder.writing(tmp_path, 2, 4):
        assert bool(list(tmp_path.glob("*.tmp"))) == (count > 1)  # only a single writer knows that nobody writes it
        second = folder.writing(tmp_path, index, count)
        with pytest.raises(RunError, match="pid"):
            second.__enter__()


# ---- the files of a job --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "micro_batch", "batches"), [(800, 32, 25), (5, 2, 3), (3, 8, 1)])
def test_micro_batches_cover_all_samples_in_order(count: int, micro_batch: int, batches: int) -> None:
    cut = SampleFiles(Path("s"), count, micro_batch, png=True).batches
    assert [index for batch in cut for index in batch] == list(range(count))
    assert (len(cut), {len(batch) for batch in cut[:-1]} <= {micro_batch}) == (batches, True)


@pytest.mark.parametrize("png", [True, False])
def test_a_micro_batch_is_missing_until_its_samples_are_there(tmp_path: Path, png: bool) -> None:
    sample_files = SampleFiles(tmp_path, COUNT, 2, png=png)
    first, second, _ = sample_files.batches
    assert sample_files.is_missing(first)
    sample_files.write(first, images()[:2])
    assert (sample_files.is_missing(first), sample_files.is_missing(second)) == (False, True)
    pixels = sample_files.read(first)
    assert pixels is not None
    np.testing.assert_array_equal(pixels, images()[:2])
    with pytest.raises(DataError, match=r"000002\.png"):
        sample_files.save_npz(SIDE, LABELS)
    assert not (tmp_path / folder.NPZ).exists()
    (tmp_path / "000001.png").unlink()
    assert sample_files.is_missing(first)


def test_an_npz_is_packed_with_one_micro_batch_in_memory_and_replaces_the_pngs(tmp_path: Path) -> None:
    side, count = 64, 640
    sample_files = SampleFiles(tmp_path, count, 8, png=False)
    for batch in sample_files.batches:
        sample_files.write(batch, np.full((len(batch), side, side, 3), batch.start % 251, np.uint8))
    tracemalloc.start()
    sample_files.save_npz(side, list(range(count)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < count * side * side * 3 / 4
    assert [path.name for path in tmp_path.iterdir()] == [folder.NPZ]
    assert not any(map(sample_files.is_missing, sample_files.batches))
    with np.load(tmp_path / folder.NPZ) as archive:
        assert archive["arr_0"][:, 0, 0, 0].tolist() == [index // 8 * 8 % 251 for index in range(count)]
        assert archive["arr_1"].tolist() == list(range(count))


def test_notes_are_kept_once_after_those_of_the_previous_record(tmp_path: Path) -> None:
    sample_files = SampleFiles(tmp_path, COUNT, 2, png=True)
    folder.finish(tmp_path, {"made_with": [{"device": "gpu"}]})
    for _ in range(2):
        sample_files.note({"device": "cpu"})
    assert sample_files.notes() == [{"device": "gpu"}, {"device": "cpu"}]
    folder.finish(tmp_path, {"made_with": sample_files.notes()})
    assert sample_files.notes() == [{"device": "gpu"}, {"device": "cpu"}]

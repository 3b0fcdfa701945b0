"""Stores of items of any length: rows are what was written, whatever is padded; durations; faults of making one.

Legend: N rows, T steps, C channels, S latents, U units of a text."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sounds import WORDS, finish, making, save_tokenizer, strings, write_speech
from stores import content, flip, synthetic_plan

from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.codes.ragged import RaggedStore, latents_of, open_store
from rdpm_cli.codes.store import NAMES, TOKENIZER, CodeStore, Manifest, Speech, json_lines, verify
from rdpm_cli.codes.write import tabulate, write_shard
from rdpm_cli.data.audio import AudioSource, open_audio
from rdpm_cli.errors import AudioError, DataError

SPOKEN = strings(10)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> AudioSource:
    return open_audio(write_speech(tmp_path_factory.mktemp("sound"), SPOKEN))


@pytest.fixture(scope="module")
def file(source: AudioSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.pt", "sin", source)


# ---- rows ----------------------------------------------------------------------------------------------------------


def written(root: Path, views: int) -> tuple[RaggedStore, dict[str, list[NDArray[Any]]]]:
    """A store of random arrays of seven items in shards of 3, written row by row; and the rows."""
    random, root = np.random.default_rng(0), root / "codes"
    lengths, units = random.integers(1, 9, 7), random.integers(1, 5, 7)
    rows: dict[str, list[NDArray[Any]]] = {
        "codes": [random.integers(0, 64, (n, 4)).astype(np.uint16) for n in lengths.repeat(views)],
        "latents": [random.standard_normal((n, 4)).astype(np.float16) for n in lengths],
        "text": [random.integers(0, 5, n).astype(np.int32) for n in units],
        "durations": [
            random.multinomial(S, np.ones(U) / U).astype(np.uint16) for S, U in zip(lengths, units, strict=True)
        ],
        "speakers": [np.array([number % 2], np.int32) for number in range(7) for _ in range(views)],
    }
    speech = Speech(text="words", units=tuple("abcde"), speakers=("x", "y"), durations=True, rate=25)
    plan = synthetic_plan(7, (-1,), views=views, shard_images=3, speech=speech).model_copy(update={"class_names": ()})
    root.mkdir(parents=True)
    (root / TOKENIZER).write_bytes(b"none")
    (root / NAMES).write_bytes(json_lines({"index": index, "name": str(index)} for index in range(7)))
    for shard, items in enumerate(plan.shard_ranges):
        own, all_views = slice(items.start, items.stop), slice(items.start * views, items.stop * views)
        arrays = {name: np.concatenate(values[own]) for name, values in rows.items()}
        arrays |= {name: np.concatenate(rows[name][all_views]) for name in ("codes", "speakers")}
        arrays["lengths"] = np.array([len(row) for row in rows["codes"][all_views]], np.int32)
        arrays |= {"units": units[own].astype(np.int32), "index": np.repeat(np.arange(7)[own], views)}
        write_shard(root, shard, arrays, [])
    tabulate(root, plan).write(root)
    store = open_store(root)
    assert isinstance(store, RaggedStore)
    return store, rows


@pytest.mark.parametrize("views", [1, 2])
def test_rows_are_what_was_written_in_any_order_and_padding_has_its_values(views: int, tmp_path: Path) -> None:
    store, rows = written(tmp_path, views)
    assert len(store) == 7 * views
    assert store.index.tolist() == [index for index in range(7) for _ in range(views)]
    assert store.columns["speakers"].tolist() == np.concatenate(rows["speakers"]).tolist()
    for asked in ([0], [6 * views, 0, 3], list(range(7 * views))[::-1], [4, 4]):
        got = {"codes": store.codes(np.array(asked)).swapaxes(1, 2), "latents": store.latents(np.array(asked)).mT}
        got |= {"text": store.text(np.array(asked)), "durations": store.durations(np.array(asked))}
        assert got["codes"].shape[1] == got["latents"].shape[1] == store.longest(np.array(asked))
        for name, array in got.items():
            assert array.dtype == rows[name][0].dtype
            for row, padded in zip(asked, array, strict=True):
                expected = rows[name][row if name == "codes" else row // views]
                assert np.array_equal(padded[: len(expected)], expected)
                assert (padded[len(expected) :] == (-1 if name == "text" else 0)).all()
        exists = store.exists(np.array(asked))
        assert exists.sum(1).tolist() == [len(rows["codes"][row]) for row in asked]
        assert (np.diff(exists.astype(int), axis=1) <= 0).all()


@pytest.mark.parametrize("views", [1, 2])
def test_a_store_has_the_texts_speakers_and_durations_of_its_source(
    views: int, source: AudioSource, file: Path, tmp_path: Path
) -> None:
    store = finish(making(tmp_path / "codes", source, file, views=views))
    m, rows, words = store.manifest, np.arange(len(store)), tuple(sorted(WORDS))
    assert m.speech == Speech(text="words", units=words, speakers=("ann", "bob"), durations=True, rate=25)
    assert m.condition_names == words
    assert all(item["mel_distance"] > 0 for item in m.samples)
    for row, text, durations in zip(rows, store.text(rows), store.durations(rows), strict=True):
        string = SPOKEN[row // views]
        assert [m.condition_names[unit] for unit in text if unit >= 0] == [name for name, _ in string]
        assert durations[durations > 0].tolist() == [latents for _, latents in string]
        assert durations.sum() == store.lengths[row] == sum(latents for _, latents in string)
    assert store.columns["speakers"].tolist() == [number // views % 2 for number in rows]


def speaker_source(root: Path, speakers: int, each: int) -> AudioSource:
    """Short recordings of many speakers, whose names do not depend on how many there are."""
    spoken = [[("low", 1)]] * speakers * each
    write_speech(root, spoken)
    rows = [json.loads(line) for line in (root / "manifest.jsonl").read_text().splitlines()]
    lines = [json.dumps({**row, "speaker": f"reader {number % speakers}"}) for number, row in enumerate(rows)]
    (root / "manifest.jsonl").write_text("\n".join(lines))
    return open_audio(str(root))


def test_whole_speakers_are_held_out_by_their_names(file: Path, tmp_path: Path) -> None:
    """Speakers of rows are those of the manifest, counted by their index; one store has more of them than the other."""
    held_of = []
    for speakers in (60, 90):
        source = speaker_source(tmp_path / f"sound{speakers}", speakers, 2)
        settings = {"views": 2, "split": "speaker", "shard_images": 64}
        store = finish(making(tmp_path / f"codes{speakers}", source, file, **settings))
        training, held = store.split()
        assert sorted([*training, *held]) == list(range(4 * speakers))
        seen, unseen = (set((store.index[rows] % speakers).tolist()) for rows in (training, held))
        assert not seen & unseen
        assert 1 <= len(unseen) <= 0.1 * speakers
        held_of.append(unseen)
    assert held_of[0] == {number for number in held_of[1] if number < 60}


def test_of_two_speakers_one_is_held_out_and_by_default_some_recordings(
    source: AudioSource, file: Path, tmp_path: Path
) -> None:
    for split, speakers in (("speaker", 1), ("row", 2)):
        store = finish(making(tmp_path / split, source, file, split=split))
        training, held = store.split()
        assert len(set(store.columns["speakers"][training])) == speakers
        assert (len(held) == 5) == (split == "speaker")
        assert ("split" in (tmp_path / split / "manifest.json").read_text()) == (split == "speaker")


# ---- durations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "length", "expected"),
    [
        ([0.04, 0.04], 2, [1, 1]), ([0.05, 0.05, 0.02], 3, [1, 1, 1]), ([0.04], 5, [5]), ([1, 1], 10, [10, 0]),
        ([0.01, 0.1], 3, [0, 3]), ([0.03, 0.03, 0.03], 2, [1, 1, 0]), ([0.5, 0.5, 0.5], 37, [12, 13, 12]),
        ([0.1, 0.2], 9, [2, 7]),
    ],
)  # fmt: skip
def test_ends_of_units_are_rounded_and_the_last_one_takes_the_rest(
    seconds: list[float], length: int, expected: list[int]
) -> None:
    assert latents_of(seconds, 25, length) == expected


def test_durations_sum_to_the_length_and_ends_are_within_half_a_latent() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        seconds = random.exponential(0.2, random.integers(1, 9)).tolist()
        length = math.ceil(sum(seconds) * 25)
        durations = latents_of(seconds, 25, length)
        assert sum(durations) == length
        assert min(durations) >= 0
        ends, exact = np.cumsum(durations)[:-1], 25 * np.cumsum(seconds)[:-1]
        assert (np.abs(ends - exact) <= 0.5 + 1e-9).all()


# ---- making one ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 3, 6, 8])
@pytest.mark.parametrize("workers", [1, 2])
def test_bytes_do_not_depend_on_an_interruption(
    pieces: int, workers: int, source: AudioSource, file: Path, tmp_path: Path
) -> None:
    settings = {"views": 2, "latents": True}
    cut = making(tmp_path / "cut", source, file, workers=workers, **settings)
    cut.cut(pieces)
    assert not (cut.root / "manifest.json").exists()
    finish(cut)
    finish(making(tmp_path / "whole", source, file, **settings))
    assert content(cut.root) == content(tmp_path / "whole")


def test_a_flipped_byte_and_a_missing_file_are_named(source: AudioSource, file: Path, tmp_path: Path) -> None:
    root = finish(making(tmp_path / "codes", source, file, latents=True)).root
    kinds = ("codes", "lengths", "latents", "units", "text", "durations", "speakers", "index")
    for kind in kinds:
        path = root / f"{kind}-00001.npy"
        for damage in (flip, Path.unlink):
            kept = path.read_bytes()
            damage(path)
            with pytest.raises(DataError, match=path.name):
                verify(root)
            path.write_bytes(kept)
    assert verify(root).rows == 10
    (root / "text-00001.npy").unlink()
    with pytest.raises(DataError, match=r"text-00001\.npy"):
        open_store(root)
    assert run_cli(["verify", str(root)]) == 3


def test_bad_recordings_are_listed_and_the_rest_keeps_its_alignment(file: Path, tmp_path: Path) -> None:
    """One of a shard, and a whole shard."""
    spoken, bad = strings(12), [1, 4, 5, 6, 7]
    whole_source, part_source = (open_audio(write_speech(tmp_path / name, spoken)) for name in ("a", "b"))
    for index in bad:
        (tmp_path / "b" / f"{index:03d}.wav").write_bytes(b"not a sound")
    whole = finish(making(tmp_path / "whole", whole_source, file, latents=True))
    with pytest.raises(AudioError, match=r"001\.wav"):
        list(making(tmp_path / "stopped", part_source, file).run())
    one = making(tmp_path / "part", part_source, file, latents=True, on_bad="skip", max_bad=0.5)
    assert sum(one.run()) == 12
    part = open_store(one.root)
    assert isinstance(part, RaggedStore)
    listed = [json.loads(line) for line in (one.root / "bad.jsonl").read_text().splitlines()]
    assert [line["index"] for line in listed] == bad
    assert [line["name"] for line in listed] == [f"{index:03d}.wav" for index in bad]
    good = np.array([index for index in range(12) if index not in bad])
    assert part.index.tolist() == good.tolist()
    for position, index in enumerate(good):
        for read in ("codes", "latents", "text", "durations"):
            a, b = getattr(part, read)(np.array([position])), getattr(whole, read)(np.array([index]))
            assert np.array_equal(a, b)
    assert part.columns["speakers"].tolist() == (good % 2).tolist()


def test_dense_stores_of_images_are_read_as_before(digits_codes: Path) -> None:
    store, plain = open_store(digits_codes), CodeStore(digits_codes)
    assert type(store) is CodeStore
    assert "speech" not in json.loads((digits_codes / "manifest.json").read_text())
    assert Manifest.load(digits_codes).version == 2
    rows = np.arange(72)
    assert np.array_equal(store.codes(rows), plain.codes(rows))
    assert store.longest(rows) is None
    assert store.exists(rows).all()


# ---- the command ---------------------------------------------------------------------------------------------------


def row(name: str, **values: Any) -> str:
    return json.dumps({"audio_filepath": name, **values}) + "\n"


@pytest.mark.parametrize(
    ("lines", "options", "code", "token"),
    [
        ([{}, {}], ["--units", "words"], 3, "texts"),
        ([{"text": "low"}, {"text": "..."}], ["--units", "words"], 2, "..."),
        ([{"text": "a-b", "word_seconds": [0.5]}, {"text": "c", "word_seconds": [1]}], ["--units", "words"], 3, "000"),
        ([{"text": "low"}, {"text": "low"}], ["--units", "letters"], 2, "--units"),
        ([{"text": "low"}, {"text": "low"}], ["--flip"], 2, "--flip"),
        ([{"text": "low"}, {"text": "low"}], ["--split", "speaker"], 3, "speakers"),
        ([{"text": "low", "speaker": "x"}] * 2, ["--split", "speaker"], 3, "speakers"),
    ],
)  # fmt: skip
def test_texts_that_cannot_be_kept_are_errors(
    lines: list[dict[str, Any]], options: list[str], code: int, token: str, file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write_speech(tmp_path / "sound", [[("low", 3)], [("high", 4)]])
    manifest = "".join(row(f"{number:03d}.wav", **values) for number, values in enumerate(lines))
    (tmp_path / "sound" / "manifest.jsonl").write_text(manifest)
    command = ["tokenize", str(tmp_path / "sound"), str(tmp_path / "codes"), "--tokenizer", str(file)]
    assert run_cli([*command, "--device", "cpu", "--quiet", *options]) == code
    assert token in capsys.readouterr().err
    assert not (tmp_path / "codes" / "manifest.json").exists()


@pytest.mark.parametrize("options", [["--units", "words"], ["--split", "speaker"]])
def test_options_of_sound_are_refused_for_images(
    options: list[str], image_folder: Path, tiny_tokenizer_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = ["tokenize", str(image_folder), str(tmp_path / "codes"), "--tokenizer", str(tiny_tokenizer_file)]
    assert run_cli([*command, "--device", "cpu", "--quiet", *options]) == 2
    assert options[0] in capsys.readouterr().err
    assert not (tmp_path / "codes" / "manifest.json").exists()

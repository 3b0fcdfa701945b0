"""Sources of sound: every layout in every packing, formats and rates, pieces of files, odd files and odd lists."""

import io
import json
import multiprocessing
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from pictures import make_files, make_tar, real

from rdpm_cli.data.audio import AudioSource, open_audio, wav_bytes, write_wav
from rdpm_cli.data.mel import Wave
from rdpm_cli.errors import AudioError, DataError, UsageError

RATE = 8000


def sine(hertz: float, seconds: float = 0.5, rate: int = RATE) -> Wave:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def encoded(wave: Any, kind: str = "WAV", rate: int = RATE, **options: Any) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=kind, **options)
    return buffer.getvalue()


def packed(root: Path, members: Mapping[str, bytes], packing: str = "folder") -> str:
    """The path of a folder, zip or tar of these members."""
    if packing == "folder":
        for name, content in members.items():
            (root / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "set" / name).write_bytes(content)
        return str(root / "set")
    if packing == "tar":
        return str(make_tar(root / "set.tar", members))
    with zipfile.ZipFile(root / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return str(root / "set.zip")


def row(name: str, **values: Any) -> bytes:
    """A line of a manifest."""
    return json.dumps({"audio_filepath": name, **values}).encode() + b"\n"


A, B = wav_bytes(sine(440), RATE), wav_bytes(sine(880, 0.25), RATE)
F, G = encoded(sine(440), "FLAC"), encoded(sine(880, 0.25), "FLAC")
LAYOUTS: dict[str, tuple[dict[str, bytes], dict[str, Any]]] = {
    "class folders": ({"cat/1.wav": A, "dog/1.wav": B}, {"labels": [0, 1], "class_names": ["cat", "dog"]}),
    "flat": ({"a.wav": A, "b.wav": B}, {}),
    "FSDD": (
        {"3_ann_0.wav": A, "7_bob_12.wav": B},
        {"labels": [3, 7], "texts": ["three", "seven"], "speakers": ["ann", "bob"]},
    ),
    "LJSpeech": (
        {"LJ/wavs/L-1.wav": A, "LJ/wavs/L-2.wav": B, "LJ/metadata.csv": b'L-1|Dr. "A"|Doctor "A"\nL-2|two|\n'},
        {"texts": ['Doctor "A"', "two"]},
    ),
    "AudioFolder, csv": (
        {"x/a.wav": A, "x/b.wav": B,
         "metadata.csv": b'file_name,transcription,speaker_id\nx/b.wav,"b, c",7\nx/a.wav,a,3'},
        {"texts": ["a", "b, c"], "speakers": ["3", "7"]},
    ),
    "AudioFolder, jsonl": (
        {"a.wav": A, "b.wav": B,
         "metadata.jsonl": b'{"file_name":"a.wav","text":"a"}\n{"file_name":"b.wav","text":"b"}'},
        {"texts": ["a", "b"]},
    ),
    "LibriSpeech": (
        {"9/1/9-1-0000.flac": F, "9/1/9-1-0001.flac": G, "9/1/9-1.trans.txt": b"9-1-0000 ONE TWO\n9-1-0001 SIX\n"},
        {"texts": ["ONE TWO", "SIX"], "speakers": ["9", "9"]},
    ),
    "LibriTTS": (
        {"9/1/9_1_0_0.wav": A, "9/1/9_1_0_1.wav": B, "9/1/9_1.trans.tsv": b"9_1_0_0\t1\tOne.\n9_1_0_1\tSix\tSix!\n"},
        {"texts": ["One.", "Six!"], "speakers": ["9", "9"]},
    ),
    "MLS": (
        {"audio/8/2/8_2_0.flac": F, "audio/9/1/9_1_0.flac": G, "transcripts.txt": b"9_1_0\tsix\n8_2_0\tone two\n"},
        {"texts": ["one two", "six"], "speakers": ["8", "9"]},
    ),
    "names of LibriSpeech": ({"10-1-0000.flac": F, "9-12-0003.flac": G}, {"speakers": ["10", "9"]}),
    "WebDataset": (
        {"0.wav": A, "0.json": b'{"text": "no", "speaker": "s"}', "0.txt": b"yes\n", "1.wav": B,
         "1.json": b'{"text": "b", "speaker": "t"}'},
        {"texts": ["yes", "b"], "speakers": ["s", "t"]},
    ),
    "WebDataset of classes": (
        {"0.wav": A, "0.cls": b"4\n", "1.wav": B, "1.cls": b"2"}, {"labels": [4, 2], "class_names": list("01234")},
    ),
    "manifest": (
        {"w/a.wav": A, "w/b.wav": B, "manifest.jsonl": row("w/a.wav", text="a b", word_seconds=[0.2, 0.3])
         + row("w/b.wav", text="c", word_seconds=[0.25])},
        {"texts": ["a b", "c"], "word_seconds": [[0.2, 0.3], [0.25]]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("packing", ["folder", "zip", "tar"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_recognised_in_every_packing(layout: str, packing: str, tmp_path: Path) -> None:
    members, expected = LAYOUTS[layout]
    source = open_audio(packed(tmp_path, members | {".hidden.wav": b""}, packing))
    assert (len(source), source.not_taken) == (2, {"hidden": 1})
    assert [name.rsplit("/")[-1] for name in source.names] == [
        n.rsplit("/")[-1] for n in members if n[-4:] in ".wav.flac"
    ]
    columns = {name: getattr(source, name) for name in ("labels", "texts", "speakers", "word_seconds")}
    assert columns == {name: expected.get(name) for name in columns}
    assert len(source.class_names) == 10 if layout == "FSDD" else source.class_names == expected.get("class_names", [])
    assert [source.seconds(0), source.seconds(1)] == [0.5, 0.25]
    for index, hertz in enumerate((440, 880)):
        wave = source.wave(index, RATE)
        assert (str(wave.dtype), wave.shape) == ("float32", (RATE // 2 // (index + 1),))
        assert np.abs(wave - sine(hertz, 0.5 / (index + 1))).max() < 1 / 32768


def test_shards_in_order_and_class_folders_across_them(tmp_path: Path) -> None:
    for number in range(3):
        make_tar(tmp_path / f"x-{number:02d}.tar", {"b/1.wav": A, "a/1.wav": B})
    pattern, folder = open_audio(str(tmp_path / "x-{00..02}.tar")), open_audio(str(tmp_path))
    assert list(pattern.names) == list(folder.names) == [f"x-0{n}.tar/{x}/1.wav" for n in range(3) for x in "ba"]
    assert (pattern.labels, pattern.class_names, pattern.digest()) == ([1, 0] * 3, ["a", "b"], folder.digest())
    assert pattern.seconds(4) == 0.5


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [("WAV", {"subtype": "PCM_24"}, 1e-6), ("WAV", {"subtype": "FLOAT"}, 0), ("FLAC", {}, 1e-4), ("OGG", {}, 0.05),
     ("MP3", {}, 0.1)],
)  # fmt: skip
@pytest.mark.parametrize("packing", ["folder", "zip"])
def test_formats(kind: str, options: dict[str, Any], tolerance: float, packing: str, tmp_path: Path) -> None:
    wave = sine(440, 1.0)
    source = open_audio(packed(tmp_path, {f"a.{kind.lower()}": encoded(wave, kind, **options)}, packing))
    assert source.seconds(0) == 1.0
    assert np.abs(source.wave(0, RATE) - wave).max() <= tolerance


def test_channels_are_averaged_and_resampling_keeps_the_frequency(tmp_path: Path) -> None:
    stereo = np.stack([sine(1000, 1.0, 44100), np.zeros(44100, np.float32)], 1)
    source = open_audio(packed(tmp_path, {"a.wav": encoded(stereo, rate=44100, subtype="FLOAT")}))
    assert np.array_equal(source.wave(0, 44100), stereo.mean(1))
    wave = source.wave(0, RATE)
    assert (str(wave.dtype), len(wave), int(np.abs(np.fft.rfft(wave)).argmax())) == ("float32", RATE, 1000)
    assert np.abs(wave - sine(1000, 1.0) / 2)[100:-100].max() < 0.01


def test_a_manifest_means_pieces_of_files_also_outside_its_folder(tmp_path: Path) -> None:
    whole = np.concatenate([sine(440), sine(880, 0.25)])
    write_wav(tmp_path / "books" / "long.wav", whole, RATE)
    path = str(tmp_path / "books" / "long.wav")
    rows = [row("../books/long.wav"), row(path, offset=0.5), row(path, offset=0.125, duration=0.25)]
    rows += [row(path, offset=0.7, duration=0.07), row(path, offset=0.6, duration=0.5)]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(b"".join(rows))
    source = open_audio(str(tmp_path / "set" / "train.jsonl"))
    assert (len(set(source.names)), source.texts, source.labels) == (5, None, None)
    pieces = [whole, whole[4000:], whole[1000:3000], whole[5600:]]
    for index, piece in enumerate(pieces):
        assert source.seconds(index) * RATE == pytest.approx(len(piece))
        assert np.abs(source.wave(index, RATE) - piece).max() < 1 / 32768
    for read in (source.seconds, lambda index: source.wave(index, RATE)):
        with pytest.raises(AudioError, match=r"0\.75 s"):
            read(4)


def test_the_digest_covers_every_column(tmp_path: Path) -> None:
    columns = {"text": "one", "speaker": "s", "word_seconds": [0.5], "label": 0}
    changes: list[dict[str, Any]] = [{}, {"text": "two"}, {"speaker": "t"}, {"word_seconds": [0.25]}, {"label": 1}]
    digests = []
    for number, change in enumerate([*changes, {"offset": 0.0}]):
        members = {"a.wav": A, "manifest.jsonl": row("a.wav", **(columns | change))}
        digests.append(open_audio(packed(tmp_path / str(number), members)).digest())
    assert len(set(digests)) == 6


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encoded(np.zeros(0)), "0 samples"), (encoded(np.full(9, np.nan), subtype="FLOAT"), "NaN"),
        (encoded(np.array([0, np.inf]), subtype="FLOAT"), "infinite"), (A[: len(A) // 2], "truncated"), (A[:20], ""),
        (b"", "recognised"), (b"hello " * 99, "recognised"), (F[: len(F) // 2], ""),
        (encoded(sine(440, 60), "OGG")[:25000], "truncated"), (encoded(sine(440, 60), "MP3")[:25000], "truncated"),
        (encoded(sine(440), rate=44101), "44101"), (encoded(sine(440, 60), rate=1), "resampled"),
    ],
    ids=range(12),  # the bytes of some hold the time
)  # fmt: skip
@pytest.mark.parametrize("packing", ["folder", "tar"])
def test_odd_files_are_named_with_the_reason(content: bytes, reason: str, packing: str, tmp_path: Path) -> None:
    """The suffix does not matter: libsndfile goes by content."""
    source = open_audio(packed(tmp_path, {"x/bad.wav": content, "x/good.wav": A}, packing))
    with pytest.raises(AudioError, match=r"bad\.wav") as caught:
        source.wave(0, RATE)
    assert reason in caught.value.reason
    assert caught.value.name == source.names[0]
    assert len(source.wave(1, RATE)) == 4000


def test_damage_in_an_archive_is_a_bad_recording_and_a_deleted_file_is_not(tmp_path: Path) -> None:
    source = open_audio(packed(tmp_path, {"a.wav": A}))
    (tmp_path / "set" / "a.wav").unlink()
    with pytest.raises(DataError) as caught:
        source.wave(0, RATE)
    assert not isinstance(caught.value, AudioError)
    path = Path(packed(tmp_path, {"a.wav": A}, "zip"))
    archive = open_audio(str(path))
    content = bytearray(path.read_bytes())
    content[200] ^= 255
    path.write_bytes(content)
    with pytest.raises(AudioError, match=r"a\.wav"):
        archive.wave(0, RATE)


@pytest.mark.parametrize(
    ("members", "token"),
    [
        ({}, "no audio"), ({"a.pdf": b""}, r"\.pdf"), ({"a.wav": A, "manifest.jsonl": row("b.wav")}, r"b\.wav"),
        ({"a.wav": A, "manifest.jsonl": row("a.wav") * 2}, r"a\.wav"), ({"a.wav": A, "manifest.jsonl": b"{"}, "line 1"),
        ({"a.wav": A, "manifest.jsonl": row("a.wav", text="a b", word_seconds=[1])}, "word_seconds"),
        ({"a.wav": A, "manifest.jsonl": row("a.wav", offset=-1)}, "offset"),
        ({"a.wav": A, "b.wav": B, "manifest.jsonl": row("a.wav", text="a") + row("b.wav")}, r"b\.wav.*text"),
        ({"a.wav": A, "b.wav": B, "manifest.jsonl": row("a.wav", speaker=1) + row("b.wav")}, r"b\.wav.*speaker"),
        ({"wavs/a.wav": A, "wavs/b.wav": B, "metadata.csv": b"a|text|text"}, r"b\.wav.*text"),
        ({"wavs/a.wav": A, "metadata.csv": b"a|x|x\na|y|y"}, "a.*twice"), ({"a.wav": A, "metadata.csv": b"x,y"}, "csv"),
        ({"a.wav": A, "a.flac": F, "a.txt": b"x"}, r"a\.flac"), ({"a.wav": A, "a.json": b"[1]"}, r"a\.json"),
        ({"train-clean/1/1/1-1-1.wav": A, "dev-clean/2/1/2-1-1.wav": B}, "dev-clean.*train-clean"),
        ({"train/x/1.wav": A, "test/x/1.wav": B}, "train"), ({"a/1.wav": A, "2.wav": B}, r"2\.wav"),
        ({"x/manifest.jsonl": row("a.wav"), "y/manifest.jsonl": row("a.wav")}, "several"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("packing", ["folder", "zip"])
def test_lists_that_do_not_fit_their_files(members: dict[str, bytes], token: str, packing: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(DataError, match=token):
        open_audio(packed(tmp_path, members, packing))


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = {"wavs/a.wav": A, "metadata.csv": b"a|x|x\ngone|y|y", "README": b"", "cover.png": b""}
    source = open_audio(packed(tmp_path / "1", members))
    assert (source.texts, source.not_taken) == (["x"], {".png": 1, "no suffix": 1})
    part = row("a.wav", text="x", word_seconds=[1]) + row("b.wav", text="y")
    unlisted = open_audio(packed(tmp_path / "2", {"a.wav": A, "b.wav": B, "c.wav": A, "manifest.jsonl": part}))
    assert (unlisted.word_seconds, unlisted.not_taken) == (None, {".wav not listed": 1})
    said = capsys.readouterr().err
    assert all(token in said for token in ("gone", ".png 1", ".wav not listed 1", "word_seconds"))


def test_images_absent_paths_and_labels_that_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 images"):
        open_audio(str(make_files(tmp_path / "images", "a/1.png", "b/1.png")))
    for spec in (str(tmp_path / "absent"), str(tmp_path / "x-{0..2}.tar"), ""):
        with pytest.raises(UsageError):
            open_audio(spec)
    spec = packed(tmp_path, {"a.wav": A, "b.wav": B})
    assert open_audio(spec, unlabelled=True).columns == {"labels": [0, 0]}
    with pytest.raises(UsageError, match="mood"):
        open_audio(spec, label_column="mood")
    with pytest.raises(DataError, match="no classes"):
        open_audio(spec).need_labels()


def read_sum(source: AudioSource, index: int) -> float:
    return float(source.wave(index, 4000).sum())


@pytest.mark.parametrize("packing", ["folder", "zip", "tar"])
def test_several_processes_read_a_pickled_source(packing: str, tmp_path: Path) -> None:
    source = open_audio(packed(tmp_path, {f"{n}.wav": wav_bytes(sine(100 + n), RATE) for n in range(8)}, packing))
    again = pickle.loads(pickle.dumps(source))
    expected = [read_sum(again, index) for index in range(8)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap(read_sum, [(source, index) for index in range(8)]) == expected


def test_a_wav_file_is_16_bit_clipped_and_read_back_as_it_was(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", np.array([0, 0.5, -0.25, 2, -2, 1], np.float32), RATE)
    wave, rate = soundfile.read(tmp_path / "a.wav", dtype="float32")
    top = 32767 / 32768
    assert (wave.tolist(), rate) == ([0, 0.5, -0.25, top, -1, top], RATE)
    assert soundfile.info(tmp_path / "a.wav").subtype == "PCM_16"
    assert wav_bytes(wave, RATE) == (tmp_path / "a.wav").read_bytes()


def test_without_the_extra_it_is_named_and_images_never_import_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import sys, rdpm_cli.data.open, rdpm_cli.data.audio; print({'soundfile', 'torchaudio'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert shown.strip() == "set()"
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(UsageError, match="soundfile") as caught:
        open_audio(str(tmp_path))
    assert "rdpm[audio]" in caught.value.hint


def test_real_recordings() -> None:
    digits, books = open_audio(real("fsdd-train.zip")), open_audio(real("librispeech-251.zip"))
    assert (len(digits), len(set(digits.speakers or ())), [digits.need_labels().count(n) for n in range(10)]) == (
        2700, 6, [270] * 10,
    )  # fmt: skip
    assert (len(books), len(set(books.speakers or ())), books.texts) == (251, 251, None)
    for source, rate in ((digits, 8000), (books, 16000)):
        assert len(source.wave(7, rate)) == round(source.seconds(7) * rate)

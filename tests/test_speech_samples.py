"""`rdpm sample` of speech: the files it writes, an interrupted job, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from generators import save_generator
from sounds import FAMILIES, RATE, STEP, save_speech_generator, speech_config, speech_store, strings, word

from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.data import audio
from rdpm_cli.data.audio import write_wav

Capture = pytest.CaptureFixture[str]
ROWS: list[dict[str, Any]] = [  # the second and the fourth have prompts: 1.2 s of "low high", 0.4 s of "hiss"
    {"text": "low", "word_seconds": [0.2]},
    {"text": "Rise, hiss!", "prompt": "a.wav", "prompt_text": "low high", "prompt_seconds": [0.4, 0.8]},
    {"text": "high high low rise", "speaker": "ann"},
    {"text": "low", "prompt": "b.wav", "prompt_text": "hiss", "prompt_seconds": [0.4], "word_seconds": [1.0]},
    {"text": "rise", "word_seconds": [0.01]},
]


@pytest.fixture(scope="module")
def generators(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of untrained generators by family."""
    root, files = tmp_path_factory.mktemp("generators"), {}
    for family, kind in FAMILIES.items():
        store = speech_store(root / family, kind, strings(8), latents=True)
        files[family] = save_speech_generator(root / f"{family}.pt", store.root, speech_config(family))
    return files


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of five lines, with its prompts next to it."""
    root = tmp_path_factory.mktemp("lines")
    write_wav(root / "a.wav", np.concatenate([word("low", 3200), word("high", 6400)]), RATE)
    write_wav(root / "b.wav", np.repeat(word("hiss", 3200), 2), 2 * RATE)  # of another rate
    return write_list(root, ROWS)


def write_list(root: Path, rows: list[dict[str, Any]], name: str = "lines.jsonl") -> Path:
    (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / name


def command(generator: Path, out: Path, *args: str) -> list[str]:
    return ["sample", "--ckpt", str(generator), "--out", str(out), "--device", "cpu", "--quiet", *args]


def record(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "samples.json").read_text())
    return content


def content(out: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(out.rglob("*")) if path.suffix in (".wav", ".png", ".json")]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths if path.name != "run.json"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_list_is_written_with_lengths_prompts_and_their_sources(
    family: str, generators: dict[str, Path], lines: Path, tmp_path: Path
) -> None:
    assert run_cli(command(generators[family], tmp_path / "out", "--list", str(lines), "--seed", "3")) == 0
    written, samples = record(tmp_path / "out"), record(tmp_path / "out")["samples"]
    assert (written["format"], written["rate"], written["options"]["seed"], len(samples)) == ("rdpm-speech", RATE, 3, 5)
    assert [sample["text"] for sample in samples] == [row["text"] for row in ROWS]
    assert [sample.get("speaker") for sample in samples] == [None, None, "ann", None, None]
    assert [sample["durations_from"] for sample in samples] == ["line", "predictor", "predictor", "line", "line"]
    assert [sample["prompt"] for sample in samples] == [None, "prompts/000001.wav", None, "prompts/000003.wav", None]
    assert [sample["prompt_seconds"] for sample in samples] == [0, 1.2, 0, 0.4, 0]
    assert samples[0]["durations"] == [5]
    assert samples[1]["durations"][:2] == [10, 20]
    assert samples[3]["durations"] == [10, 25]
    assert samples[4]["durations"] == [1]
    for index, sample in enumerate(samples):
        wave, rate = soundfile.read(tmp_path / "out" / sample["file"])
        assert (sample["file"], rate, len(wave)) == (f"{index:06d}.wav", RATE, sum(sample["durations"]) * STEP)
        assert len(sample["durations"]) == len(f"{sample.get('prompt_text', '')} {sample['text']}".split())
        assert (tmp_path / "out" / "previews" / f"{index:06d}.png").is_file()
    assert soundfile.info(tmp_path / "out" / "prompts" / "000001.wav").frames == 9600


def test_a_line_and_a_seed_decide_a_sample(generators: dict[str, Path], lines: Path, tmp_path: Path) -> None:
    """Alone or in a list; with another seed it is another one."""
    generator, out = generators["rdpm"], tmp_path / "out"
    assert run_cli(command(generator, out, "--list", str(lines))) == 0
    first = str(write_list(lines.parent, ROWS[:1], "first.jsonl"))
    for seed in ("0", "1"):
        assert run_cli(command(generator, tmp_path / seed, "--list", first, "--seed", seed)) == 0
    together, alone, other = ((folder / "000000.wav").read_bytes() for folder in (out, tmp_path / "0", tmp_path / "1"))
    assert together == alone != other


@pytest.mark.parametrize("family", FAMILIES)
def test_an_interrupted_job_goes_on_to_the_same_bytes(
    family: str, generators: dict[str, Path], lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (command(generators[family], tmp_path / name, "--list", str(lines)) for name in ("whole", "cut"))
    assert run_cli(whole) == 0
    count, write = [0], audio.write_wav

    def killed(*args: Any) -> None:
        count[0] += 1
        if count[0] == 3:
            raise RuntimeError("killed")
        write(*args)

    monkeypatch.setattr(audio, "write_wav", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run_cli(cut)
    monkeypatch.setattr(audio, "write_wav", write)
    assert not (tmp_path / "cut" / "samples.json").exists()
    assert len(list((tmp_path / "cut").glob("*.wav"))) == 2
    assert run_cli(cut) == 0
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    for path in (tmp_path / "cut" / "000001.wav", tmp_path / "cut" / "samples.json"):
        path.unlink()
    assert run_cli(cut) == 0
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_a_folder_of_another_list_or_of_other_options_is_refused(
    generators: dict[str, Path], lines: Path, tmp_path: Path, capsys: Capture
) -> None:
    fixed = command(generators["rdpm"], tmp_path / "out", "--list", str(lines))
    assert run_cli(fixed) == 0
    before = content(tmp_path / "out")
    for more, token in ((["--seed", "1"], "seed"), (["--duration-scale", "2"], "duration_scale")):
        assert run_cli([*fixed, *more]) == 2
        assert token in capsys.readouterr().err
    assert run_cli(command(generators["rdpm"], tmp_path / "out", "--text", "low")) == 2
    assert content(tmp_path / "out") == before


PROMPT = {"text": "low", "prompt": "a.wav", "prompt_text": "low high", "prompt_seconds": [0.4, 0.8]}


@pytest.mark.parametrize(
    ("row", "token"),
    [
        ({"text": "low banana"}, "banana"), ({"text": "?!"}, "?!"), ({"text": 5}, "text"), ({"prompt": "a"}, "text"),
        ({"text": "low", "prompt_txt": "x"}, "prompt_txt"), ({**PROMPT, "prompt": "gone.wav"}, "gone.wav"),
        ({**PROMPT, "prompt": "text.wav"}, "text.wav"), ({**PROMPT, "prompt_text": "low mango"}, "mango"),
        ({**PROMPT, "prompt_seconds": [0.4]}, "prompt_seconds"), ({**PROMPT, "prompt_seconds": None}, "a.wav"),
        ({**PROMPT, "prompt_seconds": [0.1] * 3}, "prompt_seconds"), ({**PROMPT, "prompt_seconds": "no"}, "line 2"),
        ({"text": "low", "word_seconds": [1, 1]}, "word_seconds"), ({"text": "low", "word_seconds": [-1]}, "line 2"),
        ({"text": "low", "word_seconds": [float("nan")]}, "line 2"), ({"text": "low", "word_seconds": [9e9]}, "low"),
        ({"text": "low", "prompt_text": "high"}, "prompt"), ([1], "line 2"), ("{", "line 2"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_refused_before_a_sound_is_written(
    row: Any, token: str, generators: dict[str, Path], lines: Path, tmp_path: Path, capsys: Capture
) -> None:
    write_wav(tmp_path / "a.wav", word("low", 9600), RATE)
    (tmp_path / "text.wav").write_text("no sound")
    path = tmp_path / "lines.jsonl"
    path.write_text(f"{json.dumps(ROWS[0])}\n{row if isinstance(row, str) else json.dumps(row)}\n")
    code = 3 if token == "text.wav" else 2
    assert run_cli(command(generators["rdpm"], tmp_path / "out", "--list", str(path))) == code
    assert token in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.wav"))


def test_odd_arguments_are_refused(
    generators: dict[str, Path], lines: Path, tiny_tokenizer_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    images = save_generator(tmp_path / "images.pt", tiny_tokenizer_file)
    (tmp_path / "empty.jsonl").write_text("")
    speech, wav = generators["resgen"], str(lines.parent / "a.wav")
    cases = [
        (images, ["--text", "low"], "images.pt"), (speech, [], "--text"), (speech, ["--classes", "0"], "--text"),
        (speech, ["--text", "low", "--classes", "0"], "--classes"),
        (speech, ["--list", str(tmp_path / "gone.jsonl")], "gone.jsonl"),
        (speech, ["--list", str(tmp_path / "empty.jsonl")], "empty.jsonl"),
        (speech, ["--text", "low", "--prompt", wav, "--prompt-text", "low high"], wav),
        (speech, ["--text", "low", "--prompt", wav], "--prompt-text"), (speech, ["--text", "low", "tau=2"], "tau"),
        (speech, ["--text", "low", "--prompt-text", "high"], "prompt"),
    ]  # fmt: skip
    for number, (generator, args, token) in enumerate(cases):
        assert run_cli(command(generator, tmp_path / str(number), *args)) == 2, args
        assert token in capsys.readouterr().err
        assert not list((tmp_path / str(number)).rglob("*.wav"))

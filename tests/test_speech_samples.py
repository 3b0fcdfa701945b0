"""`rdpm sample` of speech: the files it writes, an interrupted job, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from generators import save_generator
from processes import run_all
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

    def killed(path: Path, *args: Any) -> None:
        count[0] += path.parent.name != "prompts"
        if count[0] == 3:
            raise RuntimeError("killed")
        write(path, *args)

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


@pytest.mark.parametrize(("shards", "processes"), [([2, 1], 1), ([1], 2)])
def test_shards_in_any_order_and_processes_of_torchrun_write_the_same_files(
    shards: list[int], processes: int, generators: dict[str, Path], lines: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also where a shard is killed and begun again. The lines are of more than one batch."""
    whole, cut = (command(generators["rdpm"], tmp_path / name, "--list", str(lines)) for name in ("whole", "cut"))
    assert run_cli(whole) == 0
    for number in shards:
        args = [*cut, "--shard", f"{number}/{len(shards)}"]
        if processes == 1:
            monkeypatch.setattr(audio, "write_wav", killed)
            with pytest.raises(RuntimeError, match="killed"):
                run_cli(args)
            monkeypatch.undo()
        assert not (tmp_path / "cut" / "samples.json").exists()
        assert (run_all(args, processes) if processes > 1 else [run_cli(args)]) == [0] * processes
        drawn = len(list((tmp_path / "cut").glob("*.wav")))
        assert (0 < drawn < len(ROWS)) == (number > 1)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def killed(*_: Any) -> None:
    raise RuntimeError("killed")


def test_a_generator_a_store_and_samples_are_described_and_verified(
    generators: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    generator, out = generators["rdpm"], tmp_path / "out"
    assert run_cli(command(generator, out, "--text", "low")) == 0
    capsys.readouterr()
    shown = {"recordings": 8, "speakers": 2, "text": "words", "units": 4}
    for target in (generator, generator.parent / "rdpm" / "codes"):
        assert run_cli(["inspect", str(target), "--json"]) == 0
        values = json.loads(capsys.readouterr().out)
        assert {name: values[name] for name in shown if name in values}.items() >= {"text": "words", "units": 4}.items()
    assert {name: values[name] for name in shown} == shown
    assert values["seconds"] == pytest.approx(sum(n for one in strings(8) for _, n in one) * STEP / RATE, abs=0.01)
    assert run_cli(["verify", str(out)]) == 0
    (out / "000000.wav").write_bytes(b"no sound")
    assert run_cli(["verify", str(out)]) == 3


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


def test_a_folder_is_bound_to_the_sound_of_its_prompts(generators: dict[str, Path], tmp_path: Path) -> None:
    """A recording that is replaced under the same name."""
    write_wav(tmp_path / "a.wav", word("low", 3200), RATE)
    path = write_list(tmp_path, [{"text": "high", "prompt": "a.wav", "prompt_text": "low", "prompt_seconds": [0.4]}])
    fixed = command(generators["rdpm"], tmp_path / "out", "--list", str(path))
    assert run_cli(fixed) == 0
    before = content(tmp_path / "out")
    write_wav(tmp_path / "a.wav", word("hiss", 3200), RATE)
    assert run_cli(fixed) == 2
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


def test_sounds_are_not_scored_as_images_whether_or_not_inception_is_there(
    generators: dict[str, Path], capsys: Capture
) -> None:
    assert run_cli(["eval", "fid", "--ckpt", str(generators["rdpm"]), "--device", "cpu"]) == 2
    message = capsys.readouterr().err
    assert str(generators["rdpm"]) in message
    assert "eval speech" in message


@pytest.fixture(scope="module")
def crossed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of untrained generators that attend to the bytes of a text, by family."""
    root, files = tmp_path_factory.mktemp("crossed"), {}
    for family, kind in FAMILIES.items():
        store = speech_store(root / family, kind, strings(8), latents=True, text="bytes")
        cfg = speech_config(family, network={"align": "cross", "text_depth": 1})
        files[family] = save_speech_generator(root / f"{family}.pt", store.root, cfg)
    return files


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_without_durations_has_the_length_of_its_seconds_of_the_prompts_rate_or_of_the_predictor(
    family: str, crossed: dict[str, Path], lines: Path, tmp_path: Path
) -> None:
    prompt = ["--prompt", str(lines.parent / "a.wav"), "--prompt-text", "four"]  # 30 latents for 4 bytes
    cases = {"seconds": ["--seconds", "0.8"], "rate": ["--length", "rate"], "predictor": []}
    drawn = {}
    for source, more in cases.items():
        out = tmp_path / source
        assert run_cli(command(crossed[family], out, "--text", "a new text!", *prompt, *more)) == 0
        (sample,) = record(out)["samples"]
        assert sample["durations_from"] == source
        known, drawn[source] = sample["durations"]
        assert (known, sample["prompt_seconds"]) == (30, 1.2)
        assert soundfile.info(out / sample["file"]).frames == (known + drawn[source]) * STEP
    assert (drawn["seconds"], drawn["rate"]) == (20, round(30 / 4 * len(" a new text")))
    assert run_cli(command(crossed[family], tmp_path / "alone", "--text", "a")) == 0
    (alone,) = record(tmp_path / "alone")["samples"]
    assert (alone["durations"][0], alone["prompt"]) == (0, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stretch_of_a_recording_is_drawn_again_and_the_rest_stays(
    family: str, crossed: dict[str, Path], lines: Path, tmp_path: Path
) -> None:
    """a.wav is 1.2 s, 30 latents. Around the stretch the decoded sound is that of the recording's own codes."""
    init = ["--init", str(lines.parent / "a.wav"), "--from", "0.4", "--to", "0.8", "--text", "low rise high"]
    waves = {}
    for seconds in ("0.4", "0.8"):
        out = tmp_path / seconds
        assert run_cli(command(crossed[family], out, *init, "--seconds", seconds, "cfg=0")) == 0
        (sample,) = record(out)["samples"]
        assert sample["durations"] == [10, round(float(seconds) * 25), 10]
        assert (sample["cut"], sample["prompt"], sample["prompt_seconds"]) == ([0.4, 0.8], None, 0)
        waves[seconds] = soundfile.read(out / sample["file"])[0]
    assert len(waves["0.8"]) - len(waves["0.4"]) == 10 * STEP


def test_sentences_are_drawn_alone_and_joined_without_clicks(
    crossed: dict[str, Path], lines: Path, tmp_path: Path
) -> None:
    text = "Low. High rise!  And hiss?"
    asked = ["--text", text, "--prompt", str(lines.parent / "b.wav"), "--prompt-text", "hiss", "--sentences"]
    assert run_cli(command(crossed["rdpm"], tmp_path / "out", *asked, "--duration-scale", "2")) == 0
    samples = record(tmp_path / "out")["samples"]
    assert [sample["text"] for sample in samples] == ["Low.", "High rise!", "And hiss?"]
    whole, rate = soundfile.read(tmp_path / "out" / "joined" / "000000.wav")
    drawn = [sample["durations"][1] * STEP for sample in samples]
    pause = (len(whole) - sum(drawn)) // 2
    assert 0.1 < pause / rate < 0.5
    ends = [
        place for n in range(3) for start in [sum(drawn[:n]) + n * pause] for place in (start, start + drawn[n] - 1)
    ]
    assert np.abs(whole[ends]).max() == 0
    gaps = np.r_[drawn[0] : drawn[0] + pause, drawn[0] + pause + drawn[1] : len(whole) - drawn[2]]
    assert np.abs(whole[gaps]).max() == 0 < np.abs(whole).max()


@pytest.mark.parametrize(
    ("args", "token"),
    [
        (["--text", "a", "--init", "A", "--from", "0.4"], "--to"),
        (["--text", "a", "--from", "0", "--to", "1"], "--init"),
        (["--text", "a", "--init", "A", "--from", "0.8", "--to", "0.8"], "0.8"), (["--seconds", "2"], "text"),
        (["--text", "a", "--init", "A", "--from", "3", "--to", "4"], "3"), (["--text", ""], "text"),
        (["--text", "a", "--prompt", "A", "--init", "A", "--from", "0", "--to", "1"], "--prompt"),
        (["--text", "a", "--length", "rate"], "rate"), (["--text", "a", "--seconds", "999"], "999"),
        (["--text", "a", "--prompt", "A"], "--prompt-text"),
        (["--text", "", "--prompt", "A", "--prompt-text", "b"], "''"), (["--text", "a", "--seconds", "0.01"], "0.01"),
        (["--text", "a", "--seconds", "1", "--duration-scale", "2"], "--duration-scale"),
        (["--text", "a", "--init", "A", "--from", "0", "--to", "1", "--prompt-text", "b"], "--prompt-text"),
        (["--text", "a. b.", "--seconds", "2", "--sentences"], "--sentences"),
        (["--text", "a", "--prompt", "SHORT"], "short.wav"), (["--text", "a", "--prompt", "SILENT"], "silent.wav"),
    ],
)  # fmt: skip
def test_wrong_options_of_a_text_are_refused(
    args: list[str], token: str, crossed: dict[str, Path], lines: Path, tmp_path: Path, capsys: Capture
) -> None:
    write_wav(tmp_path / "short.wav", word("low", 100), RATE)
    write_wav(tmp_path / "silent.wav", np.zeros(9600, np.float32), RATE)
    names = {"A": lines.parent / "a.wav", "SHORT": tmp_path / "short.wav", "SILENT": tmp_path / "silent.wav"}
    words = [str(names.get(word, word)) for word in args]
    assert run_cli(command(crossed["resgen"], tmp_path / "out", *words)) == 2
    assert token in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.wav"))


def test_generators_of_durations_draw_no_stretch_again_and_take_seconds(
    generators: dict[str, Path], lines: Path, tmp_path: Path, capsys: Capture
) -> None:
    init = ["--init", str(lines.parent / "a.wav"), "--from", "0.4", "--to", "0.8"]
    assert run_cli(command(generators["rdpm"], tmp_path / "cut", "--text", "low", *init)) == 2
    assert "cross" in capsys.readouterr().err
    assert run_cli(command(generators["rdpm"], tmp_path / "out", "--text", "low high", "--seconds", "2")) == 0
    (sample,) = record(tmp_path / "out")["samples"]
    assert sample["durations_from"] == "seconds"
    assert sum(sample["durations"]) == pytest.approx(50, abs=1)
    assert run_cli(command(generators["rdpm"], tmp_path / "short", "--text", "low high", "--seconds", "0.05")) == 2
    assert "0.05" in capsys.readouterr().err

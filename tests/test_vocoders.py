"""Vocoders from files of the published layouts, filled with small random weights.

Legend: F frames, M bands, D channels."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sounds import burst, save_speech_generator, save_tokenizer, speech_config, speech_store, strings, write_speech
from tones import write_tones
from torch import Tensor

from rdpm_cli.cli.app import run
from rdpm_cli.data.audio import open_audio, read_wave
from rdpm_cli.data.mel import PRESETS, Mel, griffin_lim, log_mel
from rdpm_cli.data.vocoders import Activation, BigVGAN, BigVGANConfig, Vocos, VocosConfig, open_vocoder
from rdpm_cli.errors import CheckpointError, UsageError
from rdpm_cli.files import sha256_file

CPU, SPEECH8 = torch.device("cpu"), PRESETS["speech8"]
BIGVGAN: dict[str, Any] = {  # keys and values as in bigvgan_v2_22khz_80band_256x/config.json, of other sizes
    "resblock": "1", "batch_size": 32, "upsample_rates": [4, 4, 5], "upsample_kernel_sizes": [8, 8, 9],
    "upsample_initial_channel": 16, "resblock_kernel_sizes": [3, 7], "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5]],
    "use_tanh_at_final": False, "use_bias_at_final": False, "activation": "snakebeta", "snake_logscale": True,
    "num_mels": 64, "n_fft": 256, "hop_size": 80, "win_size": 256, "sampling_rate": 8000, "fmin": 0, "fmax": None,
}  # fmt: skip
FIRST = {"resblock": "1", "activation": "snake", "use_tanh_at_final": True, "use_bias_at_final": True}  # version 1
VOCOS: dict[str, Any] = {  # as vocos-mel-24khz/config.yaml, but of this mel scale
    "feature_extractor": {
        "class_path": "vocos.feature_extractors.MelSpectrogramFeatures",
        "init_args": {"sample_rate": 8000, "n_fft": 256, "hop_length": 80, "n_mels": 64, "padding": "center",
                      "norm": "slaney", "mel_scale": "slaney"},
    },
    "backbone": {
        "class_path": "vocos.models.VocosBackbone",
        "init_args": {"input_channels": 64, "dim": 24, "intermediate_dim": 32, "num_layers": 2},
    },
    "head": {
        "class_path": "vocos.heads.ISTFTHead",
        "init_args": {"dim": 24, "n_fft": 256, "hop_length": 80, "padding": "center"},
    },
}  # fmt: skip
# Names in bigvgan_generator.pt under `generator`, and in pytorch_model.bin, as their authors' packages write them.
PUBLISHED = {
    "bigvgan": {
        "conv_pre.bias", "conv_pre.weight_g", "conv_pre.weight_v", "ups.0.0.bias", "ups.2.0.weight_v",
        "resblocks.0.convs1.0.weight_g", "resblocks.5.convs2.2.bias", "resblocks.3.activations.5.act.alpha",
        "resblocks.3.activations.5.act.beta", "resblocks.0.activations.0.upsample.filter",
        "resblocks.0.activations.0.downsample.lowpass.filter", "activation_post.act.beta",
        "activation_post.upsample.filter", "conv_post.weight_v",
    },
    "vocos": {
        "feature_extractor.mel_spec.spectrogram.window", "feature_extractor.mel_spec.mel_scale.fb",
        "backbone.embed.weight", "backbone.norm.bias", "backbone.convnext.1.gamma", "backbone.convnext.1.dwconv.weight",
        "backbone.convnext.0.norm.weight", "backbone.convnext.0.pwconv1.weight", "backbone.convnext.0.pwconv2.bias",
        "backbone.final_layer_norm.weight", "head.out.weight", "head.istft.window",
    },
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", ["bigvgan", "vocos"])


def kaiser_sinc() -> Tensor:
    """A low-pass filter of 12 taps at half of the band, whose sum is 1: Kaiser's window of 51 dB."""
    taps = np.kaiser(12, 0.1102 * (51.0238 - 8.7)) * np.sinc((np.arange(12) - 5.5) / 2)
    return torch.tensor(taps / taps.sum(), dtype=torch.float32).view(1, 1, 12)


def weights(network: torch.nn.Module) -> dict[str, Tensor]:
    """Random values by the published names."""
    random, state = torch.Generator().manual_seed(0), dict[str, Tensor]()
    for name, value in network.state_dict().items():
        if name.endswith("filter"):
            state[name] = kaiser_sinc()
        elif name.endswith("window"):
            state[name] = torch.hann_window(256)
        elif value.ndim == 3 and isinstance(network, BigVGAN):
            state[f"{name}_v"] = torch.randn(value.shape, generator=random)
            state[f"{name}_g"] = torch.rand(len(value), 1, 1, generator=random)
        else:
            state[name] = torch.randn(value.shape, generator=random) / max(1, value[0].numel()) ** 0.5
    if isinstance(network, Vocos):
        state["feature_extractor.mel_spec.spectrogram.window"] = torch.hann_window(256)
        state["feature_extractor.mel_spec.mel_scale.fb"] = torch.zeros(129, 64)
    return state


def publish(folder: Path, kind: str, drop: str = "", fill: dict[str, Tensor] | None = None, **changes: Any) -> str:
    """Write the files of a vocoder. -> the option that names them. changes: of the spectrogram, or of BigVGAN."""
    folder.mkdir(exist_ok=True)
    config = copy.deepcopy(BIGVGAN if kind == "bigvgan" else VOCOS)
    if kind == "bigvgan":
        state = weights(BigVGAN(BigVGANConfig.model_validate(config | changes)))
        (folder / "config.json").write_text(json.dumps(config | changes, indent=4))
    else:
        state = weights(Vocos(VocosConfig.model_validate(config)))
        config["feature_extractor"]["init_args"] |= changes
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    state |= fill or {}
    state.pop(drop, None)
    path = folder / ("bigvgan_generator.pt" if kind == "bigvgan" else "pytorch_model.bin")
    torch.save({"generator": state} if kind == "bigvgan" else state, path)
    return f"{kind}:{path}"


def speech(frames: int = 20, seed: int = 0) -> Mel:
    return log_mel(burst(frames * 80, seed), SPEECH8)


@pytest.mark.parametrize(("kind", "changes"), [("bigvgan", {}), ("bigvgan", FIRST), ("vocos", {})])
def test_a_wave_has_a_hop_for_each_frame_and_is_the_same_again(kind: str, changes: Any, tmp_path: Path) -> None:
    spec = publish(tmp_path, kind, **changes)
    vocoder = open_vocoder(spec, SPEECH8, CPU)
    assert vocoder.identity == {"name": kind, "sha256": sha256_file(Path(spec.partition(":")[2]))}
    for frames in (1, 2, 20):
        wave = vocoder.wave(speech(frames))
        assert (str(wave.dtype), wave.shape, bool(np.isfinite(wave).all())) == ("float32", (frames * 80,), True)
        assert np.array_equal(open_vocoder(spec, SPEECH8, CPU).wave(speech(frames)), wave)
    assert kind == "vocos" or np.abs(wave).max() <= 1
    assert np.abs(wave - vocoder.wave(speech(seed=1))).max() > 0.001


def test_without_a_file_it_is_griffin_lim() -> None:
    vocoder = open_vocoder(None, SPEECH8, CPU)
    assert np.array_equal(vocoder.wave(speech()), griffin_lim(speech(), SPEECH8))
    assert (vocoder.identity, vocoder.made_from) == ({"name": "griffin-lim"}, {})


@kinds
def test_every_tensor_of_a_file_is_needed_by_its_published_name(kind: str, tmp_path: Path) -> None:
    content = torch.load(publish(tmp_path, kind).partition(":")[2], weights_only=True)
    assert (content["generator"] if kind == "bigvgan" else content).keys() >= PUBLISHED[kind]
    for name in sorted(PUBLISHED[kind]):
        if name.startswith("feature_extractor.") or name.endswith("weight_g"):
            continue
        with pytest.raises(CheckpointError) as caught:
            open_vocoder(publish(tmp_path, kind, drop=name), SPEECH8, CPU)
        assert (caught.value.exit_code, name in caught.value.message) == (3, True)
    with pytest.raises(CheckpointError, match="extra"):
        open_vocoder(publish(tmp_path, kind, fill={"extra.bias": torch.zeros(1)}), SPEECH8, CPU)


@pytest.mark.parametrize(
    ("kind", "change", "tokens"),
    [
        ("bigvgan", {"sampling_rate": 22050}, ("22050", "8000")), ("bigvgan", {"fmax": 3000}, ("3000", "4000")),
        ("bigvgan", {"num_mels": 80}, ("80", "64")), ("bigvgan", {"win_size": 200}, ("200", "256")),
        ("vocos", {"mel_scale": "htk"}, ("htk", "slaney")), ("vocos", {"norm": None}, ("None", "slaney")),
        ("vocos", {"hop_length": 100}, ("100", "80")), ("vocos", {"f_min": 50}, ("50", "0.0")),
    ],
)  # fmt: skip
def test_another_spectrogram_is_refused_with_both_values(kind: str, change: Any, tokens: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_vocoder(publish(tmp_path, kind, **change), SPEECH8, CPU)
    assert caught.value.exit_code == 3
    assert all(token in caught.value.message for token in tokens)


@pytest.mark.parametrize(("kind", "below"), [("bigvgan", 1e-6), ("vocos", 1e-8)])
def test_values_below_the_floor_of_a_file_are_refused(kind: str, below: float, tmp_path: Path) -> None:
    spec = publish(tmp_path, kind)
    open_vocoder(spec, SPEECH8.model_copy(update={"floor": 1e-5}), CPU)
    with pytest.raises(CheckpointError, match=str(below)):
        open_vocoder(spec, SPEECH8.model_copy(update={"floor": below}), CPU)


@pytest.mark.parametrize("spec", ["hifigan:x.pt", "bigvgan", "vocos:", "x.pt"])
def test_an_unknown_kind_is_a_usage_error(spec: str) -> None:
    with pytest.raises(UsageError, match=spec):
        open_vocoder(spec, SPEECH8, CPU)


@kinds
@pytest.mark.parametrize("fault", ["no config", "no weights", "not yaml", "other class"])
def test_files_that_are_no_vocoder_are_refused(kind: str, fault: str, tmp_path: Path) -> None:
    spec = publish(tmp_path, kind)
    config = tmp_path / ("config.json" if kind == "bigvgan" else "config.yaml")
    if fault == "no weights":
        torch.save({"generator": {}}, spec.partition(":")[2])
    elif fault == "no config":
        config.unlink()
    else:
        old, new = ("snakebeta", "relu") if kind == "bigvgan" else ("vocos.heads.ISTFTHead", "os.system")
        config.write_text("{" if fault == "not yaml" else config.read_text().replace(old, new))
    with pytest.raises(CheckpointError) as caught:
        open_vocoder(spec, SPEECH8, CPU)
    assert (caught.value.exit_code, str(tmp_path) in caught.value.message) == (3, True)


def activation(beta: float, alpha: float = 1.0) -> Activation:
    cfg = BigVGANConfig.model_validate(BIGVGAN | {"snake_logscale": False})
    layer = Activation(cfg, 1)
    values = {"act.alpha": torch.tensor([alpha]), "act.beta": torch.tensor([beta])}
    layer.load_state_dict(values | {f"{name}.filter": kaiser_sinc() for name in ("upsample", "downsample.lowpass")})
    return layer


@torch.no_grad()
def test_activations_keep_a_tone_and_add_no_alias_of_its_harmonics() -> None:
    """Of a tone at 0.15 of the rate, sin² makes one at 0.9, whose alias lies at 0.1."""
    tone = torch.sin(0.3 * torch.pi * torch.arange(500))[None, None]
    only_resampled = activation(1e9)(tone)
    assert float((only_resampled - tone)[..., 20:-20].abs().max()) < 0.02
    plain, ours = tone + (3 * tone).sin().square(), activation(1.0, 3.0)(tone)
    alias, without = (float(torch.fft.rfft(x[0, 0, 50:450]).abs()[40]) for x in (plain, ours))
    assert without < 0.02 * alias


def test_weights_are_a_direction_times_a_length_for_each_first_index(tmp_path: Path) -> None:
    """The same file after its weight normalisation is removed gives the same wave."""
    spec = publish(tmp_path, "bigvgan")
    wave, path = open_vocoder(spec, SPEECH8, CPU).wave(speech()), spec.partition(":")[2]
    state = torch.load(path, weights_only=True)["generator"]
    for name in [name for name in state if name.endswith("_g")]:
        g, v = state.pop(name).numpy(), state.pop(f"{name[:-1]}v").numpy()
        directions = [row / np.sqrt((row**2).sum()) for row in v]
        state[name[:-2]] = torch.from_numpy(np.stack(directions) * g)
    torch.save({"generator": state}, path)
    np.testing.assert_allclose(open_vocoder(spec, SPEECH8, CPU).wave(speech()), wave, atol=1e-5)


def test_vocos_adds_windowed_inverse_transforms(tmp_path: Path) -> None:
    """Of frames with one spectrum, against overlap and add in numpy."""
    random = np.random.default_rng(0)
    logarithm, phase = random.normal(size=129).astype(np.float32), random.normal(size=129).astype(np.float32)
    bias = torch.from_numpy(np.concatenate([logarithm, phase]))
    wave = open_vocoder(
        publish(tmp_path, "vocos", fill={"head.out.weight": torch.zeros(258, 24), "head.out.bias": bias}), SPEECH8, CPU
    ).wave(speech(10))
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(256) / 256)
    frame = np.fft.irfft(np.exp(logarithm) * np.exp(1j * phase)) * window
    total, norm = np.zeros(10 * 80 + 256), np.zeros(10 * 80 + 256)
    for start in range(0, 11 * 80, 80):
        total[start : start + 256] += frame
        norm[start : start + 256] += window**2
    np.testing.assert_allclose(wave, (total / norm.clip(1e-9))[128 : 128 + 800], atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # of the packages
@kinds
def test_waves_are_those_of_the_authors_package(kind: str, tmp_path: Path) -> None:
    """From the centre of the first frame on: half a hop later than BigVGAN's own spectrogram begins."""
    package = pytest.importorskip(kind, reason=f"compares with the package {kind}, which is not here")
    spec = publish(tmp_path, kind)
    frames = torch.from_numpy(np.concatenate([speech(), speech()[-1:]]).T.copy())[None]
    state = torch.load(spec.partition(":")[2], weights_only=True)
    if kind == "bigvgan":
        network = package.BigVGAN(package.AttrDict(BIGVGAN))
        network.load_state_dict(state["generator"])
        expected = network(frames)[0, 0, 40:1640]
    else:
        config = copy.deepcopy(VOCOS)
        for name in ("norm", "mel_scale"):
            del config["feature_extractor"]["init_args"][name]
        (tmp_path / "plain.yaml").write_text(yaml.safe_dump(config))
        network = package.Vocos.from_hparams(tmp_path / "plain.yaml").eval()
        network.load_state_dict(state)
        expected = network.decode(frames)[0]
    np.testing.assert_allclose(open_vocoder(spec, SPEECH8, CPU).wave(speech()), expected.detach().numpy(), atol=1e-5)


# ---- commands ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sound/, tokenizer.pt, generator.pt and a BigVGAN in vocoder/."""
    root = tmp_path_factory.mktemp("speaking")
    publish(root / "vocoder", "bigvgan")
    store = speech_store(root, "sin", strings(8), latents=True)
    save_speech_generator(root / "generator.pt", store.root, speech_config("rdpm"))
    return root


COMMANDS = {
    "reconstruct": "reconstruct ROOT/sound OUT --tokenizer ROOT/tokenizer.pt --limit 2",
    "sample": "sample --ckpt ROOT/generator.pt --text low --out OUT",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_take_a_vocoder_and_their_records_name_it(
    command: str, speaking: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, waves = speaking / "vocoder" / "bigvgan_generator.pt", []
    identities = {"plain": {"name": "griffin-lim"}, "neural": {"name": "bigvgan", "sha256": sha256_file(path)}}
    for name, identity in identities.items():
        words = COMMANDS[command].replace("ROOT", str(speaking)).replace("OUT", str(tmp_path / name)).split()
        words += ["--device", "cpu", "--quiet", *(["--vocoder", f"bigvgan:{path}"] if name == "neural" else [])]
        assert run(words) == 0
        assert json.loads((tmp_path / name / "samples.json").read_text())["vocoder"] == identity
        waves.append(read_wave(tmp_path / name / "000000.wav", 8000))
    assert waves[0].shape == waves[1].shape
    assert np.abs(waves[0] - waves[1]).max() > 0.01
    assert run(words[:-2]) == 2  # Griffin-Lim's among those of a network
    assert "vocoder" in capsys.readouterr().err


def test_eval_speech_scores_the_waves_of_a_vocoder(
    speaking: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = speaking / "vocoder" / "bigvgan_generator.pt"
    unseen = write_tones(tmp_path / "unseen", 16, 1)
    judge = ["eval", "judge", unseen, str(tmp_path / "run"), "--recipe", "speech8-sin", "--heldout", unseen, "width=8"]
    assert run([*judge, "embedding=4", "train.steps=2", "train.batch=16", "--device", "cpu"]) == 0
    capsys.readouterr()
    words = ["eval", "speech", unseen, "--judge", str(tmp_path / "run" / "judge.pt")]
    words += ["--limit", "2", "--json", "--quiet", "--device", "cpu"]
    vocoder, tokenizer = ["--vocoder", f"bigvgan:{path}"], ["--tokenizer", str(speaking / "tokenizer.pt")]
    records = []
    for options in (tokenizer, tokenizer + vocoder):
        assert run([*words, *options]) == 0
        records.append(json.loads(capsys.readouterr().out))
    assert [record["vocoder"]["name"] for record in records] == ["griffin-lim", "bigvgan"]
    assert records[1]["vocoder"]["sha256"] == sha256_file(path)
    assert records[0]["mel_distance"] == records[1]["mel_distance"]
    assert records[0]["stoi"] != records[1]["stoi"]
    assert run([*words, *vocoder]) == 2
    assert "--tokenizer" in capsys.readouterr().err


def test_images_have_no_vocoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sound").mkdir()
    source = open_audio(write_speech(tmp_path / "sound", strings(2)))
    file = save_tokenizer(tmp_path / "tokenizer.pt", "sin", source)
    words = ["reconstruct", source.spec, str(tmp_path / "out"), "--tokenizer", str(file), "--vocoder"]
    assert run([*words, "bigvgan:no-such.pt"]) == 3
    assert "no-such.pt" in capsys.readouterr().err
    assert run([*words, "https://x.org/a.pt"]) == 2
    assert not (tmp_path / "out").exists()

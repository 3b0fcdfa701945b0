"""The judges of published numbers of speech: weights in the published layouts, small, and what is refused."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchaudio.models
from sounds import burst, chirp, sine
from torch import Tensor, nn

from rdpm_cli import files
from rdpm_cli.data.mel import Wave
from rdpm_cli.errors import CheckpointError, DataError
from rdpm_cli.evaluation.speech_networks import HubertCTC, SpeakerNetwork, WavLMTDNN, open_voices, torchaudio_names

CONVS = [(16, 10, 5), (16, 3, 2), (16, 3, 2), (16, 3, 2), (16, 3, 2), (16, 2, 2), (16, 2, 2)]
SIZES: dict[str, Any] = {
    "extractor_mode": "layer_norm", "extractor_conv_layer_config": CONVS, "extractor_conv_bias": False,
    "encoder_embed_dim": 32, "encoder_projection_dropout": 0.0, "encoder_pos_conv_kernel": 8,
    "encoder_pos_conv_groups": 4, "encoder_num_layers": 2, "encoder_num_heads": 4, "encoder_attention_dropout": 0.0,
    "encoder_ff_interm_features": 48, "encoder_ff_interm_dropout": 0.0, "encoder_dropout": 0.0,
    "encoder_layer_norm_first": True, "encoder_layer_drop": 0.0,
}  # fmt: skip
WAVLM_SIZES = {"encoder_num_buckets": 320, "encoder_max_distance": 800, "aux_num_out": None}
# The names in wavlm_large_finetune.pth of the first layer and of what is there once, as WavLM's own code has them.
ONCE = {
    "feature_extractor.conv_layers.0.0.weight", "feature_extractor.conv_layers.0.2.1.weight",
    "feature_extractor.conv_layers.0.2.1.bias", "layer_norm.weight", "layer_norm.bias", "post_extract_proj.weight",
    "post_extract_proj.bias", "mask_emb", "encoder.pos_conv.0.bias", "encoder.pos_conv.0.weight_g",
    "encoder.pos_conv.0.weight_v", "encoder.layer_norm.weight", "encoder.layer_norm.bias",
}  # fmt: skip
LAYER = {"self_attn.grep_a", "self_attn.relative_attention_bias.weight"} | {
    f"{name}.{kind}" for kind in ("weight", "bias") for name in (
        "self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "self_attn.grep_linear",
        "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm",
    )
}  # fmt: skip
HEAD = {  # of it, one of each kind
    "feature_weight", "layer1.conv.weight", "layer1.bn.running_mean", "layer2.Conv1dReluBn1.conv.bias",
    "layer3.Res2Conv1dReluBn.convs.6.weight", "layer3.Res2Conv1dReluBn.bns.6.weight", "layer4.Conv1dReluBn2.bn.bias",
    "layer4.SE_Connect.linear1.weight", "layer4.SE_Connect.linear2.weight", "conv.weight", "pooling.linear1.weight",
    "pooling.linear2.bias", "bn.running_var", "linear.weight", "loss_calculator.projection.weight",
}  # fmt: skip


def tiny_hubert(aux_num_out: int) -> nn.Module:
    return torchaudio.models.wav2vec2_model(**SIZES, aux_num_out=aux_num_out)


def tiny_wavlm() -> nn.Module:
    return torchaudio.models.wavlm_model(**SIZES, **WAVLM_SIZES)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks of torchaudio that the judges are made of, with few channels and layers."""
    monkeypatch.setattr(torchaudio.models, "hubert_large", tiny_hubert)
    monkeypatch.setattr(torchaudio.models, "wavlm_large", tiny_wavlm)


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """A network with random weights and statistics, all of which have an effect."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make().eval().requires_grad_(False)
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                centre = 1.0 if "norm.weight" in name or "running_var" in name else 0.0
                value.copy_(torch.rand_like(value) - 0.5 + centre)
    return network


def save_hubert(path: Path) -> nn.Module:
    """A file in the layout of torchaudio's: fairseq's 32 letters, of which 1 to 3 are no letters."""
    network = made(lambda: tiny_hubert(29))
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    state = {re.sub("|".join(old), lambda match: old[match[0]], name): x for name, x in network.state_dict().items()}
    for name in ("aux.weight", "aux.bias"):
        state[name] = torch.cat([state[name][:1], torch.full_like(state[name][:3], 100.0), state[name][1:]])
    torch.save(state, path)
    return network


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a SpeakerNetwork by the names in UniSpeech's file: the other way than torchaudio_names."""
    renamed = {"feature_extract.model.mask_emb": torch.zeros(32), "loss_calculator.projection.weight": torch.zeros(3)}
    places = {
        r"backbone\.": "feature_extract.model.", r"(conv_layers\.\d)\.conv\.": r"\1.0.",
        r"(conv_layers\.\d)\.layer_norm\.": r"\1.2.1.", r"encoder\.feature_projection\.layer_norm": "layer_norm",
        r"encoder\.feature_projection\.projection": "post_extract_proj", r"encoder\.transformer\.": "encoder.",
        r"pos_conv_embed\.conv": "pos_conv.0", r"parametrizations\.weight\.original0": "weight_g",
        r"parametrizations\.weight\.original1": "weight_v", r"(layers\.\d)\.layer_norm": r"\1.self_attn_layer_norm",
        r"feed_forward\.intermediate_dense": "fc1", r"feed_forward\.output_dense": "fc2",
        r"attention\.rel_attn_embed": "self_attn.relative_attention_bias",
        r"attention\.gru_rel_pos_linear": "self_attn.grep_linear", r"attention\.gru_rel_pos_const": "self_attn.grep_a",
        r"attention\.attention\.": "self_attn.",
    }  # fmt: skip
    for name, value in state.items():
        for old, new in places.items():
            name = re.sub(old, new, name)
        if match := re.fullmatch(r"(.*)\.in_proj_(weight|bias)", name):
            pieces = zip("qkv", value.chunk(3), strict=True)
            renamed |= {f"{match[1]}.{letter}_proj.{match[2]}": piece for letter, piece in pieces}
        else:
            renamed[name] = value
    return renamed


def save_wavlm(path: Path) -> dict[str, Tensor]:
    """A file in UniSpeech's layout -> its tensors."""
    weights = published(made(lambda: SpeakerNetwork(tiny_wavlm())).state_dict())
    torch.save({"model": weights, "epoch": 3}, path)
    return weights


def waves(*seconds: float) -> list[Wave]:
    """A sine, then noise, then a chirp."""
    lengths = [round(s * 16000 / 3) for s in seconds]
    return [np.concatenate([sine(300, n, 16000), burst(n), chirp(400, 6000, n, 16000)]) for n in lengths]


def test_hubert_spells_the_likeliest_letters_of_each_wave_alone(small: None, tmp_path: Path) -> None:
    network, sounds = save_hubert(tmp_path / "hubert.pth"), waves(0.5, 0.8, 0.03)
    judge = HubertCTC(tmp_path / "hubert.pth")
    letters = "-|ETAONIHSRDLUMWCFGYPBVK'XJQZ"
    expected = []
    for wave in sounds:
        x = torch.from_numpy((wave - wave.mean()) / wave.std())[None]
        path = network(x)[0][0].argmax(1).tolist()
        kept = [n for place, n in enumerate(path) if n and (place == 0 or path[place - 1] != n)]
        expected.append("".join(letters[n] for n in kept).replace("|", " ").strip())
    assert judge.transcribe(sounds) == expected
    assert len(expected[0]) > 1
    assert judge.sha256 == files.sha256_file(tmp_path / "hubert.pth")


class Spoken(nn.Module):
    """Says these letters, one a frame of 20 ms."""

    def __init__(self, letters: Sequence[int]) -> None:
        super().__init__()
        self.logits = nn.Parameter(20.0 * F.one_hot(torch.tensor(letters), 29).float())

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.logits[None], None


def test_an_alignment_has_word_ends_between_the_letters(small: None, tmp_path: Path) -> None:
    save_hubert(tmp_path / "hubert.pth")
    judge = HubertCTC(tmp_path / "hubert.pth")
    a, b, space = judge.letters.index("A"), judge.letters.index("B"), 1
    #   frames 0  1  2  3  4  5  6      7  8  9
    judge.network = Spoken([0, a, a, b, 0, 0, space, 0, b, 0])
    wave = np.ones(3200, np.float32)
    assert judge.transcribe([wave]) == ["AB B"]
    assert judge.align(wave, "Ab, b!") == pytest.approx([0.12, 0.08])  # from the end of frame 3 to the start of frame 8
    for words, token in (("ab 7", "7"), ("ab b" * 9, "ab b")):
        with pytest.raises(DataError, match=token):
            judge.align(wave, words)


def test_the_names_of_unispeechs_file_are_mapped_both_ways() -> None:
    state = made(lambda: SpeakerNetwork(tiny_wavlm())).state_dict()
    weights = published(state)
    inner = {name.removeprefix("feature_extract.model.") for name in weights if name.startswith("feature_extract.")}
    assert {name for name in inner if not re.search(r"layers\.[1-6]|encoder\.layers", name)} == ONCE
    first = "encoder.layers.0."
    assert {name.removeprefix(first) for name in inner if name.startswith(first)} == LAYER
    assert weights.keys() >= HEAD
    again = torchaudio_names(weights)
    network = SpeakerNetwork(tiny_wavlm())
    network.load_state_dict(again)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    mean, variance, scale, shift = (
        weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return F.batch_norm(x, mean, variance, scale, shift)


def conv(x: Tensor, weights: dict[str, Tensor], name: str, **options: int) -> Tensor:
    return F.conv1d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **options)


def head(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """ECAPA-TDNN of features (1, D, F), by hand from the tensors of the file."""
    x = norm(conv(nn.InstanceNorm1d(x.shape[1])(x + 1e-6), w, "layer1.conv", padding=2).relu(), w, "layer1.bn")
    outputs = []
    for number, dilation in ((2, 2), (3, 3), (4, 4)):
        layer = f"layer{number}"
        y = norm(conv(x, w, f"{layer}.Conv1dReluBn1.conv").relu(), w, f"{layer}.Conv1dReluBn1.bn")
        pieces = list(y.split(64, 1))
        for i in range(7):
            piece = pieces[i] + (pieces[i - 1] if i else 0)
            z = conv(piece, w, f"{layer}.Res2Conv1dReluBn.convs.{i}", padding=dilation, dilation=dilation).relu()
            pieces[i] = norm(z, w, f"{layer}.Res2Conv1dReluBn.bns.{i}")
        y = norm(conv(torch.cat(pieces, 1), w, f"{layer}.Conv1dReluBn2.conv").relu(), w, f"{layer}.Conv1dReluBn2.bn")
        gate = F.linear(
            y.mean(2), w[f"{layer}.SE_Connect.linear1.weight"], w[f"{layer}.SE_Connect.linear1.bias"]
        ).relu()
        gate = F.linear(gate, w[f"{layer}.SE_Connect.linear2.weight"], w[f"{layer}.SE_Connect.linear2.bias"]).sigmoid()
        x = x + y * gate[..., None]
        outputs.append(x)
    y = conv(torch.cat(outputs, 1), w, "conv").relu()
    attention = conv(conv(y, w, "pooling.linear1").tanh(), w, "pooling.linear2").softmax(2)
    mean = (attention * y).sum(2)
    deviation = ((attention * y**2).sum(2) - mean**2).clamp(min=1e-9).sqrt()
    return F.linear(norm(torch.cat([mean, deviation], 1), w, "bn"), w["linear.weight"], w["linear.bias"])


@pytest.mark.parametrize("state", [1, 2])  # what goes into the second layer, what comes out of the last one
def test_an_embedding_is_ecapas_of_the_weighted_states_of_wavlm(state: int, small: None, tmp_path: Path) -> None:
    weights, sounds = save_wavlm(tmp_path / "wavlm.pth"), waves(0.5, 0.8)
    weights["feature_weight"] = torch.where(torch.arange(3) == state, 100.0, 0.0)
    torch.save({"model": weights}, tmp_path / "wavlm.pth")
    judge = open_voices(f"wavlm-tdnn:{tmp_path / 'wavlm.pth'}")
    backbone = made(lambda: SpeakerNetwork(tiny_wavlm())).get_submodule("backbone")
    for wave, embedding in zip(sounds, judge.embed(sounds), strict=True):
        x = torch.from_numpy((wave - wave.mean()) / wave.std())[None]
        features = backbone.extract_features(x)[0][0] if state == 1 else backbone(x)[0]  # type: ignore[operator]
        expected = head(features.mT, weights)[0].numpy()
        assert embedding.shape == (256,)
        assert np.allclose(embedding, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert np.isfinite(judge.embed(waves(0.03))).all()  # a single frame


def test_weights_of_other_networks_are_refused(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other layouts, files that lack a tensor, and, where the network has one layer more, whole files."""
    hubert, wavlm, other = tmp_path / "hubert.pth", tmp_path / "wavlm.pth", tmp_path / "pytorch_model.bin"
    save_hubert(hubert)
    weights = save_wavlm(wavlm)
    hugging_face = {"wavlm.encoder.layer_norm.weight": torch.zeros(768), "tdnn.0.kernel.weight": torch.zeros(512, 3840)}
    torch.save(hugging_face, other)  # as in wavlm-base-plus-sv
    refused: list[tuple[type[HubertCTC | WavLMTDNN], Path]] = [(HubertCTC, wavlm), (WavLMTDNN, hubert)]
    refused += [(WavLMTDNN, other), (HubertCTC, other), (HubertCTC, tmp_path / "absent.pth")]
    for number, absent in enumerate(("linear.bias", "feature_extract.model.encoder.layers.1.self_attn.k_proj.bias")):
        torch.save({name: value for name, value in weights.items() if name != absent}, tmp_path / f"{number}.pth")
        refused.append((WavLMTDNN, tmp_path / f"{number}.pth"))
    for judge, file in refused:
        with pytest.raises(CheckpointError, match=file.name):
            judge(file)
    monkeypatch.setitem(SIZES, "encoder_num_layers", 3)
    for judge, file in ((HubertCTC, hubert), (WavLMTDNN, wavlm)):
        with pytest.raises(CheckpointError, match=file.name):
            judge(file)

"""The judges of published numbers of speech, HuBERT with CTC and WavLM-TDNN; and what --asr and --speaker name.

Legend: n samples, F frames (50 a second), D features, C channels, V letters, E width of an embedding, L layers."""

import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdpm_cli import checkpoint, files
from rdpm_cli.data import text
from rdpm_cli.data.mel import Wave
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.evaluation.speech import Embeddings, Resemblyzer, Transcriber, Voices, Whisper, need

RATE = 16000  # of both networks
SPACE, BLANK = "|", 0  # among the letters of HuBERT
HUBERT_HINT = "give torchaudio's hubert_fairseq_large_ll60k_asr_ls960.pth"
WAVLM_HINT = "give UniSpeech's wavlm_large_finetune.pth; wavlm-base-plus-sv of Hugging Face is another network"
# Names in UniSpeech's file -> those of SpeakerNetwork around torchaudio's WavLM, one replacement after the other.
WAVLM_NAMES = {
    r"^feature_extract\.model\.": "backbone.",
    r"(conv_layers\.\d+)\.0\.": r"\1.conv.", r"(conv_layers\.\d+)\.2\.1\.": r"\1.layer_norm.",
    r"^backbone\.layer_norm\.": "backbone.encoder.feature_projection.layer_norm.",
    r"post_extract_proj\.": "encoder.feature_projection.projection.",
    r"encoder\.pos_conv\.0\.": "encoder.transformer.pos_conv_embed.conv.",
    r"encoder\.(layer_norm|layers)\.": r"encoder.transformer.\1.",
    r"self_attn\.relative_attention_bias\.": "attention.rel_attn_embed.",
    r"self_attn\.grep_linear\.": "attention.gru_rel_pos_linear.",
    r"self_attn\.grep_a$": "attention.gru_rel_pos_const", r"self_attn\.out_proj\.": "attention.attention.out_proj.",
    r"self_attn_layer_norm\.": "layer_norm.", r"\.fc1\.": ".feed_forward.intermediate_dense.",
    r"\.fc2\.": ".feed_forward.output_dense.",
}  # fmt: skip
# In the file, without use here.
TRAINING_ONLY = {"loss_calculator.projection.weight", "feature_extract.model.mask_emb"}


class HubertCTC(Transcriber):
    """HuBERT-Large, fine-tuned with CTC on the 960 h of LibriSpeech, by torchaudio; greedy, without a language model.

    Each wave is passed alone, at mean 0 and variance 1."""

    rate = RATE
    network: nn.Module

    def __init__(self, file: Path) -> None:
        """Raises UsageError without torchaudio, CheckpointError for other weights."""
        need("torchaudio", "--asr hubert-ctc", "'rdpm[audio]'")
        from torchaudio.models import hubert_large
        from torchaudio.pipelines import HUBERT_ASR_LARGE

        self.letters: Sequence[str] = HUBERT_ASR_LARGE.get_labels()
        weights = checkpoint.read_weights(file, "HuBERT", "aux.weight", HUBERT_HINT)
        for name in {"aux.weight", "aux.bias"} & weights.keys():
            weights[name] = torch.cat([weights[name][:1], weights[name][4:]])  # 1 to 3 are fairseq's <pad>, </s>, <unk>
        self.network = _filled(hubert_large(aux_num_out=len(self.letters)), weights, file, HUBERT_HINT)
        self.name, self.sha256 = "HuBERT-Large LS960 CTC", files.sha256_file(file)

    def transcribe(self, waves: Sequence[Wave]) -> list[str]:
        return [self._spell(self._log_p(wave)) for wave in waves]

    @torch.no_grad()
    def _log_p(self, wave: Wave) -> Tensor:
        """Of the letters in each frame, (F, V)."""
        return self.network(_normalised(wave, self.network))[0][0].log_softmax(1).cpu()

    def _spell(self, log_p_FV: Tensor) -> str:
        numbers = log_p_FV.argmax(1).unique_consecutive().tolist()
        return "".join(self.letters[number] for number in numbers if number != BLANK).replace(SPACE, " ").strip()

    def align(self, wave: Wave, words: str) -> list[float]:
        """How long each word of a text lasts, in seconds, which sum to the wave's, by Viterbi's path of its letters.

        A word ends midway between its last letter and the next word's first. Raises DataError for a character that is
        no letter of the network, and for a text that is longer than the sound."""
        import torchaudio.functional as audio

        spelled, log_p_FV = text.normalise(words).upper().replace(" ", SPACE), self._log_p(wave)
        if unknown := sorted(set(spelled) - set(self.letters[1:])):
            raise DataError(f"'{unknown[0]}' of '{words:.80}' is no letter of {self.name}", "spell it in letters")
        repeated = sum(left == right for left, right in itertools.pairwise(spelled))
        if len(spelled) + repeated > len(log_p_FV):
            message = f"the text '{words:.80}' is too long for its {len(wave) / RATE:.2f} s of sound"
            raise DataError(message, "check that text and sound belong together")
        numbers = torch.tensor([[self.letters.index(letter) for letter in spelled]])
        path, scores = audio.forced_align(log_p_FV[None].contiguous(), numbers, blank=BLANK)
        spans, seconds = audio.merge_tokens(path[0], scores[0], blank=BLANK), len(wave) / RATE
        places = [place for place, letter in enumerate(spelled) if letter == SPACE]
        ends = [(spans[x - 1].end + spans[x + 1].start) / 2 * seconds / len(log_p_FV) for x in places]
        return np.diff([*ends, seconds], prepend=0.0).tolist()


class ConvReluNorm(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 1) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2), nn.BatchNorm1d(outputs)

    def forward(self, x_BCF: Tensor) -> Tensor:
        return self.bn(self.conv(x_BCF).relu())


class Res2Conv(nn.Module):
    """Groups of channels, each convolved with the outcome of the group before it added (Res2Net); the last one is
    passed on."""

    def __init__(self, channels: int, dilation: int, groups: int = 8) -> None:
        super().__init__()
        width = channels // groups
        convs = (nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation) for _ in range(groups - 1))
        self.convs = nn.ModuleList(convs)
        self.bns = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(groups - 1))

    def forward(self, x_BCF: Tensor) -> Tensor:
        *groups, last = x_BCF.chunk(len(self.convs) + 1, 1)
        outputs, y = list[Tensor](), torch.zeros_like(last)
        for group, conv, bn in zip(groups, self.convs, self.bns, strict=True):
            y = bn(conv(y + group).relu())
            outputs.append(y)
        return torch.cat([*outputs, last], 1)


class Bottleneck(nn.Module):
    """linear1, a nonlinearity, linear2: the excitation of channels, and the attention of the pooling."""

    def __init__(self, layer: Callable[[int, int], nn.Module], channels: int, width: int = 128) -> None:
        super().__init__()
        self.linear1, self.linear2 = layer(channels, width), layer(width, channels)


class SERes2Block(nn.Module):
    """SE-Res2Block of ECAPA-TDNN (Desplanques et al. 2020, figure 2)."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.Conv1dReluBn1, self.Conv1dReluBn2 = ConvReluNorm(channels, channels), ConvReluNorm(channels, channels)
        self.Res2Conv1dReluBn = Res2Conv(channels, dilation)
        self.SE_Connect = Bottleneck(nn.Linear, channels)

    def forward(self, x_BCF: Tensor) -> Tensor:
        y_BCF = self.Conv1dReluBn2(self.Res2Conv1dReluBn(self.Conv1dReluBn1(x_BCF)))
        gate = self.SE_Connect
        return x_BCF + y_BCF * gate.linear2(gate.linear1(y_BCF.mean(2)).relu()).sigmoid()[..., None]


class SpeakerNetwork(nn.Module):
    """ECAPA-TDNN on the weighted sum of what goes into each layer of WavLM and what comes out of the last one.

    Layers have the names in UniSpeech's file; `backbone` is torchaudio's WavLM."""

    def __init__(self, backbone: nn.Module, channels: int = 512, pooled: int = 1536, embedding: int = 256) -> None:
        super().__init__()
        transformer: Any = backbone.get_submodule("encoder.transformer")
        self.backbone, self.states = backbone, list[Tensor]()
        for layer in transformer.layers:
            layer.register_forward_pre_hook(lambda _, inputs: self.states.append(inputs[0]))
        self.feature_weight = nn.Parameter(torch.zeros(len(transformer.layers) + 1))
        self.layer1 = ConvReluNorm(transformer.layer_norm.normalized_shape[0], channels, 5)
        self.layer2, self.layer3, self.layer4 = (SERes2Block(channels, dilation) for dilation in (2, 3, 4))
        self.conv = nn.Conv1d(3 * channels, pooled, 1)
        self.pooling = Bottleneck(lambda inputs, outputs: nn.Conv1d(inputs, outputs, 1), pooled)
        self.bn, self.linear = nn.BatchNorm1d(2 * pooled), nn.Linear(2 * pooled, embedding)

    def forward(self, x_Bn: Tensor) -> Tensor:
        """Waves of one length, at mean 0 and variance 1 -> (B, E)."""
        self.states.clear()
        last_BFD = self.backbone(x_Bn)[0]
        states_LBFD = torch.stack([*self.states, last_BFD])
        x_BDF = torch.einsum("l,lbfd->bdf", self.feature_weight.softmax(0), states_LBFD)
        y1 = self.layer1(F.layer_norm(x_BDF, x_BDF.shape[2:]))  # InstanceNorm1d, which refuses a single frame
        y2 = self.layer2(y1)
        y3 = self.layer3(y2)
        y_BCF = self.conv(torch.cat([y2, y3, self.layer4(y3)], 1)).relu()
        attention_BCF = self.pooling.linear2(self.pooling.linear1(y_BCF).tanh()).softmax(2)
        mean_BC = (attention_BCF * y_BCF).sum(2)
        variance_BC = (attention_BCF * y_BCF.square()).sum(2) - mean_BC.square()
        return self.linear(self.bn(torch.cat([mean_BC, variance_BC.clamp(min=1e-9).sqrt()], 1)))


class WavLMTDNN(Voices):
    """UniSpeech's speaker verification, WavLM-Large fine-tuned with ECAPA-TDNN: the SIM of VALL-E, CLaM and ResGen."""

    rate = RATE
    network: nn.Module

    def __init__(self, file: Path) -> None:
        """Raises UsageError without torchaudio, CheckpointError for other weights."""
        need("torchaudio", "--speaker wavlm-tdnn", "'rdpm[audio]'")
        from torchaudio.models import wavlm_large

        weights = torchaudio_names(checkpoint.read_weights(file, "WavLM-TDNN", "feature_weight", WAVLM_HINT))
        self.network = _filled(SpeakerNetwork(wavlm_large()), weights, file, WAVLM_HINT)
        self.name, self.sha256 = "WavLM-Large TDNN", files.sha256_file(file)

    @torch.no_grad()
    def embed(self, waves: Sequence[Wave]) -> Embeddings:
        return torch.cat([self.network(_normalised(wave, self.network)) for wave in waves]).cpu().numpy()


def torchaudio_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of UniSpeech's file as SpeakerNetwork has them: the projections of q, k and v are one tensor."""
    renamed = {}
    for name in weights.keys() - TRAINING_ONLY:
        new = functools.reduce(lambda x, pattern: re.sub(pattern, WAVLM_NAMES[pattern], x), WAVLM_NAMES, name)
        renamed[new] = weights[name]
    for name in [name for name in renamed if ".self_attn.q_proj." in name]:
        rows = [renamed.pop(key) for x in "qkv" if (key := name.replace(".q_proj.", f".{x}_proj.")) in renamed]
        renamed[name.replace("self_attn.q_proj.", "attention.attention.in_proj_")] = torch.cat(rows)
    return renamed


def _filled(network: nn.Module, weights: Mapping[str, Tensor], file: Path, hint: str) -> nn.Module:
    """The network with exactly these weights, frozen. Raises CheckpointError."""
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise checkpoint.misfit(file, type(network).__name__, hint, error) from error
    return network.float().eval().requires_grad_(False)


def _normalised(wave: Wave, network: nn.Module) -> Tensor:
    """(1, n) at mean 0 and variance 1, on the device of a network."""
    x_1n = torch.from_numpy(wave)[None].to(next(network.parameters()).device)
    return F.layer_norm(x_1n, x_1n.shape)


def open_transcriber(option: str) -> Transcriber:
    """What --asr names: whisper:FOLDER or hubert-ctc:FILE. Raises UsageError and CheckpointError."""
    kind, _, path = option.partition(":")
    makers: dict[str, Callable[[Path], Transcriber]] = {"whisper": Whisper, "hubert-ctc": HubertCTC}
    if kind not in makers or not path:
        hint = "give whisper:FOLDER or hubert-ctc:FILE, or leave --asr out for the judge"
        raise UsageError(f"--asr {option}: unknown recogniser", hint)
    return makers[kind](Path(files.local_path(path)))


def open_voices(option: str) -> Voices:
    """What --speaker names: resemblyzer or wavlm-tdnn:FILE. Raises UsageError and CheckpointError."""
    kind, _, path = option.partition(":")
    if option == "resemblyzer":
        return Resemblyzer()
    if kind != "wavlm-tdnn" or not path:
        hint = "give resemblyzer or wavlm-tdnn:FILE, or leave --speaker out for the judge"
        raise UsageError(f"--speaker {option}: unknown", hint)
    return WavLMTDNN(Path(files.local_path(path)))

"""Lines of speech -> codes. Sample i depends on (checkpoint, options, seed, i, its line): not on the other lines.

Legend: B lines, N units of a text, S latents of a line (its prompt's come first), C code width, T steps."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rdpm_cli.codes.ragged import PADDING
from rdpm_cli.distributed import one_thread
from rdpm_cli.generator.conditions import LONGEST
from rdpm_cli.generator.contract import Known, SampleOptions
from rdpm_cli.generator.registry import LoadedGenerator
from rdpm_cli.tokenizer.model import Tokenizer

# Latents, and units, are padded to whole ones, so that a sample does not depend on its neighbours' lengths.
BUCKET = 32


@dataclass
class Spoken:
    """A line as numbers. latents: (C, S), which count where known_S is True.

    durations: of its units, in latents, those of the prompt first, whose number is `prompt`. With align: cross they are
    those of the prompt, of what is drawn, and of what is known behind it."""

    units: list[int]
    durations: list[int]
    prompt: int
    latents_CS: Tensor
    known_S: Tensor

    @property
    def length(self) -> int:
        return sum(self.durations)

    @property
    def buckets(self) -> tuple[int, int]:
        """Whole buckets of latents and of units."""
        return -(-self.length // BUCKET), -(-len(self.units) // BUCKET)


def spoken(units: list[int], durations: list[int], prompt_CS: Tensor, prompt: int, behind: int = 0) -> Spoken:
    """A line. prompt_CS: the prompt's latents, which are known, with the last `behind` ones at the end of the line."""
    length, count = sum(durations), prompt_CS.shape[1]
    latents_CS, known_S = prompt_CS.new_zeros(len(prompt_CS), length), torch.zeros(length, dtype=torch.bool)
    places = torch.arange(count)
    places[count - behind :] += length - count
    latents_CS[:, places], known_S[places] = prompt_CS, True
    return Spoken(units, durations, prompt, latents_CS, known_S)


def batches_of(lines: Sequence[Spoken], micro_batch: int) -> list[list[int]]:
    """Lines of one number of buckets, a micro-batch at a time."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, line in enumerate(lines):
        by_size.setdefault(line.buckets, []).append(index)
    rows = [by_size[size] for size in sorted(by_size)]
    return [row[start : start + micro_batch] for row in rows for start in range(0, len(row), micro_batch)]


def columns_of(loaded: LoadedGenerator, lines: Sequence[Spoken]) -> dict[str, Tensor]:
    """The columns of lines of one number of buckets."""
    B, C, (S, N) = len(lines), len(lines[0].latents_CS), (BUCKET * n for n in lines[0].buckets)
    text_BN, durations_BN = torch.full((B, N), PADDING), torch.zeros(B, N, dtype=torch.int64)
    latents_BCS = torch.zeros(B, C, S)
    for row, line in enumerate(lines):
        text_BN[row, : len(line.units)] = torch.tensor(line.units)
        durations_BN[row, : len(line.durations)] = torch.tensor(line.durations)
        latents_BCS[row, :, : line.length] = line.latents_CS
    columns = {"text": text_BN, "latents": latents_BCS}
    if loaded.attends_to_text:
        columns |= {"lengths": durations_BN.sum(1), "known": known_of(lines)}
    else:
        columns |= {"durations": durations_BN, "known": torch.tensor([line.prompt for line in lines])}
    device = loaded.tokenizer.quantizer.books.device
    return {name: column.to(device) for name, column in columns.items()}


def known_of(lines: Sequence[Spoken]) -> Tensor:
    """Which positions of these lines are known, (B, S) bool, in whole buckets."""
    known_BS = torch.zeros(len(lines), BUCKET * lines[0].buckets[0], dtype=torch.bool)
    for row_S, line in zip(known_BS, lines, strict=True):
        row_S[: line.length] = line.known_S
    return known_BS


def known_codes(
    tokenizer: Tokenizer, latents_BCS: Tensor, known_BS: Tensor, seed: int, indices: Sequence[int]
) -> Known:
    """The codes of known latents, under the noise of the samples of these indices.

    In training the network saw such pairs of noise and codes."""
    eps = tokenizer.noise("sample", seed, indices, [0] * len(indices), latents_BCS.shape[2]).to(latents_BCS.device)
    return Known(tokenizer.quantizer.encode(latents_BCS, eps), known_BS[:, None].repeat(1, eps.shape[1], 1))


@torch.no_grad()
def draw(
    loaded: LoadedGenerator, options: SampleOptions, indices: Sequence[int], lines: Sequence[Spoken]
) -> list[Tensor]:
    """codes (T, S) of each line, its prompt's in front. The lines have one number of buckets."""
    tokenizer, device = loaded.tokenizer, loaded.tokenizer.quantizer.books.device
    count, padding = len(lines), options.sampling.images_at_once(device.type) - len(lines)
    # The last line is repeated up to a whole micro-batch: on the CPU sums depend on the shape of a pass.
    lines, indices = [*lines, *[lines[-1]] * padding], [*indices, *[indices[-1]] * padding]
    columns = columns_of(loaded, lines)
    with one_thread():
        known = known_codes(tokenizer, columns["latents"], known_of(lines).to(device), options.seed, indices)
        codes_BTS = loaded.generator.sample(columns, torch.tensor(indices), options, known)
    return [codes_TS[:, : line.length].cpu() for codes_TS, line in zip(codes_BTS, lines, strict=True)][:count]


@torch.no_grad()
def predicted_durations(loaded: LoadedGenerator, line: Spoken) -> list[int]:
    """Durations of the units behind the prompt, by the generator's predictor. line: with any durations of these."""
    log_N = loaded.generator.network.trunk.speech.predictor(columns_of(loaded, [line]))[0]
    return [max(1, round(float(x))) for x in log_N[line.prompt : len(line.units)].exp()]


@torch.no_grad()
def predicted_length(loaded: LoadedGenerator, line: Spoken) -> int:
    """The latents of a line that are to be drawn, by the generator's predictor (align: cross): at least 1."""
    length = float(loaded.generator.network.trunk.speech.predictor.median(columns_of(loaded, [line])))
    return max(1, round(min(length, LONGEST)) - int(line.known_S.sum()))

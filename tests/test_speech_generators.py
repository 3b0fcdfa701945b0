"""Generators of speech, both families: padding and prompts never change, masks, losses, durations, guidance, learning.

Legend: B rows, N units, T steps, S latents, C channels."""

import itertools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile
import torch
from generators import fixed_seed  # noqa: F401
from sounds import FAMILIES, STEP, open_generator, speech_config, speech_store, strings, write_speech
from torch import Tensor

from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.codes import heldout
from rdpm_cli.codes.heldout import EncodedRecordings
from rdpm_cli.codes.ragged import RaggedStore
from rdpm_cli.data.audio import open_audio
from rdpm_cli.distributed import TrainStep
from rdpm_cli.errors import DataError
from rdpm_cli.generator import contract
from rdpm_cli.generator import speech_sampler as speech
from rdpm_cli.generator.conditions import LengthPredictor, places
from rdpm_cli.generator.config import GeneratorConfig
from rdpm_cli.generator.contract import Generator, GeneratorBatches, GeneratorTask, Known, SampleOptions, held_out
from rdpm_cli.generator.masking import MaskBatch, sampling_counts
from rdpm_cli.generator.rdpm import CodeBatch
from rdpm_cli.generator.registry import Codes, LoadedGenerator
from rdpm_cli.generator.speech_sampler import Spoken

CPU = torch.device("cpu")
T, C = 3, 4
families = pytest.mark.parametrize("family", FAMILIES)
aligns = pytest.mark.parametrize("align", ["durations", "cross"])
SPOKEN = [*strings(12), [("low", 9), ("hiss", 9), ("high", 9)], *strings(12, 1)]


class Setup(NamedTuple):
    generator: Generator
    batches: GeneratorBatches
    opened: Codes
    cfg: GeneratorConfig

    @property
    def store(self) -> RaggedStore:
        assert isinstance(self.opened.store, RaggedStore)
        return self.opened.store

    def loaded(self, **sampling: Any) -> tuple[LoadedGenerator, SampleOptions]:
        """As a file of it would be, and options."""
        names = list(self.store.manifest.condition_names)
        cfg = self.cfg.sampling.model_copy(update=sampling)
        loaded = LoadedGenerator(self.generator, self.opened.tokenizer, cfg, names, "0" * 64, {}, "words")
        return loaded, SampleOptions(cfg, 0)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each family, a store of 24 strings with latents."""
    root = tmp_path_factory.mktemp("stores")
    return {family: speech_store(root / family, kind, SPOKEN, latents=True).root for family, kind in FAMILIES.items()}


def setup(
    stores: dict[str, Path], family: str, batch: int = 8, awake: bool = True, align: str = "durations", **sections: Any
) -> Setup:
    network = {"align": align} if align == "durations" else {"align": align, "text_depth": 1}
    cfg = speech_config(family, batch, **{**sections, "network": network | sections.get("network", {})})
    return Setup(*open_generator(stores[family], cfg, awake), cfg)


def masks(columns: dict[str, Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Which positions exist, and which are known. (B, S) each."""
    if "durations" in columns:
        at = places(columns["durations"], columns["known"], length)
        return at.exists_BS, at.known_BS
    return torch.arange(length) < columns["lengths"][:, None], columns["known"]


def line(store: RaggedStore, row: int, known: int, align: str = "durations") -> Spoken:
    """A row of the store as a line, of which some units are the prompt."""
    rows = np.array([row])
    durations = store.durations(rows)[0].astype(int).tolist()
    units = store.text(rows)[0].tolist()
    latents = torch.from_numpy(store.latents(rows)[0].astype(np.float32))[:, : sum(durations[:known])]
    if align == "cross":
        return speech.spoken(units, [latents.shape[1], sum(durations[known:])], latents, 1)
    return speech.spoken(units, durations, latents, known)


# ---- where a position is -------------------------------------------------------------------------------------------


def test_places_of_made_cases() -> None:
    at = places(torch.tensor([[2, 3, 0], [1, 0, 2], [4, 0, 0]]), torch.tensor([1, 2, 0]), 6)
    assert at.unit_BS.tolist() == [[0, 0, 1, 1, 1, 0], [0, 2, 2, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    assert at.exists_BS.sum(1).tolist() == [5, 3, 4]
    assert at.known_BS.int().tolist() == [[1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0] * 6]
    share, log_length, before, after = at.place_BS4[0].unbind(-1)
    assert share[:5].tolist() == pytest.approx([1 / 4, 3 / 4, 1 / 6, 3 / 6, 5 / 6])
    assert log_length[:5].exp().tolist() == pytest.approx([2, 2, 3, 3, 3])
    assert before[:5].expm1().tolist() == pytest.approx([0, 1, 0, 1, 2], abs=1e-6)
    assert after[:5].expm1().tolist() == pytest.approx([1, 0, 2, 1, 0], abs=1e-6)
    assert bool(at.place_BS4.isfinite().all())


# ---- batches -------------------------------------------------------------------------------------------------------


@families
def test_a_batch_begins_with_prompts_of_whole_units_that_leave_some_to_draw(
    family: str, stores: dict[str, Path]
) -> None:
    made = setup(stores, family, 16, objective={"prompt": 0.8})
    known, units = [], []
    for step in range(40):
        batch = made.batches.batch_at(step, range(16))
        known += batch.columns["known"].tolist()
        units += (batch.columns["text"] >= 0).sum(1).tolist()
    share = np.mean(np.array(known) > 0)
    assert share == pytest.approx(0.8, abs=0.05)
    assert all(k < n for k, n in zip(known, units, strict=True))
    assert {k for k, n in zip(known, units, strict=True) if n == 4} == {0, 1, 2, 3}


def test_sorted_steps_draw_each_row_once_an_epoch_in_batches_with_less_padding(stores: dict[str, Path]) -> None:
    padding = {}
    for steps in (1, 4):
        made, again = (setup(stores, "resgen", 4, objective={"sorted_steps": steps}) for _ in range(2))
        rows, lengths = len(made.batches.rows), made.store.lengths
        batches = [made.batches.rows_at(step, range(4)) for step in reversed(range(rows * 12 // 4))][::-1]
        assert np.bincount(np.concatenate(batches))[made.batches.rows].tolist() == [12] * rows
        assert again.batches.rows_at(7, range(1, 3)).tolist() == batches[7][1:3].tolist()
        padding[steps] = np.mean([lengths[batch].max() * 4 / lengths[batch].sum() - 1 for batch in batches])
    assert padding[4] < 0.6 * padding[1]


@families
def test_prompts_of_cross_alignment_are_prefixes_or_leave_a_stretch_between_known_ends(
    family: str, stores: dict[str, Path]
) -> None:
    made = setup(stores, family, 16, align="cross", objective={"prompt": 0.8, "span": 0.25})
    kinds, to_the_end = [], []
    for step in range(60):
        columns = made.batches.batch_at(step, range(16)).columns
        for known_S, length in zip(columns["known"], columns["lengths"].tolist(), strict=True):
            assert not bool(known_S[length:].any())
            runs = [(key, len(list(run))) for key, run in itertools.groupby(known_S[:length].tolist())]
            assert sum(not key for key, _ in runs) == 1  # one stretch is to be drawn
            kinds.append(runs[-1][0])
            to_the_end.append(1 - (1 - 1 / length) ** 2)  # the larger of two uniform places is the last one
    assert np.mean(kinds) == pytest.approx(0.8 * 0.25 * (1 - np.mean(to_the_end)), abs=0.03)


@pytest.mark.parametrize("order", ["coarse-to-fine", "random"])
def test_no_slot_of_a_prompt_or_of_padding_is_masked_and_each_row_has_its_own_number(
    order: str, stores: dict[str, Path]
) -> None:
    made = setup(stores, "resgen", 16, objective={"order": order})
    for step in range(10):
        batch = made.batches.batch_at(step, range(16))
        assert isinstance(batch, MaskBatch)
        at = places(batch.columns["durations"], batch.columns["known"], batch.codes_BTS.shape[2])
        assert not bool((batch.masked_BLD & ~(at.exists_BS & ~at.known_BS).unsqueeze(-1)).any())
        count_B = batch.masked_BLD.flatten(1).sum(1)
        assert int(count_B.min()) >= 1
        assert batch.slots == pytest.approx(float(count_B.sum()) / 16)
        assert batch.positions == pytest.approx(float(batch.masked_BLD.any(-1).sum()) / 16)
    for number, batch in enumerate(made.batches.held_out_batches()):
        known = batch.columns["known"][:, None]
        open_BN = batch.columns["durations"] * (torch.arange(batch.columns["text"].shape[1]) >= known)
        r = (1 + number % 9) / 10
        expected = [max(1, math.ceil((1 - r * r) * n)) for n in (T * open_BN.sum(1)).tolist()]
        assert batch.masked_BLD.flatten(1).sum(1).tolist() == expected


# ---- losses --------------------------------------------------------------------------------------------------------


def loss_of(made: Setup, batch: Any, rows: range = range(8), size: int = 8) -> Tensor:
    return GeneratorTask(made.generator).loss(batch, TrainStep(0, 3, rows, size, CPU))[0].detach()


def test_held_out_means_do_not_depend_on_how_rows_of_unequal_length_are_batched(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each position counts alike."""
    made = setup(stores, "rdpm")
    made.batches.held_out = np.arange(len(SPOKEN))
    together = held_out(made.generator, made.batches, CPU)
    monkeypatch.setattr(contract, "EVALUATED_AT_ONCE", 3)
    apart = held_out(made.generator, made.batches, CPU)
    assert together["ce"] == pytest.approx(apart["ce"], rel=1e-4)


OBJECTIVES: dict[str, dict[str, Any]] = {"rdpm": {"perturb": 0.3, "steps_per_image": 2}, "resgen": {}}


@families
@aligns
def test_garbage_behind_the_end_of_a_row_does_not_change_the_loss(
    family: str, align: str, stores: dict[str, Path]
) -> None:
    made = setup(stores, family, align=align, objective=OBJECTIVES[family])
    clean, dirty = (made.batches.batch_at(3, range(8)) for _ in range(2))
    exists_BS, known_BS = masks(clean.columns, clean.codes_BTS.shape[2])
    gone_B1S = ~exists_BS[:, None]
    assert bool(gone_B1S.any())
    dirty.codes_BTS = torch.where(gone_B1S, torch.randint(0, 32, clean.codes_BTS.shape), clean.codes_BTS)
    unknown_B1S, z = ~known_BS[:, None], clean.columns["latents"]
    dirty.columns["latents"] = torch.where(unknown_B1S, 9 * torch.randn_like(z), z)
    if align == "durations":
        text = clean.columns["text"]
        dirty.columns["text"] = torch.where(text < 0, torch.randint(0, 4, text.shape), text)
    if isinstance(dirty, CodeBatch):
        assert dirty.eps_BJCS is not None
        assert dirty.z_BCS is not None
        dirty.eps_BJCS = torch.where(gone_B1S[:, None], 9 * torch.randn_like(dirty.eps_BJCS), dirty.eps_BJCS)
        dirty.z_BCS = torch.where(gone_B1S, 9 * torch.randn_like(dirty.z_BCS), dirty.z_BCS)
    assert torch.equal(loss_of(made, clean), loss_of(made, dirty))


@families
@aligns
def test_a_loss_reads_the_network_at_the_positions_to_be_predicted_only(
    family: str, align: str, stores: dict[str, Path]
) -> None:
    made = setup(stores, family, align=align, objective=OBJECTIVES[family])
    batch = made.batches.batch_at(3, range(8))
    exists_BS, known_BS = masks(batch.columns, batch.codes_BTS.shape[2])
    open_BS1 = (exists_BS & ~known_BS).unsqueeze(-1)
    clean = loss_of(made, batch)
    which = {"at the others": ~open_BS1, "at these": open_BS1}
    changed = {}
    for name, where_BS1 in which.items():

        def garbage(_: Any, __: Any, hidden: Tensor, where: Tensor = where_BS1) -> Tensor:
            return torch.where(where.repeat_interleave(len(hidden) // 8, 0), torch.randn_like(hidden), hidden)

        hook = made.generator.network.register_forward_hook(garbage)
        changed[name] = not torch.equal(loss_of(made, batch), clean)
        hook.remove()
    assert changed == {"at the others": False, "at these": True}


def test_the_codes_to_come_at_known_positions_are_no_targets_of_rdpm(stores: dict[str, Path]) -> None:
    made = setup(stores, "rdpm")
    clean, dirty = (made.batches.batch_at(3, range(8)) for _ in range(2))
    assert isinstance(clean, CodeBatch)
    at = places(clean.columns["durations"], clean.columns["known"], clean.codes_BTS.shape[2])
    to_come_BT1 = (torch.arange(1, T + 1) >= clean.t_BJ).unsqueeze(-1)
    where = to_come_BT1 & at.known_BS[:, None]
    dirty.codes_BTS = torch.where(where, torch.randint(0, 32, clean.codes_BTS.shape), clean.codes_BTS)
    assert bool(where.any())
    assert torch.equal(loss_of(made, clean), loss_of(made, dirty))
    elsewhere = to_come_BT1 & (at.exists_BS & ~at.known_BS)[:, None]
    dirty.codes_BTS = torch.where(elsewhere, torch.randint(0, 32, clean.codes_BTS.shape), clean.codes_BTS)
    assert not torch.equal(loss_of(made, clean), loss_of(made, dirty))


@pytest.mark.parametrize(
    ("family", "objective"),
    [
        ("rdpm", OBJECTIVES["rdpm"]), ("rdpm", {"noise": "fresh", "perturb": 0.3}),
        ("rdpm", {"noise": "fresh-from-codes"}), ("resgen", {}), ("resgen", {"order": "random", "mog_loss": "nll"}),
    ],
)  # fmt: skip
@aligns
def test_a_loss_does_not_depend_on_how_the_global_batch_is_shared(
    family: str, objective: dict[str, Any], align: str, stores: dict[str, Path]
) -> None:
    """Rows of 48 in shares of 48, of 32 and 16, and of 16: also the gradient of a weight of the trunk."""
    made = setup(stores, family, 48, align=align, objective=objective | ({"span": 0.5} if align == "cross" else {}))
    losses, gradients = [], []
    for cuts in ([0, 48], [0, 32, 48], [0, 16, 32, 48]):
        made.generator.network.zero_grad()
        shares = [range(a, b) for a, b in itertools.pairwise(cuts)]
        lengths, total = set(), 0.0
        for rows in shares:
            batch = made.batches.batch_at(3, rows)
            lengths.add(batch.codes_BTS.shape[2])
            loss, _ = GeneratorTask(made.generator).loss(batch, TrainStep(0, 3, rows, 48, CPU))
            (loss * len(rows) / 48).backward()
            total += loss.item() * len(rows) / 48
        losses.append(total)
        gradients.append(made.generator.network.trunk.blocks[0].mlp.w3.weight.grad.clone())
    assert len(lengths) > 1  # shares are padded to other lengths
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-3, atol=1e-5)


# ---- samples -------------------------------------------------------------------------------------------------------


@families
@aligns
@pytest.mark.parametrize("cfg", [0.0, 1.5])
def test_garbage_where_nothing_is_known_does_not_change_a_sample(
    family: str, align: str, cfg: float, stores: dict[str, Path]
) -> None:
    made = setup(stores, family, align=align)
    loaded, options = made.loaded(cfg=cfg)
    lines = [line(made.store, row, known, align) for row, known in ((0, 1), (3, 0), (5, 1))]
    columns = speech.columns_of(loaded, lines)
    exists_BS, known_BS = masks(columns, 32)
    keep = known_BS[:, None].repeat(1, T, 1)
    codes, noise = torch.randint(0, 32, (2, 3, T, 32)), 9 * torch.randn(3, C, 32)
    dirty = {**columns, "latents": torch.where(known_BS[:, None], columns["latents"], noise)}
    if align == "durations":
        dirty["text"] = torch.where(columns["text"] < 0, 2, columns["text"])
    indices, other = torch.tensor([4, 7, 1]), torch.where(keep, codes[0], codes[1])
    a = made.generator.sample(columns, indices, options, Known(codes[0], keep))
    b = made.generator.sample(dirty, indices, options, Known(other, keep))
    exists = exists_BS[:, None].expand_as(a)
    assert torch.equal(a[exists], b[exists])
    assert torch.equal(a[keep], codes[0][keep])
    assert not torch.equal(a[exists], made.generator.sample(columns, indices + 1, options)[exists])


@families
@aligns
@pytest.mark.parametrize("cfg", [0.0, 1.0])
def test_a_sample_depends_on_its_line_and_index_and_not_on_its_neighbours(
    family: str, align: str, cfg: float, stores: dict[str, Path]
) -> None:
    """One line alone against eight of other lengths, texts and prompts."""
    made = setup(stores, family, align=align)
    loaded, options = made.loaded(cfg=cfg, micro_batch=8)
    lines = [line(made.store, row, row % 2, align) for row in range(8)]
    assert len({one.length for one in lines}) > 3
    together = speech.draw(loaded, options, range(10, 18), lines)
    reversed_ = speech.draw(loaded, options, range(17, 9, -1), lines[::-1])[::-1]
    for row, one in enumerate(lines):
        alone = speech.draw(loaded, options, [10 + row], [one])[0]
        assert alone.shape == (T, one.length)
        assert torch.equal(alone, together[row])
        assert torch.equal(alone, reversed_[row])


@families
@aligns
def test_a_prompt_keeps_its_codes_exactly_and_has_an_effect(family: str, align: str, stores: dict[str, Path]) -> None:
    made = setup(stores, family, align=align)
    loaded, options = made.loaded(cfg=1.0)
    one = line(made.store, 2, 1, align)
    P = one.durations[0]
    codes = speech.draw(loaded, options, [6], [one])[0]
    eps = made.opened.tokenizer.noise("sample", 0, [6], [0], P)
    assert torch.equal(codes[:, :P], made.opened.tokenizer.quantizer.encode(one.latents_CS[None, :, :P], eps)[0])
    one.latents_CS = one.latents_CS.flip(0)
    assert not torch.equal(speech.draw(loaded, options, [6], [one])[0][:, P:], codes[:, P:])


@families
@aligns
def test_the_pass_without_text_keeps_the_prompt(family: str, align: str, stores: dict[str, Path]) -> None:
    generator = (made := setup(stores, family, align=align)).generator
    columns = speech.columns_of(made.loaded()[0], [line(made.store, row, 1, align) for row in (0, 2)])
    null = generator.null_condition(columns)
    other_text = generator.null_condition({**columns, "text": columns["text"].where(columns["text"] < 0, 3)})
    other_prompt = generator.null_condition({**columns, "latents": columns["latents"].flip(1)})
    assert torch.equal(null.known_BS, generator.condition(columns).known_BS)  # type: ignore[arg-type]
    for part in ("vector_BD", "latents_BSD"):
        assert torch.equal(getattr(null, part), getattr(other_text, part))
        assert not torch.equal(getattr(null, part), getattr(other_prompt, part))
    text = "latents_BSD" if align == "durations" else "tokens_BMD"
    assert not torch.equal(getattr(null, text), getattr(generator.condition(columns), text))


@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_resgen_takes_any_number_of_steps_also_of_rows_with_fewer_slots(steps: int, stores: dict[str, Path]) -> None:
    made = setup(stores, "resgen")
    loaded, options = made.loaded(steps=steps)
    loaded.check(options)
    short, long = speech.spoken([2], [1], torch.zeros(C, 0), 0), line(made.store, 1, 1)
    short.units, short.durations = [2], [1]
    codes = speech.draw(loaded, options, [0, 1], [short, long])
    assert [one.shape for one in codes] == [(T, 1), (T, long.length)]
    assert sampling_counts("square", 40, T) == [3, 2, 1, *[0] * 38]


# ---- learning ------------------------------------------------------------------------------------------------------

EASY = [[(a, 4), (b, 4), (c, 4)] for a in ("low", "high") for b in ("low", "hiss") for c in ("high", "hiss")]


def overfit(made: Setup, steps: int, lr: float = 1e-2) -> float:
    """Train on batches of the store. -> the last loss."""
    task, optimizer = GeneratorTask(made.generator), torch.optim.Adam(made.generator.network.parameters(), lr)
    size, last = made.cfg.train.batch, 0.0
    for step in range(steps):
        optimizer.zero_grad()
        batch = made.batches.batch_at(step, range(size))
        loss, _ = task.loss(batch, TrainStep(0, step, range(size), size, CPU))
        loss.backward()
        optimizer.step()
        last = loss.item()
    made.generator.network.eval().requires_grad_(False)
    return last


@families
def test_an_overfitted_model_says_the_text_and_another_one_when_it_is_swapped(family: str, tmp_path: Path) -> None:
    store = speech_store(tmp_path / family, FAMILIES[family], EASY * 4, latents=True)
    sections: dict[str, Any] = {"objective": {"t_weights": "alpha"}} if family == "rdpm" else {}
    made = setup({family: store.root}, family, 16, awake=False, **sections)
    overfit(made, 100)
    loaded, options = made.loaded(micro_batch=8, **({} if family == "rdpm" else {"steps": 8}))
    rows = np.arange(8)
    means = {}  # the mean latent of each word
    z, units = store.latents(rows).astype(np.float32), store.text(rows)
    for unit in np.unique(units):
        means[int(unit)] = torch.from_numpy(
            np.stack([z[r, :, 4 * n : 4 * n + 4].mean(1) for r, n in np.argwhere(units == unit)]).mean(0)
        )
    right = []
    for swap in (False, True):
        lines = [line(store, row, 1) for row in range(8)]
        for one in lines:
            one.units = [one.units[0], *(one.units[:0:-1] if swap else one.units[1:])]
        for one, codes in zip(lines, speech.draw(loaded, options, range(8), lines), strict=True):
            drawn = loaded.tokenizer.quantizer.decode(codes[None])[0]
            for n in (1, 2):
                mean = drawn[:, 4 * n : 4 * n + 4].mean(1)
                right.append(one.units[n] == min(means, key=lambda unit: float((means[unit] - mean).norm())))
    assert np.mean(right) >= 0.8  # by chance a third


def with_fitted_predictor(made: Setup, steps: int) -> LoadedGenerator:
    """The generator after a training of its predictor alone."""
    predictor = made.generator.network.trunk.speech.predictor
    optimizer = torch.optim.Adam(predictor.parameters(), 1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        predictor.loss(made.batches.batch_at(step, range(8)).columns).backward()
        optimizer.step()
    return made.loaded()[0]


@families
def test_durations_of_an_overfitted_set_are_predicted(family: str, tmp_path: Path) -> None:
    lengths = {"low": 2, "high": 7, "hiss": 4}
    spoken = [[(name, lengths[name]) for name in (a, b)] for a in lengths for b in lengths]
    store = speech_store(tmp_path / family, FAMILIES[family], spoken, latents=True)
    made = setup({family: store.root}, family)
    loaded = with_fitted_predictor(made, 100)
    names = store.manifest.condition_names
    for known in (0, 1):
        one = line(store, 3, known)
        predicted = speech.predicted_durations(loaded, one)
        assert predicted == [lengths[names[unit]] for unit in one.units[known:]]


@families
def test_cross_attention_starts_at_nothing_and_lets_a_text_have_an_effect(family: str, stores: dict[str, Path]) -> None:
    codes = {}
    for awake in (False, True):
        made = setup(stores, family, awake=awake, align="cross")
        loaded, options = made.loaded()
        trunk = made.generator.network.trunk
        if not awake:
            assert not any(bool(block.cross.proj.weight.any()) for block in trunk.blocks)
            continue
        one = line(made.store, 2, 1, "cross")
        for units in ([0, 1, 2], [2, 1, 0], [0, 1]):
            one.units = units
            codes[tuple(units)] = speech.draw(loaded, options, [6], [one])[0]
    assert not torch.equal(codes[0, 1, 2], codes[2, 1, 0])
    assert not torch.equal(codes[0, 1, 2], codes[0, 1])


@families
def test_lengths_of_an_overfitted_set_are_predicted(family: str, tmp_path: Path) -> None:
    lengths = {"low": 2, "high": 7, "hiss": 4}
    spoken = [[(name, lengths[name]) for name in (a, b)] for a in lengths for b in lengths]
    store = speech_store(tmp_path / family, FAMILIES[family], spoken, latents=True)
    made = setup({family: store.root}, family, align="cross")
    loaded = with_fitted_predictor(made, 200)
    for row, string in enumerate(spoken):
        one = line(store, row, row % 2, "cross")
        known = int(one.known_S.sum())
        assert abs(speech.predicted_length(loaded, one) + known - sum(latents for _, latents in string)) <= 1
        one.known_S[:] = True
        assert speech.predicted_length(loaded, one) == 1  # a line is longer than what is known of it


def test_the_loss_of_lengths_is_the_logarithm_of_a_distribution_over_whole_numbers() -> None:
    predictor = LengthPredictor(8, 2, 3)
    text, known = torch.tensor([[0, 1, -1]]), torch.zeros(1, 5, dtype=torch.bool)
    columns = {"text": text, "known": known, "latents": torch.zeros(1, 2, 5)}
    losses = np.array([predictor.loss({**columns, "lengths": torch.tensor([S])}).item() for S in range(1, 4000)])
    m, s = (x.exp().item() for x in predictor(columns))
    below_a_half = 1 / (1 + (0.5 / m) ** (-1 / s))
    assert np.exp(-losses).sum() + below_a_half == pytest.approx(1, abs=1e-2)
    assert np.exp(-losses).cumsum()[round(m) - 1] == pytest.approx(0.5 - below_a_half, abs=0.2)


# ---- held-out recordings, previews -----------------------------------------------------------------------------------


def test_held_out_recordings_have_what_a_store_of_them_would(stores: dict[str, Path]) -> None:
    """But for the noise of their codes; measured as rows of a store."""
    made = setup(stores, "rdpm")
    tokenizer, store = made.opened.tokenizer, made.store
    held = EncodedRecordings(open_audio(str(stores["rdpm"].parent / "sound")), tokenizer, store.manifest)
    rows = np.arange(len(SPOKEN))
    assert len(held) == len(SPOKEN)
    for read in ("text", "durations", "latents", "exists"):
        assert np.array_equal(getattr(held, read)(rows), getattr(store, read)(rows))
    for row in (0, 5):
        z = torch.from_numpy(held.latents(np.array([row])).astype(np.float32))
        codes = tokenizer.quantizer.encode(z, tokenizer.noise("heldout", 0, [row], [0], z.shape[2]))
        assert np.array_equal(held.codes(np.array([row])), codes)
    assert sum(len(batch.codes_BTS) for batch in made.batches.of_items(held).held_out_batches()) == len(SPOKEN)


@families
def test_training_measures_held_out_recordings_and_shows_held_out_rows(
    family: str, stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(heldout, "LEAST", 3)
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    cfg = speech_config(family, train={"steps": 2, "eval_every": 1, "log_every": 1})
    recipe.write_text(json.dumps({"generator": cfg.model_dump(mode="json", exclude_none=True)}))
    command = ["train-gen", str(stores[family]), "--recipe", str(recipe), "--out", str(run), "--device", "cpu"]
    spoken, cases = [[("low", 2), ("high", 3)]] * 3, {"few": 2, "word": 3, "text": 3, "good": 3}
    for name, count in cases.items():
        path = Path(write_speech(tmp_path / name, spoken[:count])) / "manifest.jsonl"
        changed = {"word": ("low high", "low mango"), "text": ('"text"', '"other"')}.get(name)
        if changed:
            path.write_text(path.read_text().replace(*changed))
    for name, code, token in (("few", 3, "few"), ("word", 2, "mango"), ("text", 3, "texts")):
        assert run_cli([*command, "--heldout", str(tmp_path / name)]) == code
        assert token in capsys.readouterr().err
        assert not run.exists()
    assert run_cli([*command, "--heldout", str(tmp_path / "good"), "--quiet"]) == 0
    loss = {"rdpm": "ce", "resgen": "nll"}[family]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if f"heldout/{loss}" in row]
    assert len(measured) == 2
    assert all(np.isfinite(row[f"heldout_recordings/{loss}"]).all() for row in measured)
    store = open_generator(stores[family], cfg)[2].store
    lengths = store.exists(store.split()[1]).sum(1).tolist()
    for step in (1, 2):
        shown = sorted((run / "previews").glob(f"step-{step:07d}.*.wav"))
        assert [soundfile.info(path).frames for path in shown] == [STEP * length for length in lengths[:4]]
        assert (run / "previews" / f"step-{step:07d}.png").is_file()


# ---- refusals, and sound -------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("settings", [{"text": "bytes", "latents": True}, {"latents": False}, {"text": None}])
def test_a_store_without_durations_or_latents_is_refused(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    store = speech_store(tmp_path, FAMILIES[family], SPOKEN[:5], **settings)
    with pytest.raises(DataError, match=str(store.root)):
        open_generator(store.root, speech_config(family))

"""Generators of speech, both families: padding and prompts never change, masks, losses, durations, guidance, learning.

Legend: B rows, N units, T steps, S latents, C channels."""

import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from generators import fixed_seed  # noqa: F401
from sounds import FAMILIES, open_generator, speech_config, speech_store, strings
from torch import Tensor

from rdpm_cli.codes.ragged import RaggedStore
from rdpm_cli.distributed import TrainStep
from rdpm_cli.engine import speech
from rdpm_cli.engine.speech import Prepared
from rdpm_cli.errors import DataError
from rdpm_cli.generator.conditions import places
from rdpm_cli.generator.config import GeneratorConfig
from rdpm_cli.generator.contract import Generator, GeneratorBatches, GeneratorTask, Known, SampleOptions
from rdpm_cli.generator.rdpm import CodeBatch
from rdpm_cli.generator.registry import Codes, LoadedGenerator
from rdpm_cli.generator.resgen import MaskBatch, sampling_counts

CPU = torch.device("cpu")
T, C = 3, 4
families = pytest.mark.parametrize("family", FAMILIES)
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


def setup(stores: dict[str, Path], family: str, batch: int = 8, awake: bool = True, **sections: Any) -> Setup:
    cfg = speech_config(family, batch, **sections)
    return Setup(*open_generator(stores[family], cfg, awake), cfg)


def line(store: RaggedStore, row: int, known: int) -> Prepared:
    """A row of the store as a line, of which some units are the prompt."""
    rows = np.array([row])
    durations = store.durations(rows)[0].astype(int).tolist()
    units = store.text(rows)[0].tolist()
    latents = torch.from_numpy(store.latents(rows)[0].astype(np.float32))[:, : sum(durations[:known])]
    return Prepared(units, durations, known, latents, np.zeros(0, np.float32), {})


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


OBJECTIVES: dict[str, dict[str, Any]] = {"rdpm": {"perturb": 0.3, "steps_per_image": 2}, "resgen": {}}


@families
def test_garbage_behind_the_end_of_a_row_does_not_change_the_loss(family: str, stores: dict[str, Path]) -> None:
    made = setup(stores, family, objective=OBJECTIVES[family])
    clean, dirty = (made.batches.batch_at(3, range(8)) for _ in range(2))
    at = places(clean.columns["durations"], clean.columns["known"], clean.codes_BTS.shape[2])
    gone_B1S = ~at.exists_BS[:, None]
    assert bool(gone_B1S.any())
    dirty.codes_BTS = torch.where(gone_B1S, torch.randint(0, 32, clean.codes_BTS.shape), clean.codes_BTS)
    unknown_B1S, z = ~at.known_BS[:, None], clean.columns["latents"]
    dirty.columns["latents"] = torch.where(unknown_B1S, 9 * torch.randn_like(z), z)
    text = clean.columns["text"]
    dirty.columns["text"] = torch.where(text < 0, torch.randint(0, 4, text.shape), text)
    if isinstance(dirty, CodeBatch):
        assert dirty.eps_BJCS is not None
        assert dirty.z_BCS is not None
        dirty.eps_BJCS = torch.where(gone_B1S[:, None], 9 * torch.randn_like(dirty.eps_BJCS), dirty.eps_BJCS)
        dirty.z_BCS = torch.where(gone_B1S, 9 * torch.randn_like(dirty.z_BCS), dirty.z_BCS)
    assert torch.equal(loss_of(made, clean), loss_of(made, dirty))


@families
def test_a_loss_reads_the_network_at_the_positions_to_be_predicted_only(family: str, stores: dict[str, Path]) -> None:
    made = setup(stores, family, objective=OBJECTIVES[family])
    batch = made.batches.batch_at(3, range(8))
    at = places(batch.columns["durations"], batch.columns["known"], batch.codes_BTS.shape[2])
    open_BS1 = (at.exists_BS & ~at.known_BS).unsqueeze(-1)
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
def test_a_loss_does_not_depend_on_how_the_global_batch_is_shared(
    family: str, objective: dict[str, Any], stores: dict[str, Path]
) -> None:
    """Rows of 48 in shares of 48, of 32 and 16, and of 16: also the gradient of a weight of the trunk."""
    made = setup(stores, family, 48, objective=objective)
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
@pytest.mark.parametrize("cfg", [0.0, 1.5])
def test_garbage_where_nothing_is_known_does_not_change_a_sample(
    family: str, cfg: float, stores: dict[str, Path]
) -> None:
    made = setup(stores, family)
    _, options = made.loaded(cfg=cfg)
    lines = [line(made.store, row, known) for row, known in ((0, 1), (3, 0), (5, 1))]
    columns = speech.columns_of(lines, 32, CPU)
    at = places(columns["durations"], columns["known"], 32)
    keep = at.known_BS[:, None].repeat(1, T, 1)
    codes, noise = torch.randint(0, 32, (2, 3, T, 32)), 9 * torch.randn(3, C, 32)
    dirty = {**columns, "latents": torch.where(at.known_BS[:, None], columns["latents"], noise)}
    dirty["text"] = torch.where(columns["text"] < 0, 2, columns["text"])
    indices, other = torch.tensor([4, 7, 1]), torch.where(keep, codes[0], codes[1])
    a = made.generator.sample(columns, indices, options, Known(codes[0], keep))
    b = made.generator.sample(dirty, indices, options, Known(other, keep))
    exists = at.exists_BS[:, None].expand_as(a)
    assert torch.equal(a[exists], b[exists])
    assert torch.equal(a[keep], codes[0][keep])
    assert not torch.equal(a[exists], made.generator.sample(columns, indices + 1, options)[exists])


@families
@pytest.mark.parametrize("cfg", [0.0, 1.0])
def test_a_sample_depends_on_its_line_and_index_and_not_on_its_neighbours(
    family: str, cfg: float, stores: dict[str, Path]
) -> None:
    """One line alone against eight of other lengths, texts and prompts."""
    made = setup(stores, family)
    loaded, options = made.loaded(cfg=cfg, micro_batch=8)
    lines = [line(made.store, row, row % 2) for row in range(8)]
    assert len({one.length for one in lines}) > 3
    together = speech.draw(loaded, options, range(10, 18), lines)
    reversed_ = speech.draw(loaded, options, range(17, 9, -1), lines[::-1])[::-1]
    for row, one in enumerate(lines):
        alone = speech.draw(loaded, options, [10 + row], [one])[0]
        assert alone.shape == (T, one.length)
        assert torch.equal(alone, together[row])
        assert torch.equal(alone, reversed_[row])


@families
def test_a_prompt_keeps_its_codes_exactly_and_has_an_effect(family: str, stores: dict[str, Path]) -> None:
    made = setup(stores, family)
    loaded, options = made.loaded(cfg=1.0)
    one = line(made.store, 2, 1)
    P = one.latents.shape[1]
    codes = speech.draw(loaded, options, [6], [one])[0]
    eps = made.opened.tokenizer.noise("sample", 0, [6], [0], P)
    assert torch.equal(codes[:, :P], made.opened.tokenizer.quantizer.encode(one.latents[None], eps)[0])
    one.latents = one.latents.flip(0)
    assert not torch.equal(speech.draw(loaded, options, [6], [one])[0][:, P:], codes[:, P:])


@families
def test_the_pass_without_text_keeps_the_prompt(family: str, stores: dict[str, Path]) -> None:
    generator = (made := setup(stores, family)).generator
    columns = speech.columns_of([line(made.store, row, 1) for row in (0, 2)], 32, CPU)
    null = generator.null_condition(columns)
    other_text = generator.null_condition({**columns, "text": (columns["text"] + 1) % 4})
    other_prompt = generator.null_condition({**columns, "latents": columns["latents"].flip(1)})
    assert torch.equal(null.known_BS, generator.condition(columns).known_BS)  # type: ignore[arg-type]
    for part in ("vector_BD", "latents_BSD"):
        assert torch.equal(getattr(null, part), getattr(other_text, part))
        assert not torch.equal(getattr(null, part), getattr(other_prompt, part))
    assert not torch.equal(null.latents_BSD, generator.condition(columns).latents_BSD)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_resgen_takes_any_number_of_steps_also_of_rows_with_fewer_slots(steps: int, stores: dict[str, Path]) -> None:
    made = setup(stores, "resgen")
    loaded, options = made.loaded(steps=steps)
    loaded.check(options)
    short, long = line(made.store, 0, 0), line(made.store, 1, 1)
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
    sections = {"rdpm": {"objective": {"t_weights": "alpha"}}, "resgen": {}}[family]
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


@families
def test_durations_of_an_overfitted_set_are_predicted(family: str, tmp_path: Path) -> None:
    lengths = {"low": 2, "high": 7, "hiss": 4}
    spoken = [[(name, lengths[name]) for name in (a, b)] for a in lengths for b in lengths]
    store = speech_store(tmp_path / family, FAMILIES[family], spoken, latents=True)
    made = setup({family: store.root}, family)
    predictor = made.generator.network.trunk.speech.duration
    optimizer = torch.optim.Adam(predictor.parameters(), 1e-2)
    for step in range(100):
        optimizer.zero_grad()
        predictor.loss(made.batches.batch_at(step, range(8)).columns).backward()
        optimizer.step()
    names = store.manifest.condition_names
    for known in (0, 1):
        one = line(store, 3, known)
        predicted = predictor(speech.columns_of([one], 32, CPU))[0].exp()[known:].round().int().tolist()
        assert predicted == [lengths[names[unit]] for unit in one.units[known:]]


# ---- refusals, and sound -------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("settings", [{"text": "bytes", "latents": True}, {"latents": False}, {"text": None}])
def test_a_store_without_durations_or_latents_is_refused(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    store = speech_store(tmp_path, FAMILIES[family], SPOKEN[:5], **settings)
    with pytest.raises(DataError, match=str(store.root)):
        open_generator(store.root, speech_config(family))

"""How RDPM samples: schedules of guidance and temperature, who may be drawn, presets, what is remembered.

Legend: B images, T steps, C code width, H W grid, L positions, K codes.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generators import CLASSES, CODES, STEPS, Calls, make_generator, make_quantizer, save_generator
from helpers import sampling_options
from torch import Tensor

from rdpm_cli.config import RDPMSampling, ResGenSampling, SamplingConfig
from rdpm_cli.engine.sample_options import choose
from rdpm_cli.errors import RecipeError, UsageError
from rdpm_cli.generator import model, sampler, strategies
from rdpm_cli.generator.contract import Known
from rdpm_cli.generator.guidance import guidance_at, tau_at
from rdpm_cli.generator.transformer import Memory, Transformer, remembering
from rdpm_cli.recipe_files import validate
from rdpm_cli.threads import one_thread


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    with torch.random.fork_rng(), one_thread():  # networks this small lose time to threads
        torch.manual_seed(0)
        yield


# ---- guidance and temperature over t -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "more", "expected"),
    [
        ("constant", {}, [3.0, 3.0, 3.0, 3.0, 3.0]),
        ("linear", {}, [0.0, 0.75, 1.5, 2.25, 3.0]),
        ("cosine", {}, [3 * (1 - math.cos(math.pi * t / 4)) / 2 for t in range(5)]),
        ("power", {"power": 2.0}, [3 * (t / 4) ** 2 for t in range(5)]),
        ("power", {"power": 1.0}, [0.0, 0.75, 1.5, 2.25, 3.0]),
        ("interval", {}, [3.0, 3.0, 3.0, 3.0, 3.0]),
        ("interval", {"first": 2, "last": 3}, [0.0, 3.0, 3.0, 0.0, 0.0]),
        ("interval", {"first": 4}, [0.0, 0.0, 0.0, 3.0, 3.0]),
    ],
)
def test_guidance_follows_its_schedule(schedule: str, more: dict[str, Any], expected: list[float]) -> None:
    assert [guidance_at(t, 5, 3.0, schedule, **more) for t in range(1, 6)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "power", "interval"])
def test_one_step_has_the_whole_guidance(schedule: str) -> None:
    assert guidance_at(1, 1, 3.0, schedule) == 3.0


def test_tau_goes_from_its_value_to_its_end() -> None:
    assert [tau_at(t, 5, 1.0, 3.0) for t in range(1, 6)] == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0])
    assert {tau_at(t, 5, 1.3, None) for t in range(1, 6)} == {1.3}


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"cfg_schedule": "cosine"}, [3, 6, 6, 6]),
        ({"cfg_schedule": "power"}, [3, 6, 6, 6]),
        ({"cfg_schedule": "interval", "cfg_first": 2, "cfg_last": 3}, [3, 6, 6, 3]),
        ({"cfg_schedule": "interval", "cfg_first": 4, "skip_steps": 2}, [3, 6]),
    ],
    ids=str,
)
def test_only_guided_steps_have_an_unconditional_pass(options: dict[str, Any], rows: list[int]) -> None:
    generator = make_generator()
    calls = Calls(generator.network)
    how = sampling_options(cfg=2.0, **options)
    generator.sample(torch.arange(3), torch.arange(3), how)
    assert calls.rows == rows
    assert 3 * generator.passes(how) == sum(rows)


@pytest.mark.parametrize("first", [1, 3, 4])
def test_given_steps_have_no_pass(first: int) -> None:
    generator = make_generator()
    calls = Calls(generator.network)
    how = sampling_options(cfg=2.0, skip_steps=1)
    shape = (3, 4, *generator.grid)
    keep = (torch.arange(1, 5).view(1, -1, 1, 1) < first).expand(shape)
    generator.sample(torch.arange(3), torch.arange(3), how, Known(torch.zeros(shape, dtype=torch.int64), keep))
    assert 3 * generator.passes(how, first) == sum(calls.rows)


@pytest.mark.parametrize(
    "options",
    [
        {"cfg": 3.0, "cfg_schedule": "cosine"},
        {"cfg": 3.0, "cfg_schedule": "power"},
        {"cfg": 3.0, "cfg_schedule": "power", "cfg_power": 0.5},
        {"cfg": 3.0, "cfg_schedule": "interval", "cfg_first": 2},
        {"cfg": 3.0, "cfg_schedule": "interval", "cfg_last": 3},
        {"tau": 1.5, "tau_schedule": "linear", "tau_end": 0.5},
        {"top_k": 3},
        {"top_p": 0.3},
        {"draw": "argmax"},
        {"draw": "inverse"},
    ],
    ids=str,
)
def test_each_option_changes_the_samples(options: dict[str, Any]) -> None:
    generator = make_generator(std=0.5)
    args = (torch.arange(12) % 3, torch.arange(12))
    plain = {name: value for name, value in options.items() if name in ("cfg", "tau")}
    changed = generator.sample(*args, sampling_options(**options))
    assert not torch.equal(changed, generator.sample(*args, sampling_options(**plain)))
    if options.get("cfg_schedule") == "power":
        other = sampling_options(**{**options, "cfg_power": 4.0})
        assert not torch.equal(changed, generator.sample(*args, other))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tau_schedule": "linear"}, "tau_end go together"),
        ({"tau_end": 2.0}, "tau_end go together"),
        ({"cfg_first": 3, "cfg_last": 2}, "from step 3 to 2 is none"),
        ({"top_p": 0.0}, "top_p"),
        ({"cfg_schedule": "cosinus"}, "'cosine'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        validate(RDPMSampling, options, "sampling options")


@pytest.mark.parametrize(
    ("own", "preset", "asked", "text"),
    [
        (RDPMSampling(cfg=1.0), None, {"cfg_power": 3.0}, "--cfg-power does nothing with --cfg-schedule linear"),
        (RDPMSampling(cfg=1.0), "cfg", {"cfg_first": 2}, "--cfg-first does nothing with --cfg-schedule constant"),
        (RDPMSampling(), "raw", {"tau": 2.0}, "--tau does nothing with --draw argmax"),
        (RDPMSampling(draw="argmax"), None, {"top_k": 5}, "--top-k does nothing with --draw argmax"),
        (ResGenSampling(), None, {"conf": "rand", "conf_temp": 2.0}, "--conf-temp does nothing with --conf rand"),
    ],
)
def test_what_is_asked_for_and_would_do_nothing_is_refused(
    own: SamplingConfig, preset: str | None, asked: dict[str, Any], text: str
) -> None:
    with pytest.raises(UsageError, match=text):
        choose(own, preset, asked)


def test_what_a_checkpoint_records_may_do_nothing() -> None:
    own = RDPMSampling(cfg=1.0, cfg_schedule="power", cfg_power=3.0, tau=2.0)
    assert choose(own, None, {"cfg_schedule": "linear", "draw": "argmax"}).model_dump()["tau"] == 2.0


def test_an_interval_beyond_the_last_step_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--cfg-last: steps 2 to 9 of 4"):
        make_generator().check(sampling_options(cfg=1.0, cfg_schedule="interval", cfg_first=2, cfg_last=9))


@pytest.mark.parametrize("preset", ["cfg", "cfg-linear"])
def test_a_guided_preset_wants_a_lambda(preset: str) -> None:
    with pytest.raises(UsageError, match="lambda is 0"):
        choose(RDPMSampling(), preset, {})
    assert choose(RDPMSampling(), preset, {"cfg": 0.0}).cfg == 0
    assert choose(RDPMSampling(cfg=1.0), preset, {}).cfg == 1.0


def test_presets_are_legal_and_differ() -> None:
    made = [RDPMSampling(**{"cfg": 1.5, "tau": 2.0, **preset}) for preset in RDPMSampling.presets.values()]
    assert list(RDPMSampling.presets) == ["raw", "cfg", "cfg-linear", "gumbel"]
    assert len({m.model_dump_json() for m in made}) == 4
    assert [(m.cfg, m.cfg_schedule, m.draw) for m in made] == [
        (0.0, "linear", "argmax"),
        (1.5, "constant", "argmax"),
        (1.5, "linear", "argmax"),
        (1.5, "linear", "gumbel"),
    ]


def test_what_tuning_tries_is_legal() -> None:
    for name, values in RDPMSampling.search.items():
        assert len({getattr(RDPMSampling(**{name: value}), name) for value in values}) == len(values)


# ---- who may be drawn ----------------------------------------------------------------------------------------------


def test_top_k_keeps_the_largest() -> None:
    logits = torch.tensor([[[0.0, 3.0, 1.0, 2.0, -1.0]]])
    assert strategies.narrow(logits, 2, 1.0).isfinite().tolist() == [[[False, True, False, True, False]]]
    assert torch.equal(strategies.narrow(logits, 0, 1.0), logits)
    assert torch.equal(strategies.narrow(logits, 9, 1.0), logits)
    assert strategies.narrow(torch.zeros(1, 1, 5), 2, 1.0).isfinite().all()  # all equal the smallest kept


@pytest.mark.parametrize(
    ("p", "kept"), [(1e-6, [1]), (0.49, [1]), (0.5, [1]), (0.51, [1, 3]), (0.81, [1, 2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_fewest_of_enough_probability(p: float, kept: list[int]) -> None:
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log().view(1, 1, 4)
    found = strategies.narrow(logits, 0, p).isfinite().flatten().nonzero().flatten()
    assert found.tolist() == kept


def chances(logits: Tensor, how: RDPMSampling, count: int = 4000) -> Tensor:
    """How often each code is drawn, (K,)."""
    codes = strategies.draw(logits.expand(16, count // 16, -1), how, range(16), 1, 0)
    return torch.bincount(codes.flatten(), minlength=len(logits)) / count


@pytest.mark.parametrize("kind", ["gumbel", "inverse"])
def test_a_draw_follows_the_softmax(kind: str) -> None:
    logits = torch.tensor([0.0, 1.0, -torch.inf, 0.5])
    how = RDPMSampling.model_validate({"draw": kind})
    np.testing.assert_allclose(chances(logits, how), logits.softmax(0), atol=0.03)  # 4 standard errors
    assert chances(logits, how)[2] == 0


@pytest.mark.parametrize("kind", ["gumbel", "inverse"])
def test_a_row_is_drawn_by_its_own_index(kind: str) -> None:
    logits, how = torch.randn(3, 16, CODES), RDPMSampling.model_validate({"draw": kind})
    codes = strategies.draw(logits, how, [5, 9, 2], 3, 1)
    assert torch.equal(strategies.draw(logits[[2, 0]], how, [2, 5], 3, 1), codes[[2, 0]])
    assert not torch.equal(strategies.draw(logits, how, [5, 9, 2], 4, 1), codes)
    assert not torch.equal(strategies.draw(logits, how, [5, 9, 2], 3, 2), codes)


def test_argmax_is_the_likeliest_code() -> None:
    logits = torch.randn(2, 16, CODES)
    assert torch.equal(strategies.draw(logits, RDPMSampling(draw="argmax"), [0, 1], 1, 0), logits.argmax(-1))


# ---- what is remembered --------------------------------------------------------------------------------------------

NETWORKS: list[dict[str, Any]] = [{}, {"class_latents": True, "class_tokens": 2, "head": "geometric"}]


def trunk_of(network: dict[str, Any]) -> Transformer:
    trunk = make_generator(**network).network.get_submodule("trunk")
    assert isinstance(trunk, Transformer)
    return trunk


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_a_condition_is_what_the_network_computes(network: dict[str, Any]) -> None:
    trunk = trunk_of(network)
    x, labels = torch.randn(4, trunk.length, trunk.cfg.hidden), [2, 0, CLASSES, 2]
    t = torch.full((4,), 3)
    given = trunk(x, t, torch.tensor(labels), trunk.condition(3, labels))
    torch.testing.assert_close(given, trunk(x, t, torch.tensor(labels)))  # products of other shapes: last bits differ
    for row, label in enumerate(labels):
        alone = trunk(x[row : row + 1], t[:1], torch.tensor([label]))
        assert torch.equal(trunk(x[row : row + 1], t[:1], t[:1], trunk.condition(3, [label])), alone)


@pytest.mark.parametrize("network", NETWORKS, ids=str)
@pytest.mark.parametrize("limit", [0, 5000, 1 << 30])
def test_remembered_samples_are_bitwise_those_computed_each_time(network: dict[str, Any], limit: int) -> None:
    generator, options = make_generator(std=0.5, **network), sampling_options(cfg=1.5)
    labels = torch.tensor([0, 2, 0, 1])
    fresh = generator.sample(labels, torch.arange(4), options)
    trunk = generator.network.get_submodule("trunk")
    assert isinstance(trunk, Transformer)
    with remembering(trunk):
        assert trunk.memory is not None
        trunk.memory.free = limit
        for _ in range(2):
            assert torch.equal(generator.sample(labels, torch.arange(4), options), fresh)
        assert (len(trunk.memory.rows) == STEPS * 3 + (STEPS - 1)) == (limit == 1 << 30)
        assert 0 <= trunk.memory.free <= limit
    assert trunk.memory is None


def test_modulations_are_computed_once_for_a_step_and_class() -> None:
    trunk = trunk_of({})
    calls = Calls(trunk.modulation)
    with remembering(trunk):
        for _ in range(3):
            trunk.condition(1, [0, 1, 0])
            trunk.condition(2, [1])
    assert calls.rows == [1, 1, 1]


def test_memory_takes_what_fits() -> None:
    memory, row = Memory(100), torch.zeros(20)
    assert memory.take(row, None)
    assert not memory.take(row)
    assert memory.take(None, row[:5])
    assert memory.free == 0


# ---- how samples come about ----------------------------------------------------------------------------------------


def test_a_trajectory_tells_of_the_samples_that_are_drawn() -> None:
    generator, options = make_generator(std=0.5), sampling_options(skip_steps=1, tau=1.5)
    labels, indices = torch.arange(3), torch.arange(3)
    found = generator.trajectory(labels, indices, options)
    assert {name: tuple(v.shape) for name, v in found.items()} == dict.fromkeys(
        ("norm", "entropy", "confidence"), (3, STEPS)
    )
    codes = generator.sample(labels, indices, options)
    for t in range(1, STEPS + 1):
        z = generator.quantizer.prefix(codes, torch.full((3,), t))
        torch.testing.assert_close(found["norm"][:, t - 1], z.norm(dim=1).flatten(1).mean(1))
    assert found["entropy"][:, 0].isnan().all()
    assert found["confidence"][:, 0].isnan().all()
    for name, low, high in (("entropy", 0, math.log(CODES)), ("confidence", 1 / CODES, 1)):
        assert low < float(found[name][:, 1:].min()) <= float(found[name][:, 1:].max()) < high


def test_entropy_and_confidence_are_those_of_the_narrowed_softmax() -> None:
    logits = strategies.narrow(torch.randn(2, 5, CODES), 4, 1.0)
    p = logits.softmax(-1)
    entropy, confidence = strategies.look(logits)
    torch.testing.assert_close(entropy, -(p * p.clamp_min(1e-30).log()).sum(-1).mean(-1))
    torch.testing.assert_close(confidence, p.amax(-1).mean(-1))


def test_a_schedule_without_noise_can_be_narrowed_too() -> None:
    generator = make_generator(make_quantizer("rvq"))
    codes = generator.sample(torch.arange(2), torch.arange(2), sampling_options(top_k=5, top_p=0.9, cfg=1.0))
    assert 0 <= int(codes.min()) <= int(codes.max()) < CODES


# ---- forms of the network ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "mode"), [("default", "default"), ("graphs", "reduce-overhead"), ("off", None)])
def test_a_compiled_network_draws_the_same_samples(
    how: str, mode: str | None, tiny_tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced as a whole, with no code generated: a second, not minutes."""
    modes: list[str] = []
    compile_ = torch.compile

    def traced(network: Any, *, mode: str) -> Any:
        modes.append(mode)
        return compile_(network, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", traced)
    loaded = model.load(save_generator(tmp_path / "g.pt", tiny_tokenizer_file))
    args = (torch.arange(3), torch.arange(3), sampling_options(cfg=1.0))
    wanted = loaded.generator.sample(*args)
    loaded.to(torch.device("cpu"), how)
    assert torch.equal(loaded.generator.sample(*args), wanted)
    assert modes == ([mode] if mode else [])


@pytest.mark.parametrize("asked", [True, False])
def test_the_decoder_has_the_layout_of_the_options(asked: bool, tiny_tokenizer_file: Path, tmp_path: Path) -> None:
    loaded = model.load(save_generator(tmp_path / "g.pt", tiny_tokenizer_file))
    options = sampling_options(channels_last=asked)
    for _ in sampler.sample(loaded.generator, loaded.tokenizer, [0], options, 1):
        weight = loaded.tokenizer.decoder.get_parameter("mid.block_1.conv1.weight")
        assert weight.is_contiguous(memory_format=torch.channels_last) == asked
        assert weight.is_contiguous() != asked


def test_a_gpu_has_a_micro_batch_of_its_own() -> None:
    options = RDPMSampling(micro_batch=2, gpu_micro_batch=128)
    assert (options.images_at_once("cpu"), options.images_at_once("cuda")) == (2, 128)


@pytest.mark.parametrize("bias", ["blend", "none"])
def test_samples_do_not_depend_on_the_thread_count(bias: str) -> None:
    generator = make_generator(make_quantizer(bias=bias), std=0.5, class_latents=True, head="geometric")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(generator.sample(torch.arange(1), torch.arange(1), sampling_options(cfg=1.0)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(codes, found[0]) for codes in found)

"""A plan's numbers: operations against arithmetic, memory against a real step, hours against arithmetic."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, tiny_config
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from rdpm_cli import files
from rdpm_cli.cli.app import run
from rdpm_cli.distributed import TrainStep
from rdpm_cli.engine import plan
from rdpm_cli.engine.plan import Hardware, Make
from rdpm_cli.engine.train import recipe_settings
from rdpm_cli.engine.watch import GPUS, Gpu
from rdpm_cli.errors import UsageError
from rdpm_cli.generator.config import GeneratorConfig, RDPMConfig
from rdpm_cli.recipes import load_recipe
from rdpm_cli.tokenizer.config import TokenizerArchitecture
from rdpm_cli.training.config import TrainConfig


def generator_config(name: str, *overrides: str) -> RDPMConfig:
    cfg = load_recipe(name, overrides, "generator").generator
    assert isinstance(cfg, RDPMConfig)
    return cfg


def players(cfg: GeneratorConfig) -> Make:
    return plan.generator_players(cfg, TokenizerArchitecture(), 1000)


def small_generator(*overrides: str) -> RDPMConfig:
    return generator_config("imagenet256-d12", "network.depth=2", "network.width=128", *overrides)


# ---- operations ----------------------------------------------------------------------------------------------------


def rdpm_forward(L: int, C: int, K: int, D: int, depth: int) -> int:
    """Operations of one row of the paper's network by hand: 2 a multiply-add, products and attention alone."""
    F = max(1, round(8 * D / 3 / 64)) * 64  # SwiGLU's width
    block = 2 * L * D * (4 * D + 3 * F) + 4 * L * L * D + 12 * D * D  # with AdaLN once a row
    condition = 2 * D * (256 + D + 2 * D)  # the embedding of t, and the last AdaLN
    prefix = 18 * L * C * C  # the bias convolution of z'_{t-1}
    return condition + depth * block + 2 * L * D * (2 * C + K) + prefix


@pytest.mark.parametrize("name", ["imagenet256-d12", "imagenet256-d16"])
def test_operations_of_a_generator_are_those_of_arithmetic(name: str) -> None:
    cfg = generator_config(name)
    passes = plan.step_flops(players(cfg), cfg.train)
    D = 64 * cfg.network.depth
    assert passes["forward"] == pytest.approx(rdpm_forward(256, 32, 4096, D, cfg.network.depth), rel=0.005)
    # Attention's backward pass costs 2.5 forward ones, since its kernel computes the scores again; all else costs 2.
    scores_again = cfg.network.depth * 2 * 256**2 * D
    assert passes["backward"] == pytest.approx(2 * passes["forward"] + scores_again, rel=0.01)


def test_recomputed_activations_are_not_counted() -> None:
    plain, recomputed = small_generator(), small_generator("recompute=true")
    flops = [plan.generator_flops(cfg, TokenizerArchitecture()) for cfg in (plain, recomputed)]
    assert flops[0] == flops[1]
    assert plan.step_flops(players(recomputed), recomputed.train)["backward"] > flops[0] * 0.7


def test_rows_of_an_image_multiply_its_operations() -> None:
    one, three = small_generator(), small_generator("objective.steps_per_image=3")
    flops = [plan.generator_flops(cfg, TokenizerArchitecture()) for cfg in (one, three)]
    assert flops[1] == pytest.approx(3 * flops[0], rel=0.001)


def test_operations_of_a_tokenizer_count_both_players() -> None:
    without, pair = (tiny_config(loss={"adversarial": kind}) for kind in ("none", "hinge"))
    passes = plan.step_flops(plan.tokenizer_players(without), without.train)
    assert passes["backward"] == pytest.approx(2 * passes["forward"], rel=0.05)  # no gradient for the first input
    critic, tokenizer = plan.tokenizer_players(pair)(1)[0][1].model, plan.tokenizer_players(pair)(1)[0][0].model
    weights = [p for p in critic.parameters() if p.ndim == 4]
    outputs = (8 * 8, 4 * 4, 3 * 3, 2 * 2)  # positions after two layers of stride 2 and two of stride 1
    layers = [2 * p.numel() * n for p, n in zip(weights, outputs, strict=True)]
    # x' forward and back to the image for the tokenizer; x and x' forward and back for itself, not to the images
    expected = 2 * sum(layers) + 2 * (3 * sum(layers) - layers[0])
    # the adaptive weight: the gradients of both terms with respect to the decoder's last layer
    expected += 2 * 2 * tokenizer.get_parameter("decoder.conv_out.weight").numel() * 16 * 16
    assert plan.tokenizer_flops(pair) - plan.tokenizer_flops(without) == expected


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "cfg"),
    [
        (plan.tokenizer_players(tiny_config()), tiny_config().train),
        (players(small_generator()), small_generator().train),
    ],
)
def test_activations_are_affine_in_the_number_of_images(make: Make, cfg: TrainConfig) -> None:
    low, middle, high = (plan.activations(make, cfg, n) for n in (16, 32, 48))
    assert high - middle == pytest.approx(middle - low, rel=0.01)
    assert low < middle


def measured_peak(make: Make, cfg: TrainConfig, rows: int) -> int:
    """Of a real step: the most bytes that torch's allocator gave out at once, besides those it had given before."""
    [task], batch = make(rows)
    for parameter in task.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step = TrainStep(0, 0, range(rows), rows, CPU)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.autocast("cpu", torch.bfloat16, enabled=cfg.precision == "bf16"):
            loss, _ = task.loss(batch, step)
        loss.backward()
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    events, queue = [], list(results.experimental_event_tree())
    while queue:
        event = queue.pop()
        events.append(event)
        queue += event.children
    events.sort(key=lambda event: event.start_time_ns)
    fields: list[Any] = [event.extra_fields for event in events if event.tag == _EventType.Allocation]
    return max(f.total_allocated for f in fields) - (fields[0].total_allocated - fields[0].alloc_size)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_is_what_a_real_step_allocates(precision: str) -> None:
    cfg = small_generator(f"train.precision={precision}")
    real = measured_peak(players(cfg), cfg.train, 4)
    assert plan.activations(players(cfg), cfg.train, 4) == pytest.approx(real, rel=0.1)


def test_bf16_takes_less_memory_than_fp32() -> None:
    options = ["network.depth=4", "network.width=768"]
    low, high = (generator_config("imagenet256-d12", *options, f"train.precision={p}") for p in ("bf16", "fp32"))
    assert plan.activations(players(low), low.train, 64) < 0.8 * plan.activations(players(high), high.train, 64)


def test_memory_that_no_batch_changes_is_counted_by_part() -> None:
    cfg = small_generator()
    with plan.fake_tensors():
        made, _ = players(cfg)(1)
        fixed = plan.fixed_memory(made, cfg.train)
        learnt = 4 * sum(p.numel() for p in made[0].model.parameters())
        tables = 4 * sum(b.numel() for b in made[0].model.buffers())
        assert plan.fixed_memory(made, generator_config("imagenet256-d12", "train.ema=0").train)["ema"] == 0
    assert fixed == {"weights": learnt + tables, "gradients": learnt, "adam": 2 * learnt, "ema": learnt + tables}


@pytest.mark.parametrize(
    ("room", "most", "images"), [(-10, 1000, 0), (16, 1000, 16), (31, 1000, 16), (32, 1000, 32), (890, 40, 40)]
)
def test_the_largest_micro_batch_is_whole_blocks_that_fit(room: int, most: int, images: int) -> None:
    assert plan.largest_micro_batch(room, 1, most) == images


# ---- plans ---------------------------------------------------------------------------------------------------------


def test_hours_are_operations_over_the_gpus_rate() -> None:
    flops = {"forward": 10**12, "backward": 2 * 10**12}
    values = plan.timing(TrainConfig(batch=100, steps=3600), 1000, flops, Hardware(Gpu("g", "G", 1e14, 1), 2, 0.5))
    assert values["flops"]["run"] == 3600 * 100 * 3e12
    assert values["hours"] == pytest.approx(3)
    assert values["gpu_hours"] == pytest.approx(6)
    assert values["images_per_second"] == pytest.approx(1e14 / 3e12)
    assert values["epochs"] == 360


def answer(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    assert run([*args, "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def test_a_plan_without_a_store_assumes_imagenet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ("train-gen", "codes", "--recipe", "imagenet256-d12", "--dry-run", "--gpu", "a100", "--gpus", "8")
    values = answer(capsys, *args)
    assert "1,281,167" in values["assumed"]
    assert values["parameters"] == 133_394_944
    assert values["steps"] == round(200 * values["images"] / 1024)
    assert values["images"] == pytest.approx(0.98 * 1_281_167, rel=0.001)
    assert values["gpu_hours"] == pytest.approx(8 * values["hours"])
    assert values["gpu_hours"] == pytest.approx(values["flops"]["run"] / (0.4 * 312e12) / 3600)
    assert values["flops"]["image"] == sum(values["flops"]["image_parts"].values())
    assert values["flops"]["image_forward"] == values["flops"]["image_parts"]["forward"]
    assert values["store_gb"] == pytest.approx(6.575, abs=0.001)
    sizes = dict(values["memory_gib"])
    assert sizes.pop("total") == pytest.approx(sum(sizes.values()))
    assert values["micro_batch"] == 128
    assert values["largest_micro_batch"] == 128  # an eighth of the batch
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "changes", "latents"),
    [
        ("imagenet256-d12-plus", [], True),
        ("imagenet256-resgen-rvq4", [], True),
        ("imagenet256-resgen-rvq4", ["objective.sigma_psi=1"], False),
    ],
)
def test_the_planned_store_has_the_latents_that_training_reads(
    recipe: str, changes: list[str], latents: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = answer(capsys, "train-gen", str(tmp_path / "codes"), "--recipe", recipe, *changes, "--dry-run")
    codes = load_recipe(recipe, changes, "generator").tokenizer or TokenizerArchitecture()
    positions = math.prod(codes.autoencoder.grid)
    an_image = positions * (2 * codes.quantizer.steps + latents * 2 * codes.autoencoder.channels)
    assert values["store_gb"] == pytest.approx(1_281_167 * an_image / 1e9, rel=0.03)  # and labels, and indices


def test_a_plan_reads_an_existing_store(digits_codes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["network.depth=1", "network.width=32", "network.heads=2", "train.batch=16"]
    args = ("train-gen", str(digits_codes), "--recipe", "digits", "--dry-run", "--utilisation", "0.2", *small)
    values = answer(capsys, *args)
    assert values["assumed"] is None
    assert values["images"] == 34  # two are held out
    shards = sum(path.stat().st_size for path in digits_codes.glob("*.npy"))
    assert values["store_gb"] * 1e9 == pytest.approx(shards, abs=1024)  # but for the files' headers
    assert values["utilisation"] == 0.2


def test_a_plan_of_a_tokenizer_counts_its_images(capsys: pytest.CaptureFixture[str]) -> None:
    values = answer(capsys, "train-tokenizer", "digits", "--recipe", "digits", "--dry-run")
    assert values["images"] == 1500
    assert values["steps"] == 380
    assert values["fits"] is True
    assert values["largest_micro_batch"] == 64  # the whole batch


def test_a_micro_batch_that_does_not_fit_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("train-gen", "no-codes", "--recipe", "imagenet256-d20", "--dry-run", "--gpu", "rtx4090")
    values = answer(capsys, *args, "train.micro_batch=512")
    assert values["fits"] is False
    assert 0 < values["largest_micro_batch"] < 512
    assert values["largest_micro_batch"] % 16 == 0


@pytest.mark.parametrize(
    ("options", "token"),
    [
        (["--dry-run", "--gpu", "abacus"], "abacus"),
        (["--dry-run", "--utilisation", "1.5"], "1.5"),
        (["--dry-run", "--gpus", "3"], "48"),
    ],
)
def test_options_that_make_no_plan_are_usage_errors(
    options: list[str], token: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train-gen", "no-codes", "--recipe", "imagenet256-d12", *options]) == 2
    assert token in capsys.readouterr().err


def test_hardware_has_defaults() -> None:
    assert Hardware.of() == Hardware(GPUS[0], 1, 0.4)
    with pytest.raises(UsageError, match="abacus"):
        Hardware.of("abacus")


@pytest.mark.parametrize(
    ("folder", "code", "token"),
    [
        ("new", 0, "new"),
        ("started", 0, "started"),
        ("finished", 0, "finished"),
        ("other", 2, "recipe.generator.train.batch"),
        ("judge", 2, "train-gen"),
        ("full", 2, "something"),
    ],
)
def test_a_dry_run_checks_the_folder_of_the_run(
    folder: str, code: int, token: str, digits_codes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_settings(load_recipe("digits", [], "generator"), "generator")
    other = json.loads(json.dumps(recipe))
    other["generator"]["train"]["batch"] = 48
    kinds = {"started": recipe, "finished": recipe, "other": other, "judge": recipe}
    for name, section in kinds.items():
        settings = {"command": "train-judge" if name == "judge" else "train-gen", "recipe": section, "store": "x"}
        files.write_json(tmp_path / name / "run.json", {"settings": settings})
    (tmp_path / "finished" / "generator.pt").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    out = tmp_path / folder
    before = sorted(tmp_path.rglob("*"))
    assert run(["train-gen", str(digits_codes), "--recipe", "digits", "--out", str(out), "--dry-run", "--json"]) == code
    shown = capsys.readouterr()
    assert token in (json.loads(shown.out)["out_is"] if code == 0 else shown.err)
    assert sorted(tmp_path.rglob("*")) == before

"""What a plan says: operations against torch's counter, memory against a real step, hours against arithmetic."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, tiny_config
from pictures import encoded, make_tar, random_image
from torch import nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from rdpm_cli import files, recipe_files
from rdpm_cli.cli.app import run
from rdpm_cli.config import GeneratorConfig, RDPMConfig, TokenizerArchitecture, TokenizerConfig, TrainConfig
from rdpm_cli.engine import flops, gpus, memory, planning, runs
from rdpm_cli.engine.flops import Latent
from rdpm_cli.engine.memory import Make
from rdpm_cli.engine.planning import Hardware, Work
from rdpm_cli.errors import UsageError
from rdpm_cli.step import TrainStep
from rdpm_cli.tokenizer import perceptual
from rdpm_cli.tokenizer.discriminator import PatchDiscriminator
from rdpm_cli.tokenizer.model import Tokenizer

IMAGENET = Latent.of(TokenizerArchitecture())


def generator_config(name: str, *overrides: str) -> RDPMConfig:
    cfg = recipe_files.load_recipe(name, overrides, "generator").generator
    assert isinstance(cfg, RDPMConfig)
    return cfg


def tokenizer_config(name: str, *overrides: str) -> TokenizerConfig:
    cfg = recipe_files.load_recipe(name, overrides, "tokenizer").tokenizer
    assert cfg is not None
    return cfg


def maker(cfg: GeneratorConfig) -> Make:
    return planning.generator_maker(cfg, TokenizerArchitecture(), 1000)


def small_generator(*overrides: str) -> RDPMConfig:
    return generator_config("imagenet256-d12", "network.depth=2", "network.width=128", *overrides)


# ---- operations ----------------------------------------------------------------------------------------------------


SMALL_RESGEN = ["network.depth=4", "network.width=384", "network.heads=6"]


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("imagenet256-d12", []),
        ("imagenet256-d16", []),
        ("imagenet256-d20", []),
        ("imagenet256-d12-plus", ["network.class_tokens=4", "objective.steps_per_image=3"]),
        ("imagenet256-d12", ["network.width=384", "network.depth=3", "network.heads=6"]),
        ("imagenet256-resgen-rvq4", SMALL_RESGEN),
        ("imagenet256-resgen-rvq4", [*SMALL_RESGEN, "network.target=direct"]),
        ("imagenet256-resgen-rvq4", [*SMALL_RESGEN, "network.class_latents=true", "network.mixtures=16"]),
    ],
)
def test_operations_of_a_generator_are_those_that_torch_counts(recipe: str, overrides: list[str]) -> None:
    loaded, images = recipe_files.load_recipe(recipe, overrides, "generator"), 2
    cfg, codes = loaded.generator, loaded.tokenizer or TokenizerArchitecture()
    assert cfg is not None
    with memory.shapes_alone(), FlopCounterMode(display=False) as counter:
        [task], batch = planning.generator_maker(cfg, codes, 1000)(images)
        loss, _ = task.loss(batch, TrainStep(0, 0, range(images), images, CPU))
        forward = counter.get_total_flops() / images
        loss.backward()
    whole = counter.get_total_flops() / images
    latent = Latent.of(codes)
    told = flops.generator_step(cfg, latent)
    fresh = isinstance(cfg, RDPMConfig) and cfg.objective.noise == "fresh"
    noise = flops.quantiser(latent) if fresh else 0  # drawn by the batch's maker
    rows = cfg.objective.steps_per_image if isinstance(cfg, RDPMConfig) else 1
    assert told["forward"] == rows * flops.generator_forward(cfg.network, latent)
    assert told["forward"] == pytest.approx(forward, rel=0.005)
    assert told["backward"] == pytest.approx(whole - forward, rel=0.005)
    assert sum(told.values()) - noise == pytest.approx(whole, rel=0.005)


def test_operations_of_the_tokenizer_are_those_that_torch_counts() -> None:
    cfg = tokenizer_config("imagenet256-tokenizer")
    encoder, decoder = flops.autoencoder_forward(cfg.autoencoder)
    with memory.shapes_alone(), FlopCounterMode(display=False) as counter:
        tokenizer = Tokenizer(cfg)
        z = tokenizer.latents(torch.zeros(1, 3, 256, 256))
        assert encoder == pytest.approx(counter.get_total_flops(), rel=0.02)
        tokenizer.decode_latents(z).sum().backward()
    assert 3 * (encoder + decoder) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("overrides", [{}, {"attention": True, "res_blocks": 2, "features": 8, "quant_kernel": 1}])
def test_operations_of_a_whole_tokenizer_step_are_those_that_torch_counts(overrides: dict[str, Any]) -> None:
    cfg = tiny_config(autoencoder={**overrides, "resolution": 64, "width": 16})
    with memory.shapes_alone(), FlopCounterMode(display=False) as counter:
        players, batch = planning.tokenizer_maker(cfg)(2)
        for player in players:
            player.loss(batch, TrainStep(0, 0, range(2), 2, CPU))[0].backward()
    parts = flops.tokenizer_step(cfg)
    parts.pop("quantiser")
    assert sum(parts.values()) == pytest.approx(counter.get_total_flops() / 2, rel=0.02)
    encoder, decoder = flops.autoencoder_forward(cfg.autoencoder)
    assert flops.tokenizer_forward(cfg) == encoder + decoder + flops.quantiser(Latent.of(cfg))


def counted(network: nn.Module, *inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        network(*inputs)
    return counter.get_total_flops()


def test_operations_of_what_the_tokenizer_is_compared_by_are_those_that_torch_counts() -> None:
    cfg = tokenizer_config("imagenet256-tokenizer")
    with memory.shapes_alone():
        x = torch.zeros(1, 3, 256, 256)
        critic = counted(PatchDiscriminator(cfg.discriminator), x)
        lpips = perceptual.hollow("vgg")
        assert sum(p.numel() for p in lpips.trunk.layers.parameters()) == flops.VGG16_PARAMETERS
        vgg = counted(lpips, x, x) / 2
    assert flops.discriminator_forward(cfg.discriminator, 256) == pytest.approx(critic, rel=0.02)
    assert flops.vgg16_forward(256) == pytest.approx(vgg, rel=0.02)


def test_a_search_is_a_product_with_every_code() -> None:
    cfg = tiny_config()
    tokenizer = Tokenizer(cfg)
    z, eps = torch.randn(2, 4, 4, 4), torch.randn(2, 2, 4, 4, 4)
    with torch.no_grad():
        found = counted(tokenizer.quantizer.eval(), z, eps)
    latent = Latent.of(cfg)
    padded = latent.steps * flops.linear(latent.positions, 4 + 1, 64 - 32)  # 32 codes are padded to a tile of 64
    assert flops.quantiser(latent) == found / 2 - padded


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "cfg", "rows"),
    [
        (maker(small_generator()), small_generator().train, (16, 32, 48)),
        (planning.tokenizer_maker(tiny_config(loss={"perceptual": "lpips"}, train={"precision": "bf16"})),
         tiny_config(train={"precision": "bf16"}).train, (16, 32, 48)),
    ],
    ids=["generator", "tokenizer"],
)  # fmt: skip
def test_memory_grows_linearly_with_the_micro_batch(make: Make, cfg: TrainConfig, rows: tuple[int, ...]) -> None:
    low, middle, high = (memory.activations(make, cfg, n) for n in rows)
    assert high - middle == pytest.approx(middle - low, rel=0.01)
    assert low < middle


def events(profiler: profile) -> list[Any]:
    """All of a profile, in order of time."""
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    found, left = [], list(results.experimental_event_tree())
    while left:
        event = left.pop()
        found.append(event)
        left += event.children
    return sorted(found, key=lambda event: event.start_time_ns)


def measured_peak(make: Make, cfg: TrainConfig, rows: int) -> int:
    """Of a real step: the most bytes that torch's allocator says it had given out at once, beside what was there."""
    [task], batch = make(rows)
    for parameter in task.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step = TrainStep(0, 0, range(rows), rows, CPU)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.autocast("cpu", torch.bfloat16, enabled=cfg.precision == "bf16"):
            loss, _ = task.loss(batch, step)
        loss.backward()
    fields = [event.extra_fields for event in events(profiler) if event.tag == _EventType.Allocation]
    return max(f.total_allocated for f in fields) - (fields[0].total_allocated - fields[0].alloc_size)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_is_what_a_real_step_allocates(precision: str) -> None:
    cfg = small_generator(f"train.precision={precision}")
    real = measured_peak(maker(cfg), cfg.train, 4)
    assert memory.activations(maker(cfg), cfg.train, 4) == pytest.approx(real, rel=0.1)


def test_memory_is_little_more_than_what_autograd_keeps() -> None:
    cfg, kept, rows = generator_config("imagenet256-d12", "network.depth=6", "network.width=768"), dict[int, int](), 16

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return value

    with memory.shapes_alone():
        [task], batch = maker(cfg)(rows)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            loss, _ = task.loss(batch, TrainStep(0, 0, range(rows), rows, CPU))
        weights = {p.untyped_storage()._cdata for p in task.model.parameters()}
    saved = sum(size for key, size in kept.items() if key not in weights)
    assert loss.requires_grad
    assert saved < memory.activations(maker(cfg), cfg.train, rows) < 1.2 * saved


def test_bf16_takes_less_memory_than_fp32() -> None:
    options = ["network.depth=4", "network.width=768"]
    low, high = (generator_config("imagenet256-d12", *options, f"train.precision={p}") for p in ("bf16", "fp32"))
    assert memory.activations(maker(low), low.train, 64) < 0.8 * memory.activations(maker(high), high.train, 64)


def test_what_no_batch_changes_is_counted_by_part() -> None:
    cfg = small_generator()
    with memory.shapes_alone():
        players, _ = maker(cfg)(1)
        found = memory.fixed(players, cfg.train)
        learnt = 4 * sum(p.numel() for p in players[0].model.parameters())
        tables = 4 * sum(b.numel() for b in players[0].model.buffers())
    assert found == {"weights": learnt + tables, "gradients": learnt, "adam": 2 * learnt, "ema": learnt + tables}
    assert memory.fixed(players, generator_config("imagenet256-d12", "train.ema=0").train)["ema"] == 0


@pytest.mark.parametrize(
    ("room", "most", "found"), [(100, 1000, 0), (126, 1000, 16), (141, 1000, 16), (142, 1000, 32), (1000, 40, 40)]
)
def test_the_largest_micro_batch_is_whole_blocks_that_fit(room: int, most: int, found: int) -> None:
    assert planning.largest(fixed=100, start=10, each=1, room=room, most=most) == found


# ---- plans ---------------------------------------------------------------------------------------------------------


def test_hours_are_operations_over_what_the_gpus_do() -> None:
    work = Work("r", TrainConfig(batch=100, steps=3600), images=1000, forward=1, passes={"a": 2 * 10**12, "b": 10**12})
    found = planning.timing(work, Hardware(gpus.Gpu("g", "G", 1e14, 1), 2, 0.5))
    assert found["flops"]["run"] == 3600 * 100 * 3e12
    assert found["hours"] == pytest.approx(3)
    assert found["gpu_hours"] == pytest.approx(6)
    assert found["images_per_second"] == pytest.approx(1e14 / 3e12)
    assert found["epochs"] == 360


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A10G", None),
    ],
)
def test_a_device_is_known_by_its_whole_name(device: str, name: str | None) -> None:
    found = gpus.of_device(device)
    assert (found.name if found else None) == name


def test_names_of_gpus_are_unique() -> None:
    assert len({gpu.name for gpu in gpus.GPUS}) == len(gpus.GPUS)
    assert gpus.called("H200").bf16_flops == 989.4e12


def answer(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    assert run([*args, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_plan_without_a_store_assumes_imagenet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ("train-gen", "codes", "--recipe", "imagenet256-d12", "--dry-run", "--gpu", "a100", "--gpus", "8")
    found = answer(capsys, *args)
    assert "1,281,167" in found["assumed"]
    assert found["parameters"] == 133_394_944
    assert found["steps"] == round(200 * found["images"] / 1024)
    assert found["images"] == pytest.approx(0.98 * 1_281_167, rel=0.001)
    assert found["gpu_hours"] == pytest.approx(8 * found["hours"])
    assert found["gpu_hours"] == pytest.approx(found["flops"]["run"] / (0.4 * 312e12) / 3600)
    assert found["flops"]["image"] == sum(found["flops"]["image_parts"].values())
    assert found["flops"]["image_forward"] == found["flops"]["image_parts"]["forward"]
    assert found["store_gb"] == pytest.approx(6.575, abs=0.001)
    parts = dict(found["memory_gib"])
    assert parts.pop("total") == pytest.approx(sum(parts.values()))
    assert found["micro_batch"] == 128
    assert found["largest_micro_batch"] == 128  # an eighth of the batch
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "changes", "latents"),
    [
        ("imagenet256-d12-plus", [], True),
        ("imagenet256-resgen-rvq4", [], True),
        ("imagenet256-resgen-rvq4", ["objective.sigma_psi=1"], False),
    ],
)
def test_the_planned_store_has_the_latents_that_training_looks_at(
    recipe: str, changes: list[str], latents: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answer(capsys, "train-gen", str(tmp_path / "codes"), "--recipe", recipe, *changes, "--dry-run")
    loaded = recipe_files.load_recipe(recipe, changes, "generator")
    latent = Latent.of(loaded.tokenizer or TokenizerArchitecture())
    an_image = latent.positions * (2 * latent.steps + latents * 2 * latent.channels)
    assert found["store_gb"] == pytest.approx(1_281_167 * an_image / 1e9, rel=0.03)  # and labels, and indices


def test_a_plan_counts_the_images_of_a_pattern(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shard in range(2):
        make_tar(tmp_path / f"train-{shard}.tar", {f"{i}.png": encoded(random_image(16, 16)) for i in range(3)})
    found = answer(capsys, "train-tokenizer", str(tmp_path / "train-{0..1}.tar"), "--recipe", "digits", "--dry-run")
    assert (found["images"], found["assumed"]) == (6, None)


def test_a_plan_reads_the_store_that_is_there(digits_codes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["network.depth=1", "network.width=32", "network.heads=2", "train.batch=16"]
    args = ("train-gen", str(digits_codes), "--recipe", "digits", "--dry-run", "--utilisation", "0.2", *small)
    found = answer(capsys, *args)
    assert found["assumed"] is None
    assert found["images"] == 34  # two are held out
    shards = sum(path.stat().st_size for path in digits_codes.glob("*.npy"))
    assert found["store_gb"] * 1e9 == pytest.approx(shards, abs=1024)  # but for the files' heads
    assert found["utilisation"] == 0.2


def test_a_plan_of_a_tokenizer_counts_its_images(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "train-tokenizer", "digits", "--recipe", "digits", "--dry-run")
    assert found["images"] == 1500
    assert found["steps"] == 380
    assert found["fits"] is True
    assert found["largest_micro_batch"] == 64  # the whole batch


def test_a_micro_batch_that_does_not_fit_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("train-gen", "no-codes", "--recipe", "imagenet256-d12", "--dry-run", "--gpu", "l4", "train.micro_batch=256")
    found = answer(capsys, *args)
    assert found["fits"] is False
    assert 0 < found["largest_micro_batch"] < 256
    assert found["largest_micro_batch"] % 16 == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gpu", "h200"], "belongs to --dry-run"),
        (["--utilisation", "0.5"], "belongs to --dry-run"),
        (["--dry-run", "--gpu", "abacus"], "h200, h100"),
        (["--dry-run", "--utilisation", "1.5"], "share"),
        (["--dry-run", "--gpus", "3"], "multiple of 48"),
    ],
)
def test_what_makes_no_plan_is_a_usage_error(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train-gen", "no-codes", "--recipe", "imagenet256-d12", *options]) == 2
    assert says in capsys.readouterr().err


def test_hardware_has_defaults() -> None:
    assert Hardware.of() == Hardware(gpus.called("h200"), 1, 0.4)
    with pytest.raises(UsageError, match="not in the table"):
        Hardware.of("abacus")


@pytest.mark.parametrize(
    ("folder", "code", "says"),
    [
        ("new", 0, "new"),
        ("begun", 0, "begun: it would be resumed"),
        ("finished", 0, "finished: nothing would be done"),
        ("other", 2, "was begun with other settings: recipe.generator.train.batch"),
        ("judge", 2, "is no run of train-gen"),
        ("file", 2, "file is a file"),
        ("full", 2, "is not empty"),
    ],
)
def test_a_dry_run_looks_at_the_folder_of_the_run(
    folder: str, code: int, says: str, digits_codes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    recipe = runs.chosen(recipe_files.load_recipe("digits", [], "generator"), "generator")
    other = json.loads(json.dumps(recipe))
    other["generator"]["train"]["batch"] = 48
    kinds = {"begun": recipe, "finished": recipe, "other": other, "judge": recipe}
    for name, chosen in kinds.items():
        settings = {"command": "train-judge" if name == "judge" else "train-gen", "recipe": chosen, "store": "x"}
        files.write_json(tmp_path / name / "run.json", {"settings": settings})
    (tmp_path / "finished" / "generator.pt").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    args = [
        "train-gen",
        str(digits_codes),
        "--recipe",
        "digits",
        "--out",
        str(tmp_path / folder),
        "--dry-run",
        "--json",
    ]
    assert run(args) == code
    shown = capsys.readouterr()
    assert says in (json.loads(shown.out)["out_is"] if code == 0 else shown.err)
    assert not (tmp_path / "new").exists()

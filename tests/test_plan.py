"""A plan's numbers: operations against arithmetic, memory against a real step, hours against arithmetic."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from generators import save_generator
from helpers import CPU, tiny_config
from sounds import FAMILIES, speech_store
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from rdpm_cli import checkpoint, files
from rdpm_cli.cli.app import run
from rdpm_cli.distributed import TrainStep
from rdpm_cli.engine import plan
from rdpm_cli.engine.train import recipe_settings
from rdpm_cli.generator import registry
from rdpm_cli.generator.contract import GeneratorTask
from rdpm_cli.recipes import load_recipe
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.config import TokenizerArchitecture
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.tokenizer.networks import PatchDiscriminator

Capture = pytest.CaptureFixture[str]
GIB = 2**30
SMALL = ["network.depth=2", "network.width=128"]


def plan_of(capsys: Capture, recipe: str, *args: str, codes: str = "no-codes") -> dict[str, Any]:
    """The answer of `train-gen CODES --dry-run`."""
    assert run(["train-gen", codes, "--recipe", recipe, "--dry-run", "--json", *args]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def rdpm_forward(L: int, C: int, K: int, D: int, depth: int) -> int:
    """Operations of one row of the paper's network by hand: 2 per multiply-add, only products and attention."""
    F = 8 * D // 3  # SwiGLU's width
    block = 2 * L * D * (4 * D + 3 * F) + 4 * L * L * D + 12 * D * D  # with AdaLN once a row
    condition = 2 * D * (256 + D + 2 * D)  # the embedding of t, and the last AdaLN
    prefix = 18 * L * C * C  # the bias convolution of z'_{t-1}
    return condition + depth * block + 2 * L * D * (2 * C + K) + prefix


@pytest.mark.parametrize("depth", [12, 16])
def test_operations_of_a_generator_are_those_of_arithmetic(depth: int, capsys: Capture) -> None:
    parts = plan_of(capsys, f"imagenet256-d{depth}")["flops"]["image_parts"]
    assert parts["forward"] == pytest.approx(rdpm_forward(256, 32, 4096, 64 * depth, depth), rel=0.005)
    # Attention's backward pass costs 2.5 forward ones, since its kernel computes the scores again; all else costs 2.
    scores_again = depth * 2 * 256**2 * 64 * depth
    assert parts["backward"] == pytest.approx(2 * parts["forward"] + scores_again, rel=0.01)


def test_operations_count_rows_per_image_but_not_recomputed_activations() -> None:
    changes: list[list[str]] = [[], ["recompute=true"], ["objective.steps_per_image=3"]]
    loaded = [load_recipe("imagenet256-d12", [*SMALL, *change], "generator").generator for change in changes]
    plain, recomputed, triple = (plan.generator_flops(cfg, TokenizerArchitecture()) for cfg in loaded if cfg)
    assert recomputed == plain
    assert triple == pytest.approx(3 * plain, rel=0.001)


def test_operations_of_a_tokenizer_count_both_players() -> None:
    without, pair = (tiny_config(loss={"adversarial": kind}) for kind in ("none", "hinge"))
    weights = [p for p in PatchDiscriminator(pair.discriminator).parameters() if p.ndim == 4]
    positions = (8 * 8, 4 * 4, 3 * 3, 2 * 2)  # after two layers of stride 2 and two of stride 1
    layers = [2 * p.numel() * n for p, n in zip(weights, positions, strict=True)]
    # x' forward and back to the image for the tokenizer; x and x' forward and back for itself, not to the images
    expected = 2 * sum(layers) + 2 * (3 * sum(layers) - layers[0])
    # the adaptive weight: the gradients of both terms with respect to the decoder's last layer
    expected += 2 * 2 * Tokenizer(pair).get_parameter("decoder.conv_out.weight").numel() * 16 * 16
    assert plan.tokenizer_flops(pair) - plan.tokenizer_flops(without) == expected


def real_peak(rows: int, *overrides: str) -> int:
    """The most bytes that torch's allocator gave out at once in a real step, without those it had given before."""
    cfg = load_recipe("imagenet256-d12", overrides, "generator").generator
    assert cfg is not None
    quantizer = Tokenizer(TokenizerArchitecture()).quantizer.eval().requires_grad_(False)
    family = registry.FAMILIES[cfg.family]
    task = GeneratorTask(family.make(cfg.network, quantizer, 1000))
    batch = family.batches.blank(cfg, quantizer, rows)
    for parameter in task.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.autocast("cpu", torch.bfloat16, enabled=cfg.train.precision == "bf16"):
            loss, _ = task.loss(batch, TrainStep(0, 0, range(rows), rows, CPU))
        loss.backward()
    profiled: Any = profiler.profiler
    events, queue = [], list(profiled.kineto_results.experimental_event_tree())
    while queue:
        events.append(event := queue.pop())
        queue += event.children
    events.sort(key=lambda event: event.start_time_ns)
    fields: list[Any] = [event.extra_fields for event in events if event.tag == _EventType.Allocation]
    return max(f.total_allocated for f in fields) - (fields[0].total_allocated - fields[0].alloc_size)


@pytest.mark.parametrize(("precision", "rows"), [("fp32", 16), ("bf16", 16), ("bf16", 48)])
def test_memory_is_what_a_real_step_allocates(precision: str, rows: int, capsys: Capture) -> None:
    overrides = [*SMALL, f"train.precision={precision}"]
    planned = plan_of(capsys, "imagenet256-d12", *overrides, f"train.batch={rows}")["memory_gib"]["activations"]
    assert planned * GIB == pytest.approx(real_peak(rows, *overrides), rel=0.1)


def test_memory_is_counted_by_part(capsys: Capture) -> None:
    options = ["network.depth=4", "network.width=768", "train.batch=64"]
    fp32 = plan_of(capsys, "imagenet256-d12", *options, "train.precision=fp32", "train.ema=0")
    bf16 = plan_of(capsys, "imagenet256-d12", *options, "train.precision=bf16")
    sizes, learnt = bf16["memory_gib"], 4 * bf16["parameters"] / GIB
    assert (sizes["gradients"], sizes["adam"]) == (learnt, 2 * learnt)
    assert learnt < sizes["weights"] == sizes["ema"] < 1.01 * learnt  # with the tables of positions
    assert fp32["memory_gib"]["ema"] == 0
    assert sizes["activations"] < 0.8 * fp32["memory_gib"]["activations"]
    assert sizes["total"] == pytest.approx(sum(sizes.values()) - sizes["total"])


def test_a_plan_without_a_store_assumes_imagenet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    values = plan_of(capsys, "imagenet256-d12", "--gpu", "a100", "--gpus", "8")
    assert "1,281,167" in values["assumed"]
    assert values["parameters"] == 133_394_944
    assert values["images"] == pytest.approx(0.98 * 1_281_167, rel=0.001)
    assert values["steps"] == round(200 * values["images"] / 1024)
    flops, rate = values["flops"], 0.4 * 8 * 312e12
    assert flops["image_parts"]["forward"] == flops["image_forward"]
    assert flops["image"] == sum(flops["image_parts"].values()) == pytest.approx(rate / values["images_per_second"])
    assert flops["run"] == pytest.approx(values["steps"] * 1024 * flops["image"])
    assert values["hours"] == pytest.approx(flops["run"] / rate / 3600)
    assert values["gpu_hours"] == pytest.approx(8 * values["hours"])
    assert values["epochs"] == pytest.approx(200, rel=0.001)
    assert values["store_gb"] == pytest.approx(27.566, abs=0.001)  # of which latents 21
    assert values["micro_batch"] == values["largest_micro_batch"] == 128  # an eighth of the batch
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("changes", "latents"), [([], True), (["objective.sigma_psi=1"], False)])
def test_the_planned_store_has_the_latents_that_training_reads(
    changes: list[str], latents: bool, capsys: Capture
) -> None:
    codes = load_recipe("imagenet256-resgen-rvq4", changes, "generator").tokenizer
    assert codes is not None
    positions = math.prod(codes.autoencoder.grid)
    image_bytes = positions * (2 * codes.quantizer.steps + latents * 2 * codes.autoencoder.channels)
    planned = plan_of(capsys, "imagenet256-resgen-rvq4", *changes)["store_gb"]
    assert planned == pytest.approx(1_281_167 * image_bytes / 1e9, rel=0.03)  # and labels, and indices


def test_a_plan_reads_the_data_that_are_there(digits_codes: Path, capsys: Capture) -> None:
    small = ["network.depth=1", "network.width=32", "network.heads=2", "train.batch=16"]
    values = plan_of(capsys, "digits", "--utilisation", "0.2", *small, codes=str(digits_codes))
    assert (values["assumed"], values["utilisation"]) == (None, 0.2)
    assert values["images"] == 34  # two are held out
    shards = sum(path.stat().st_size for path in digits_codes.glob("*.npy"))
    assert values["store_gb"] * 1e9 == pytest.approx(shards, abs=1024)  # but for the files' headers
    assert run(["train-tokenizer", "digits", "--recipe", "digits", "--dry-run", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["images"], values["steps"], values["fits"]) == (1500, 380, True)
    assert values["largest_micro_batch"] == 64  # the whole batch


def test_a_micro_batch_that_does_not_fit_is_reported(capsys: Capture) -> None:
    values = plan_of(capsys, "imagenet256-d20", "--gpu", "rtx4090", "train.micro_batch=512")
    assert values["fits"] is False
    assert values["largest_micro_batch"] in range(16, 512, 16)


@pytest.mark.parametrize(
    ("options", "token"), [("--gpu abacus", "abacus"), ("--utilisation 1.5", "--utilisation"), ("--gpus 3", "48")]
)
def test_options_that_make_no_plan_are_usage_errors(options: str, token: str, capsys: Capture) -> None:
    assert run(["train-gen", "no-codes", "--recipe", "imagenet256-d12", "--dry-run", *options.split()]) == 2
    assert token in capsys.readouterr().err


@pytest.mark.parametrize("state", ["new", "started", "finished", "other", "judge", "full"])
def test_a_dry_run_checks_the_folder_of_the_run(
    state: str, digits_codes: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / state
    recipe = recipe_settings(load_recipe("digits", ["train.batch=48"] * (state == "other"), "generator"), "generator")
    settings = {"command": "train-judge" if state == "judge" else "train-gen", "recipe": recipe, "store": "x"}
    if state == "full":
        files.write_json(out / "something", {})
    elif state != "new":
        files.write_json(out / "run.json", {"settings": settings})
    if state == "finished":
        (out / "generator.pt").touch()
    before = sorted(tmp_path.rglob("*"))
    refused = {"other": "recipe.generator.train.batch", "judge": "train-judge", "full": "something"}
    code = 2 if state in refused else 0
    assert run(["train-gen", str(digits_codes), "--recipe", "digits", "--out", str(out), "--dry-run"]) == code
    assert refused.get(state, state) in "".join(capsys.readouterr())
    assert sorted(tmp_path.rglob("*")) == before


TOKENIZER = "train-tokenizer digits --recipe digits --dry-run"
TINY = (  # the sizes of the tiny tokenizer's file
    "autoencoder.width=8 autoencoder.multipliers=[1,1,2] autoencoder.res_blocks=1 autoencoder.groups=4 "
    "autoencoder.channels=4 quantizer.codes=64 quantizer.steps=4"
)
WARM = "train-gen {codes} --recipe digits --dry-run"
GENERATOR = f"{WARM} proxy.samples=4"


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("command", "token"),
    [
        (f"{TOKENIZER} --from-weights {{absent}}", "absent.pt"), (f"{TOKENIZER} --from-weights {{text}}", "text.pt"),
        (f"{TOKENIZER} --from-weights {{other}}", "other.pt"), (f"{TOKENIZER} --from-weights {{tokenizer}}", "encoder"),
        (f"{TOKENIZER} loss.perceptual=lpips loss.perceptual_weights={{absent}}", "absent.pt"),
        (f"{TOKENIZER} loss.perceptual=lpips loss.perceptual_weights={{other}}", "other.pt"),
        (f"{WARM} --from-weights {{absent}}", "absent.pt"), (f"{WARM} --from-weights {{tokenizer}}", "tokenizer.pt"),
        (f"{GENERATOR} proxy.extractor={{absent}}", "absent.pt"),
        (f"{GENERATOR} proxy.extractor={{tokenizer}}", "tokenizer.pt"),
        (f"{GENERATOR} proxy.weights={{absent}}", "absent.pt"), (f"{GENERATOR} proxy.weights={{other}}", "other.pt"),
    ],
)  # fmt: skip
def test_weights_that_the_run_refuses_are_refused_by_its_plan(
    command: str, token: str, digits_codes: Path, tiny_tokenizer_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "text.pt").write_text("404")
    torch.save({"a": torch.ones(3)}, tmp_path / "other.pt")
    paths = {name: tmp_path / f"{name}.pt" for name in ("absent", "text", "other")}
    line = command.format(codes=digits_codes, tokenizer=tiny_tokenizer_file, **paths)
    for words in (line, line.replace("--dry-run", f"--out {tmp_path / 'run'}")):
        assert run(words.split()) == 3
        assert token in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_weights")
def test_published_weights_that_are_absent_are_a_value_of_the_plan(digits_codes: Path, capsys: Capture) -> None:
    for command, kind, name in (
        (f"{TOKENIZER} loss.perceptual=lpips", "perceptual", "vgg16"),
        (GENERATOR.format(codes=digits_codes), "proxy", "weights-inception"),
    ):
        assert run([*command.split(), "--json"]) == 0
        assert name in json.loads(capsys.readouterr().out)["weights"][kind]


def test_a_plan_says_what_the_run_would_take_of_the_weights(tiny_tokenizer_file: Path, capsys: Capture) -> None:
    assert run([*TOKENIZER.split(), *TINY.split(), "--from-weights", str(tiny_tokenizer_file), "--json"]) == 0
    weights = json.loads(capsys.readouterr().out)["weights"]
    assert weights["perceptual"] is None
    assert all(token in weights["from_weights"] for token in ("tokenizer.pt", "rdpm", "0 left"))


def test_a_plan_of_a_generator_says_what_the_run_would_take_of_the_weights(
    digits_codes: Path, tiny_tokenizer_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    path = save_generator(tmp_path / "generator.pt", tiny_tokenizer_file)
    words = [*WARM.format(codes=digits_codes).split(), "network.depth=2", "network.width=32", "network.heads=2"]
    assert run([*words, "--from-weights", str(path), "--json"]) == 0
    taken = json.loads(capsys.readouterr().out)["weights"]["from_weights"]
    assert all(token in taken for token in ("generator.pt", "raw", "0 left"))


@pytest.mark.parametrize("given", [True, False])
def test_a_plan_compares_the_weights_of_a_started_run(
    given: bool, tiny_tokenizer_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    recipe = recipe_settings(load_recipe("digits", TINY.split(), "tokenizer"), "tokenizer")
    settings = {"command": "train-tokenizer", "recipe": recipe, "perceptual": None, "from_weights": {"sha256": "0"}}
    files.write_json(tmp_path / "run" / "run.json", {"settings": settings})
    options = ["--from-weights", str(tiny_tokenizer_file)] if given else []
    assert run([*TOKENIZER.split(), *TINY.split(), "--out", str(tmp_path / "run"), *options]) == 2
    assert "from_weights" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["damaged", "another"])
def test_a_plan_reads_the_tokenizer_of_the_store(
    change: str, digits_codes: Path, tmp_path: Path, capsys: Capture
) -> None:
    copy = Path(shutil.copytree(digits_codes, tmp_path / "codes")) / "tokenizer.pt"
    if change == "damaged":
        copy.write_bytes(copy.read_bytes()[:-3000])
    else:
        content = checkpoint.load(copy)
        weights = {name: value + 1 for name, value in content["weights"].items()}
        digest = checkpoint.model_digest(weights, content["config"])
        checkpoint.save(copy, {**content, "weights": weights, "digest": digest})
    assert run(["train-gen", str(tmp_path / "codes"), "--recipe", "digits", "--dry-run"]) == 3
    assert "codes" in capsys.readouterr().err


@pytest.mark.parametrize("align", ["durations", "cross"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_of_speech_counts_a_mean_row_and_holds_the_longest(
    family: str, align: str, tmp_path: Path, capsys: Capture
) -> None:
    """Against the operations of a real batch of one row of the mean length."""
    spoken = [[("low", 6), ("high", 4)], [("rise", 10), ("hiss", 20)]] * 2  # 10 and 30 latents of 2 words
    store = speech_store(tmp_path, FAMILIES[family], spoken, latents=True)
    recipe = {"rdpm": "speech8-sin", "resgen": "speech8-rvq"}[family]
    small = ["network.depth=1", "network.width=32", "network.heads=2", f"network.align={align}", "train.batch=16"]
    small += ["network.mixtures=8"] if family == "resgen" else []
    values = plan_of(capsys, recipe, *small, codes=str(store.root))
    cfg = load_recipe(recipe, small, "generator").generator
    assert cfg is not None
    opened = registry.open_codes(store.root, cfg, 0)
    generator = registry.build(cfg, opened.tokenizer, len(store.manifest.condition_names))
    registry.prepare(generator, cfg)
    with FlopCounterMode(display=False) as counter:
        task, family_of = GeneratorTask(generator), registry.FAMILIES[family]
        batch = family_of.batches.blank(cfg, opened.tokenizer.quantizer, 1, (20, 2))
        task.loss(batch, TrainStep(0, 0, range(1), 1, CPU))[0].backward()
    assert values["flops"]["image"] == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert values["parameters"] == model.parameters(generator.network)
    assert (values["images"], values["assumed"]) == (3, None)


def test_a_plan_without_a_store_of_speech_assumes_libritts(capsys: Capture) -> None:
    options = ["network.depth=1", "network.width=64", "network.heads=1", "train.batch=32"]
    values = plan_of(capsys, "libritts-resgen", *options)
    assert "LibriTTS" in values["assumed"]
    assert values["hours"] * 3600 * values["images_per_second"] == pytest.approx(1_000_000 * 32)

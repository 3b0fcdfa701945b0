"""Observers of a run: numbers of the machine, loss spikes, the proxy score of a generator."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CPU, assert_same, metrics, newest_state
from processes import tokenizer_command

from rdpm_cli import checkpoint, progress
from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.codes.store import CodeStore, store_reference
from rdpm_cli.engine import plan, watch
from rdpm_cli.engine.generator import train_gen
from rdpm_cli.engine.watch import GIB
from rdpm_cli.errors import CheckpointError, DataError, RecipeError
from rdpm_cli.evaluation import features, judge, reference
from rdpm_cli.evaluation import metrics as measures
from rdpm_cli.evaluation.judge import Judge
from rdpm_cli.generator import registry, sampler
from rdpm_cli.generator.config import ProxyConfig
from rdpm_cli.generator.contract import SampleOptions
from rdpm_cli.recipes import load_recipe
from rdpm_cli.runs import Result, StopRequest
from rdpm_cli.tokenizer.config import TokenizerConfig
from rdpm_cli.training.log import read_metrics
from rdpm_cli.training.loop import Run

# ---- the machine ---------------------------------------------------------------------------------------------------

GPU = torch.device("cuda:0")


def run_on(device: torch.device) -> Run:
    return Run(Path("run"), 0, device, steps=4, warmup=0, stop=StopRequest(), step=1)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, each on an H200 whose tensors took 3 GiB at most."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * GIB)
    monkeypatch.setattr(watch, "world", lambda: (0, 2))


@pytest.mark.usefixtures("a_gpu")
def test_utilisation_is_the_share_of_all_gpus_peaks() -> None:
    logs = {"loss": 1.0, "images_per_second": 1000.0}
    watch.machine(10**12)(run_on(GPU), logs)
    assert logs["flops_per_second"] == 1e15
    assert logs["utilisation"] == pytest.approx(1e15 / 2 / 989.4e12)
    assert logs["memory_gib"] == 3
    with progress.Bar("train", 4, "steps") as bar:
        watch.progress_bar(bar)(run_on(GPU), logs)
    assert "51%" in bar.note


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_a_gpu_is_known_by_its_whole_name(device: str, name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    gpu = watch.known_gpu(GPU)
    assert (gpu.name if gpu else None) == name
    assert watch.known_gpu(CPU) is None


def test_peak_memory_of_a_process_is_its_largest_resident_size() -> None:
    before = watch.peak_memory(CPU)
    size = before + (64 << 20)  # more than ever was resident
    block = torch.ones(size // 4)
    assert before < watch.peak_memory(CPU) < 3 * size
    assert len(block) > 0


def test_every_line_of_a_run_carries_the_machine_s_numbers(tmp_path: Path) -> None:
    assert run_cli(tokenizer_command(tmp_path / "run", "train.steps=2", "train.batch=16")) == 0
    overrides = [word for word in tokenizer_command(tmp_path) if "=" in word]
    cfg = load_recipe("digits", overrides, "tokenizer").tokenizer
    assert isinstance(cfg, TokenizerConfig)
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["flops_per_second"] == pytest.approx(row["images_per_second"] * plan.tokenizer_flops(cfg))
        assert 0.05 < row["memory_gib"] < 100
        assert "utilisation" not in row


# ---- loss spikes ---------------------------------------------------------------------------------------------------


def test_a_spike_of_the_loss_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw, observe = random.Random(0), watch.loss_spikes()
    run = Run(tmp_path, 0, CPU, steps=100, warmup=0, stop=StopRequest())
    for step in range(1, 101):
        run.step, loss = step, {10: 2.5, 60: 9.0}.get(step, draw.gauss(2.0, 0.1))
        observe(run, {"loss": loss} if step % 2 == 0 else None)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" at step ")[2].partition(" ")[0] for line in lines] == ["60"]


# ---- the proxy score -----------------------------------------------------------------------------------------------

SMALL = [
    "network.depth=1",
    "network.width=32",
    "network.heads=2",
    "train.batch=16",
    "train.steps=4",
    "train.eval_every=2",
    "train.log_every=1",
]


@pytest.fixture(scope="module")
def judge_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained judge of the classes a, b, c."""
    path = tmp_path_factory.mktemp("judge") / "judge.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Judge(16, width=8, features=6, classes=3)
    checkpoint.save(path, judge.pack(network, list("abc"), provenance={"heldout_accuracy": 0.25}))
    return path


def train(codes: Path, out: Path, *overrides: str) -> Result:
    return train_gen(codes, out, "digits", [*SMALL, *overrides], device="cpu")


def test_the_proxy_score_is_that_of_the_same_samples_scored_by_hand(
    digits_codes: Path, judge_file: Path, tmp_path: Path
) -> None:
    result = train(digits_codes, tmp_path / "run", "proxy.samples=7", f"proxy.extractor={judge_file}")
    rows = [row for row in metrics(tmp_path / "run") if "proxy/frechet_distance" in row]
    assert [row["step"] for row in rows] == [2, 4]
    loaded = registry.load(tmp_path / "run" / "generator.pt")
    labels, sampling = [0, 0, 0, 1, 1, 2, 2], loaded.sampling
    options = SampleOptions(sampling)
    samples = list(sampler.sample(loaded.generator, loaded.tokenizer, labels, options, sampling.micro_batch))
    extractor = features.open_extractor(judge_file, None, CPU)
    store = CodeStore(digits_codes)
    target = reference.open_recorded(store_reference(store.root, store.manifest), "store", "hint")
    drawn = features.collect(extractor, [s.pixels_BHWC for s in samples])
    real = features.collect(extractor, target)
    expected = measures.frechet_distance(measures.statistics(drawn.features_ND), measures.statistics(real.features_ND))
    assert rows[-1]["proxy/frechet_distance"] == pytest.approx(expected, rel=1e-9)
    assert rows[-1]["proxy/class_accuracy"] == np.mean(drawn.predicted == np.array(labels))
    assert result.values["proxy/frechet_distance"] == rows[-1]["proxy/frechet_distance"]


def test_the_proxy_changes_nothing_and_may_begin_when_a_run_resumes(
    digits_codes: Path, judge_file: Path, tmp_path: Path
) -> None:
    train(digits_codes, tmp_path / "without")
    train(digits_codes, tmp_path / "with", "proxy.samples=4", f"proxy.extractor={judge_file}")
    assert_same(newest_state(tmp_path / "with"), newest_state(tmp_path / "without"))
    (tmp_path / "without" / "generator.pt").unlink()
    train(digits_codes, tmp_path / "without", "proxy.samples=4", f"proxy.extractor={judge_file}")


@pytest.mark.usefixtures("no_weights")
def test_absent_weights_are_named_before_the_run_starts(digits_codes: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="weights-inception"):
        train(digits_codes, tmp_path / "run", "proxy.samples=4")
    with pytest.raises(CheckpointError, match="no-judge"):
        train(digits_codes, tmp_path / "run", "proxy.samples=4", "proxy.extractor=no-judge.pt")
    assert not (tmp_path / "run").exists()


def test_an_absent_reference_is_named_before_the_run_starts(digits_codes: Path, judge_file: Path) -> None:
    store = CodeStore(digits_codes)
    data = store.manifest.data.model_copy(update={"source": "no/such/folder"})
    store.manifest = store.manifest.model_copy(update={"data": data})
    with pytest.raises(DataError, match="no/such/folder") as refused:
        watch.check_proxy(ProxyConfig(samples=4, extractor=str(judge_file)), store)
    assert "proxy.samples=0" in refused.value.hint


def test_a_limit_takes_reference_images_evenly_spaced(digits_codes: Path) -> None:
    store = CodeStore(digits_codes)
    record = store_reference(store.root, store.manifest)
    few = reference.open_recorded(record, "store", "hint", 6)
    whole = reference.open_recorded(record, "store", "hint")
    assert (few.count, few.labels) == (6, [0, 0, 1, 1, 2, 2])
    pixels, every = (np.concatenate(list(images.read([range(images.count)]))) for images in (few, whole))
    assert np.array_equal(pixels, every[::6])


def test_one_sample_has_no_covariance() -> None:
    with pytest.raises(RecipeError, match=r"proxy\.samples"):
        load_recipe("digits", ["generator.proxy.samples=1"])

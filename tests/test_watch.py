"""Observers of a run: numbers of the machine, the proxy score of a generator."""

from pathlib import Path

import extractors
import numpy as np
import pytest
import torch
from extractors import save_judge
from helpers import CPU, assert_same, metrics, newest_state
from processes import generator_command, tokenizer_command

from rdpm_cli import progress
from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.codes.store import CodeStore, store_reference
from rdpm_cli.engine import plan, watch
from rdpm_cli.engine.generator import train_gen
from rdpm_cli.errors import CheckpointError, DataError
from rdpm_cli.evaluation import backbones, features
from rdpm_cli.evaluation import metrics as measures
from rdpm_cli.evaluation.reference import open_recorded
from rdpm_cli.generator import registry, sampler
from rdpm_cli.generator.config import ProxyConfig
from rdpm_cli.generator.contract import SampleOptions
from rdpm_cli.recipes import load_recipe
from rdpm_cli.runs import Result, StopRequest
from rdpm_cli.tokenizer.config import TokenizerConfig
from rdpm_cli.training.log import read_metrics
from rdpm_cli.training.loop import Run

GPU = torch.device("cuda:0")


def test_utilisation_is_the_share_of_all_gpus_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 30)
    monkeypatch.setattr(watch, "world", lambda: (0, 2))
    run, logs = Run(Path("run"), 0, GPU, 4, 0, StopRequest(), step=1), {"loss": 1.0, "images_per_second": 1000.0}
    watch.machine(10**12)(run, logs)
    assert logs["flops_per_second"] == 1e15
    assert logs["utilisation"] == pytest.approx(1e15 / 2 / 989.4e12)
    assert logs["memory_gib"] == 3
    with progress.Bar("train", 4, "steps") as bar:
        watch.progress_bar(bar)(run, logs)
    assert "51%" in bar.note


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA A100-SXM4-40GB", None), ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)  # fmt: skip
def test_a_gpu_is_known_by_its_whole_name(device: str, name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    gpu = watch.known_gpu(GPU)
    assert (gpu.name if gpu else None) == name
    assert watch.known_gpu(CPU) is None


def test_every_line_of_a_run_carries_the_machine_s_numbers(tmp_path: Path) -> None:
    args = tokenizer_command(tmp_path / "run", "train.steps=2", "train.batch=16")
    assert run_cli(args) == 0
    cfg = load_recipe("digits", [word for word in args if "=" in word], "tokenizer").tokenizer
    assert isinstance(cfg, TokenizerConfig)
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["flops_per_second"] == pytest.approx(row["images_per_second"] * plan.tokenizer_flops(cfg))
        assert 0.05 < row["memory_gib"] < 100
        assert "utilisation" not in row


@pytest.fixture(scope="module")
def judge_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_judge(tmp_path_factory.mktemp("judge") / "judge.pt")


def train(codes: Path, out: Path, *overrides: str) -> Result:
    small = [word for word in generator_command(codes, out, "train.batch=16", "train.steps=4") if "=" in word]
    return train_gen(codes, out, "digits", [*small, "train.eval_every=2", *overrides], device="cpu")


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
    extractor, store = backbones.open_extractor(judge_file, None, CPU), CodeStore(digits_codes)
    drawn = features.collect(extractor, [s.pixels_BHWC for s in samples])
    real = open_recorded(store_reference(store.root, store.manifest), "store", "hint")
    a, b = (measures.statistics(x.features_ND) for x in (drawn, features.collect(extractor, real)))
    assert rows[-1]["proxy/frechet_distance"] == pytest.approx(measures.frechet_distance(a, b), rel=1e-9)
    assert rows[-1]["proxy/class_accuracy"] == np.mean(drawn.logits_NK.argmax(1) == np.array(labels))
    assert result.values["proxy/frechet_distance"] == rows[-1]["proxy/frechet_distance"]


def test_the_proxy_changes_nothing_and_may_begin_when_a_run_resumes(
    digits_codes: Path, judge_file: Path, tmp_path: Path
) -> None:
    proxy = ("proxy.samples=4", f"proxy.extractor={judge_file}")
    train(digits_codes, tmp_path / "without")
    train(digits_codes, tmp_path / "with", *proxy)
    assert_same(newest_state(tmp_path / "with"), newest_state(tmp_path / "without"))
    (tmp_path / "without" / "generator.pt").unlink()
    train(digits_codes, tmp_path / "without", *proxy)


@pytest.mark.usefixtures("no_weights")
def test_absent_weights_and_references_are_named_before_the_run_starts(
    digits_codes: Path, judge_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for extractor, name in (("inception", "weights-inception"), ("no-judge.pt", "no-judge")):
        with pytest.raises(CheckpointError, match=name):
            train(digits_codes, tmp_path / "run", "proxy.samples=4", f"proxy.extractor={extractor}")
    assert not (tmp_path / "run").exists()
    store = CodeStore(digits_codes)
    data = store.manifest.data.model_copy(update={"source": "no/such/folder"})
    store.manifest = store.manifest.model_copy(update={"data": data})
    monkeypatch.setattr(extractors, "SIDE", 64)
    with pytest.raises(DataError, match=r"16×16.*64×64"):
        watch.open_proxy(ProxyConfig(samples=4, extractor=str(save_judge(tmp_path / "large.pt"))), store, CPU)
    with pytest.raises(DataError, match="no/such/folder"):
        watch.open_proxy(ProxyConfig(samples=4, extractor=str(judge_file)), store, CPU)

"""Guidance by one pass, learnt in training, and by a weaker generator in place of the null class.

Legend: R rows, S positions, D hidden width, K codes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generators import (  # noqa: F401
    CLASSES,
    Calls,
    fixed_seed,
    make_generator,
    make_quantizer,
    sample,
    sampling_options,
    save_generator,
)
from helpers import CPU
from torch import Tensor, nn

from rdpm_cli.cli.app import run
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.distributed import TrainStep
from rdpm_cli.engine.generator import train_gen
from rdpm_cli.errors import UsageError
from rdpm_cli.generator.config import NetworkConfig, RDPMConfig
from rdpm_cli.generator.contract import Condition, Guide
from rdpm_cli.generator.drawing import guide
from rdpm_cli.generator.rdpm import RDPM, CodeBatches
from rdpm_cli.tokenizer import model
from rdpm_cli.training.config import TrainConfig


class Told(nn.Module):
    """A network whose hidden state is exactly as guided as it is told: (1 + lambda) cond - lambda null, of a table."""

    guidance, latent_head, raw_scale = 2.0, None, None

    def __init__(self, inner: Any, is_guided: bool) -> None:
        super().__init__()
        self.trunk, self.head, self.is_guided = inner.trunk, inner.head, is_guided
        self.table = nn.Buffer(torch.randn(CLASSES + 1, 32, generator=torch.Generator().manual_seed(3)))

    def forward(
        self, eps: Tensor, previous: Tensor, t_R: Tensor, condition: Condition, lambda_R: Tensor | None = None
    ) -> Tensor:
        classes = torch.cdist(condition.vector_BD, self.trunk.class_embedding.weight).argmin(1)
        cond, null = self.table[classes], self.table[-1:]
        guided = cond if lambda_R is None or not self.is_guided else cond + lambda_R.view(-1, 1) * (cond - null)
        return guided.unsqueeze(1) + eps.mean(1).unsqueeze(-1)


def make_batches(root: Path, tokenizer_file: Path, **network: Any) -> tuple[CodeBatches, RDPM]:
    quantizer = model.load(tokenizer_file)[0].quantizer
    sizes: dict[str, Any] = {"depth": 1, "width": 32, "heads": 2, **network}
    cfg = RDPMConfig(network=NetworkConfig(**sizes), train=TrainConfig(batch=16, steps=1))
    return CodeBatches(CodeStore(root), cfg, quantizer, 0), RDPM(cfg.network, quantizer, CLASSES)


def test_what_learns_the_codes_is_the_guided_network_with_the_guidance_taken_out(
    digits_codes: Path, tiny_tokenizer_file: Path
) -> None:
    """A network that guides as it is told has, for any lambda, the cross-entropy of its conditional logits."""
    losses = []
    for guidance in (0.0, 2.0):
        batches, generator = make_batches(digits_codes, tiny_tokenizer_file, guidance=guidance)
        inner = generator.network
        for layer in (inner.head, inner.trunk.class_embedding):
            assert layer is not None
            nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(2))
        generator.network = Told(inner, is_guided=bool(guidance))  # type: ignore[assignment]
        batch = batches.batch_at(0, range(16))
        assert (batch.lambda_BJ is None) == (guidance == 0)
        loss, _ = generator.loss(batch, TrainStep(0, 0, range(16), 16, CPU))
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_lambda_is_spread_up_to_the_largest_and_0_without_a_class(
    digits_codes: Path, tiny_tokenizer_file: Path
) -> None:
    batches, _ = make_batches(digits_codes, tiny_tokenizer_file, guidance=2.0)
    drawn = [batches.batch_at(step, range(16)) for step in range(40)]
    lambdas = torch.cat([batch.lambda_BJ for batch in drawn if batch.lambda_BJ is not None])[:, 0]
    labels = torch.cat([batch.columns["labels"] for batch in drawn])
    assert not lambdas[labels == CLASSES].any()
    asked = lambdas[labels < CLASSES]
    assert 0 < float(asked.min()) < 0.1
    assert 1.9 < float(asked.max()) < 2
    assert float(asked.mean()) == pytest.approx(1, abs=0.1)


def test_the_null_class_learns_from_its_own_rows_only(digits_codes: Path, tiny_tokenizer_file: Path) -> None:
    batches, generator = make_batches(digits_codes, tiny_tokenizer_file, guidance=2.0)
    nn.init.normal_(generator.network.head.weight)
    batch = batches.batch_at(0, range(16))
    keep = batch.columns["labels"] < CLASSES
    assert batch.lambda_BJ is not None
    batch.columns["labels"][~keep] = 0
    generator.loss(batch, TrainStep(0, 0, range(16), 16, CPU))[0].backward()
    embedding = generator.network.trunk.class_embedding
    assert embedding is not None
    assert embedding.weight.grad is not None
    assert not embedding.weight.grad[CLASSES].any()


def test_a_guided_step_is_one_pass_and_lambda_changes_the_sample() -> None:
    generator = make_generator(guidance=2.0)
    calls, T = Calls(generator.network), generator.quantizer.steps
    drawn = {cfg: sample(generator, [0, 1], [4, 5], sampling_options(1, cfg=cfg)) for cfg in (0.0, 1.0, 2.0)}
    assert calls.rows == [2] * 3 * T
    assert generator.passes(sampling_options(1, cfg=2.0)) == T
    assert len({str(codes.tolist()) for codes in drawn.values()}) == 3
    with pytest.raises(UsageError):
        sample(generator, [0], [0], sampling_options(cfg=2.5))


def test_a_plain_generator_goes_on_as_one_with_guidance(digits_codes: Path, tmp_path: Path) -> None:
    network = ("network.depth=1", "network.width=32", "network.heads=2")
    fixed = ("train.steps=2", "train.eval_every=0", "train.batch=16", *network)
    train_gen(digits_codes, tmp_path / "plain", "digits", fixed, device="cpu")
    file = tmp_path / "plain" / "generator.pt"
    guided = (*fixed, "network.guidance=1")
    train_gen(digits_codes, tmp_path / "guided", "digits", guided, device="cpu", from_weights=file)
    words = ["sample", "--ckpt", str(tmp_path / "guided" / "generator.pt"), "--out", str(tmp_path / "samples")]
    assert run([*words, "--per-class", "1", "--cfg", "1", "--device", "cpu", "--quiet"]) == 0
    assert run([*words, "--per-class", "1", "--cfg", "1.5", "--device", "cpu", "--quiet"]) == 2


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path, rvq_file: Path) -> dict[str, Path]:
    """Generators: two of the same codes, one of other classes, one of another tokenizer."""
    root = tmp_path_factory.mktemp("files")
    return {
        "main": save_generator(root / "main.pt", tiny_tokenizer_file),
        "weak": save_generator(root / "weak.pt", tiny_tokenizer_file, std=0.1),
        "classes": save_generator(root / "classes.pt", tiny_tokenizer_file, names="xyz"),
        "codes": save_generator(root / "codes.pt", rvq_file),
    }


def drawn(ckpt: Path, out: Path, *words: str) -> tuple[bytes, dict[str, Any]]:
    """All pixels, and the record."""
    args = ["sample", "--ckpt", str(ckpt), "--out", str(out), "--per-class", "1", "--device", "cpu", "--quiet"]
    assert run([*args, *words]) == 0
    return b"".join(p.read_bytes() for p in sorted(out.glob("*.png"))), json.loads((out / "samples.json").read_text())


def test_a_generator_that_guides_itself_has_no_effect_and_another_one_has(
    files: dict[str, Path], tmp_path: Path
) -> None:
    plain, _ = drawn(files["main"], tmp_path / "plain")
    itself, record = drawn(files["main"], tmp_path / "itself", "--cfg", "2", "--guide", str(files["main"]))
    assert itself == plain
    assert record["made_from"]["guide"] == record["made_from"]["checkpoint"]
    other, record = drawn(files["main"], tmp_path / "other", "--cfg", "2", "--guide", str(files["weak"]))
    assert other != plain
    assert record["made_from"]["guide"] != record["made_from"]["checkpoint"]


def test_autoguided_logits_are_beyond_the_strong_ones_away_from_the_weak_ones() -> None:
    """At T = 1 steps of argmax the codes are those of strong + lambda (strong - weak), by hand."""
    quantizer = make_quantizer("rvq", steps=1)
    strong, weak = make_generator(quantizer), make_generator(quantizer, std=0.4)
    options = sampling_options(0, cfg=1.5, cfg_schedule="constant", draw="argmax")
    codes = sample(strong, [0, 2], [3, 4], replace(options, guide=Guide(weak, "")))
    eps = quantizer.noise("sample", 0, [3, 4], [0, 0], [1, 1], None)
    labels, one = {"labels": torch.tensor([0, 2])}, torch.ones(2).long()
    logits = [
        x.predict(torch.as_tensor(eps), torch.zeros(2, 4, 16), one, x.condition(labels))[0] for x in (strong, weak)
    ]
    assert torch.equal(codes[:, 0], guide(torch.cat(logits), 1.5).argmax(-1))


@pytest.mark.parametrize(
    ("guide_file", "words", "code"),
    [
        ("weak", (), 2), ("classes", ("--cfg", "1"), 2), ("codes", ("--cfg", "1"), 2), ("gone", ("--cfg", "1"), 3),
        ("@5", ("--cfg", "1"), 3),
    ],
)  # fmt: skip
def test_a_guide_that_cannot_guide_is_refused(
    guide_file: str, words: tuple[str, ...], code: int, files: dict[str, Path], tmp_path: Path
) -> None:
    """Without a lambda, of other classes, of other codes; a missing file, and a missing run."""
    named = files.get(guide_file, tmp_path / guide_file)
    args = ["sample", "--ckpt", str(files["main"]), "--out", str(tmp_path / "out"), "--guide", str(named), *words]
    assert run([*args, "--device", "cpu"]) == code
    assert not (tmp_path / "out").exists()


def test_an_earlier_step_of_a_run_guides_it(digits_codes: Path, tmp_path: Path) -> None:
    """Its last step is the generator itself, which has no effect."""
    words = ("train.steps=4", "train.save_every=1", "train.keep=4", "train.eval_every=0", "train.batch=16")
    network = ("network.depth=1", "network.width=32", "network.heads=2", "train.lr=0.03", "train.warmup_steps=0")
    train_gen(digits_codes, tmp_path / "run", "digits", (*words, *network), device="cpu")
    file = tmp_path / "run" / "generator.pt"
    samples = {
        step: drawn(file, tmp_path / step, "--cfg", "4", "--guide", f"{tmp_path / 'run'}@{step}")[0] for step in "14"
    }
    plain = drawn(file, tmp_path / "plain", "--cfg", "0")[0]
    assert samples["4"] == plain
    assert samples["1"] != plain
    args = ["sample", "--ckpt", str(file), "--out", str(tmp_path / "out"), "--cfg", "4", "--device", "cpu"]
    assert run([*args, "--guide", f"{tmp_path / 'run'}@9"]) == 3


@pytest.mark.parametrize(
    ("words", "offending"),
    [
        (["network.guidance=2", "objective.label_drop=0"], "label_drop=0"),
        (["sampling.cfg=1", "sampling.guide=weak.pt"], "sampling.guide"),
    ],
)
def test_recipes_that_could_not_be_sampled_as_they_say_are_refused(
    words: list[str], offending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train-gen", "codes", "--recipe", "digits", *words]) == 2
    assert offending in capsys.readouterr().err

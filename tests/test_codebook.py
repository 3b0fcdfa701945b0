"""The codebook's start (on data, by k-means), and by the command line; its alarm."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, digits, distance, metrics, tiny_config, tiny_players
from pydantic import ValidationError
from torch import Tensor, nn

from rdpm_cli import checkpoint
from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.data.pixels import to_model
from rdpm_cli.distributed import TrainStep
from rdpm_cli.engine import tokenizer as engine
from rdpm_cli.engine import watch
from rdpm_cli.runs import StopRequest
from rdpm_cli.tokenizer.config import ScheduleConfig, TokenizerConfig
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.tokenizer.quantizer import Quantizer
from rdpm_cli.tokenizer.training import initialise
from rdpm_cli.training.loop import Run, fit

K, T, C = 32, 2, 4


def first_batch(cfg: TokenizerConfig) -> Tensor:
    return digits(cfg).batch_at(0, range(cfg.train.batch))


@torch.no_grad()
def vectors_of(tokenizer: Tokenizer, pixels: Tensor) -> Tensor:
    """v_t of Eq. 2 written out, over the codebook as it is, (T, N, C); 16 images, the step's own noise."""
    quantizer = tokenizer.quantizer
    z = tokenizer.latents(to_model(pixels))
    eps = TrainStep(0, 0, range(16), 16, CPU).normal(T, *tokenizer.latent_shape)
    vectors, total = [], torch.zeros_like(z)
    for t, alpha in enumerate(quantizer.alphas, 1):
        v = alpha * (z - total) + (1 - alpha**2) ** 0.5 * eps[:, t - 1]
        total = total + quantizer.bias(quantizer.look_up(quantizer.quantize(v, t), t))
        vectors.append(v.transpose(1, 2).reshape(-1, C))
    return torch.stack(vectors)


def nearest(codes_KC: Tensor, vectors_NC: Tensor) -> Tensor:
    """Distance of each code to the vector nearest to it, in float64, (K,)."""
    return torch.cdist(codes_KC.double(), vectors_NC.double(), compute_mode="donot_use_mm_for_euclid_dist").amin(1)


def initialised(
    init: str, books: str = "shared", codebook: str = "ema", seed: int = 0
) -> tuple[Quantizer, Tensor, Tensor]:
    """-> the quantiser after its start, its codebooks before, the vectors of the batch."""
    cfg = tiny_config(quantizer={"init": init, "codebooks": books, "codebook": codebook})
    tokenizer, pixels = tiny_players(cfg)[0].model, first_batch(cfg)
    assert isinstance(tokenizer, Tokenizer)
    vectors, previous = vectors_of(tokenizer, pixels), tokenizer.quantizer.books.detach().clone()
    initialise(tokenizer, pixels, seed)
    return tokenizer.quantizer, previous, vectors


def test_data_puts_every_code_on_a_vector_of_the_batch_or_of_its_step() -> None:
    quantizer, _, vectors = initialised("data")
    assert nearest(quantizer.books[0], vectors.flatten(0, 1)).max() < 1e-6
    assert len(quantizer.books[0].unique(dim=0)) == K
    quantizer, _, vectors = initialised("data", "per_step")
    for t in range(T):
        assert nearest(quantizer.books[t], vectors[t]).max() < 1e-6
        assert nearest(quantizer.books[t], vectors[1 - t]).max() > 1e-3


@pytest.mark.parametrize("books", ["shared", "per_step"])
def test_kmeans_lowers_the_error_on_those_vectors(books: str) -> None:
    errors = {}
    for init in ("normal", "data", "kmeans"):
        quantizer, _, vectors = initialised(init, books)
        pools = vectors if books == "per_step" else vectors.flatten(0, 1).unsqueeze(0)
        pairs = zip(pools, quantizer.books.detach(), strict=True)
        errors[init] = [float(nearest(pool, book).pow(2).mean()) for pool, book in pairs]
    for kmeans, data, normal in zip(errors["kmeans"], errors["data"], errors["normal"], strict=True):
        assert kmeans < 0.95 * data
        assert data < normal


def test_an_ema_follows_from_the_start_and_a_gradient_book_stays_a_parameter() -> None:
    quantizer, _, _ = initialised("kmeans")
    assert torch.equal(quantizer.ema_sums / quantizer.ema_counts.unsqueeze(-1), quantizer.books)
    assert bool((quantizer.ema_counts == 1).all())
    assert initialised("kmeans", codebook="gradient")[0].books.requires_grad
    quantizer, previous, _ = initialised("normal")
    assert torch.equal(quantizer.books, previous)


@pytest.mark.parametrize("init", ["data", "kmeans"])
def test_the_start_is_a_function_of_images_and_seed(init: str) -> None:
    (first, *_), (second, *_), (third, *_) = (initialised(init, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.books, second.books)
    assert not torch.equal(first.books, third.books)


@pytest.mark.parametrize(("books", "codes"), [("shared", 512), ("per_step", 256)])
def test_fewer_vectors_than_codes_are_refused(books: str, codes: int) -> None:
    """16 images of 16 positions: 256 vectors a step."""
    fields = {"init": "data", "codebooks": books}
    tiny_config(quantizer={**fields, "codes": codes})
    with pytest.raises(ValidationError, match=rf"for {codes + 1} codes.*train\.batch"):
        tiny_config(quantizer={**fields, "codes": codes + 1})
    tiny_config(quantizer={**fields, "codes": codes + 1, "init": "normal"})


SMALL = [
    "autoencoder.width=8", "autoencoder.channels=4", "autoencoder.res_blocks=1", "quantizer.codes=32",
    "quantizer.steps=2", "quantizer.init=kmeans", "train.batch=32", "train.save_every=1", "train.keep=10",
]  # fmt: skip


def command(out: Path, *arguments: object) -> list[str]:
    head = ["train-tokenizer", "digits", "--recipe", "digits", "--device", "cpu", "--out", str(out)]
    return [*head, *SMALL, *map(str, arguments)]


def starts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the calls that initialise the codebook."""
    calls: list[int] = []

    def counted(*args: Any) -> None:
        calls.append(1)
        initialise(*args)

    monkeypatch.setattr(engine, "initialise", counted)
    return calls


def test_a_resumed_run_keeps_its_codebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, out = starts(monkeypatch), tmp_path / "run"
    assert run_cli(command(out, "train.steps=2")) == 0
    assert len(calls) == 1
    whole = (out / "tokenizer.pt").read_bytes()
    (out / "tokenizer.pt").unlink()
    checkpoint.states(out / "checkpoints")[-1][1].unlink()
    assert run_cli(command(out, "train.steps=2")) == 0
    assert len(calls) == 1
    assert (out / "tokenizer.pt").read_bytes() == whole


def test_a_warm_start_keeps_the_codebook_that_comes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, file = starts(monkeypatch), tmp_path / "first" / "tokenizer.pt"
    assert run_cli(command(tmp_path / "first", "train.steps=2")) == 0
    assert run_cli(command(tmp_path / "warm", "train.steps=1", "train.lr=1e-9", "--from-weights", file)) == 0
    assert len(calls) == 1  # the first run's
    first, warm = (checkpoint.load(path)["weights"] for path in (file, tmp_path / "warm" / "tokenizer.pt"))
    # one step of its average with decay 0.99, no new book
    assert distance(warm["quantizer.books"], first["quantizer.books"]) < 0.2


def warnings_of(usage: list[float], capsys: pytest.CaptureFixture[str], **quantizer: Any) -> list[str]:
    """The alarm's lines for this usage of the book, one value a logged step; steps between are not logged."""
    threshold = quantizer.pop("alarm", 0.5)
    cfg = tiny_config(quantizer=quantizer).model_copy(update={"codebook_alarm": threshold})
    alarm, run = watch.codebook_alarm(cfg), Run(Path(), 0, CPU, 1000, 0, StopRequest())
    for step, share in enumerate(usage, 1):
        run.step = 10 * step
        alarm(run, {"loss": 1.0, "usage/book": share, "usage/t02": 0.01, "latent_spread": 1.0})
        alarm(run, None)
    return capsys.readouterr().err.splitlines()


def test_the_alarm_comes_once_and_names_what_can_be_changed(capsys: pytest.CaptureFixture[str]) -> None:
    assert warnings_of([0.2] * 4, capsys) == []
    (line,) = warnings_of([0.2] * 30, capsys, codebook="gradient", restart_below=0.0)
    assert "step 50" in line
    assert all(f"quantizer.{name}=" in line for name in ("codebook", "restart_below", "init", "codes"))


@pytest.mark.parametrize(
    ("usage", "threshold", "lines"),
    [([0.2, 0.2, 0.2, 0.2, 0.9], 0.5, 0), ([0.0], 0.0, 0), ([0.6], 0.7, 1), ([0.6], 0.5, 0)],  # five in a row
)
def test_the_alarm_has_a_threshold_and_zero_is_off(
    usage: list[float], threshold: float, lines: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(warnings_of(usage * 30, capsys, alarm=threshold)) == lines


def test_the_alarm_asks_no_more_than_a_batch_can_use(capsys: pytest.CaptureFixture[str]) -> None:
    """512 vectors, drawn evenly, use 12% of 4096 codes: 1 - (1 - 1/4096)^512; a book a step has half of them."""
    assert warnings_of([0.06] * 10, capsys, codes=4096) == []
    assert len(warnings_of([0.05] * 10, capsys, codes=4096)) == 1
    assert warnings_of([0.05] * 10, capsys, codes=4096, codebooks="per_step") == []
    assert len(warnings_of([0.02] * 10, capsys, codes=4096, codebooks="per_step")) == 1


@pytest.mark.parametrize("collapsed", [True, False])
def test_the_alarm_notices_a_collapsed_encoder(
    collapsed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under `pow` the noise of the first steps spreads over the whole book also where z is the same everywhere."""
    cfg = tiny_config(loss={"adversarial": "none"}, train={"steps": 8, "lr": 1e-6})
    cfg = cfg.model_copy(update={"schedule": ScheduleConfig(kind="pow"), "codebook_alarm": 0.5})
    players = tiny_players(cfg)
    tokenizer = players[0].model
    assert isinstance(tokenizer, Tokenizer)
    if collapsed:
        assert isinstance(tokenizer.quant_conv, nn.Conv2d)
        nn.init.zeros_(tokenizer.quant_conv.weight)
        tokenizer.quant_conv.bias = nn.Parameter(torch.arange(C).float())
    run = Run(tmp_path, 0, CPU, 8, 0, StopRequest())
    fit(players, digits(cfg), cfg.train, run, [watch.codebook_alarm(cfg)])
    rows = metrics(tmp_path)
    assert all(row["usage/book"] > 0.5 for row in rows), [row["usage/book"] for row in rows]
    assert all((row["latent_spread"] < 0.01) == collapsed for row in rows)
    lines = capsys.readouterr().err.splitlines()
    assert ["latent" in line and "step 5" in line for line in lines] == [True] * collapsed

"""The codebook's start (on data, by k-means), its restarts, its alarm and its curves."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, assert_same, digits, distance, metrics, tiny_config, tiny_players, train
from processes import exit_code, spawn, torchrun
from pydantic import ValidationError
from torch import Tensor, nn

from rdpm_cli import checkpoint
from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.data.pixels import to_model
from rdpm_cli.distributed import TrainStep, process_group, world
from rdpm_cli.engine import tokenizer as engine
from rdpm_cli.engine import watch
from rdpm_cli.runs import StopRequest
from rdpm_cli.tokenizer.config import ScheduleConfig, TokenizerConfig
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.tokenizer.quantizer import Quantizer
from rdpm_cli.tokenizer.training import initialise_codebook
from rdpm_cli.training.loop import Run, fit

K, T, C = 32, 2, 4


# ---- the start -----------------------------------------------------------------------------------------------------


def tokenizer_of(cfg: TokenizerConfig) -> Tokenizer:
    tokenizer = tiny_players(cfg)[0].model
    assert isinstance(tokenizer, Tokenizer)
    return tokenizer


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
    tokenizer, pixels = tokenizer_of(cfg), first_batch(cfg)
    vectors, previous = vectors_of(tokenizer, pixels), tokenizer.quantizer.books.detach().clone()
    initialise_codebook(tokenizer, pixels, seed)
    return tokenizer.quantizer, previous, vectors


def test_data_puts_every_code_on_a_vector_of_the_batch() -> None:
    quantizer, _, vectors = initialised("data")
    assert nearest(quantizer.books[0], vectors.flatten(0, 1)).max() < 1e-6
    assert len(quantizer.books[0].unique(dim=0)) == K


def test_with_a_book_a_step_each_gets_the_vectors_of_its_step() -> None:
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


def test_normal_does_not_touch_the_book() -> None:
    quantizer, previous, _ = initialised("normal")
    assert torch.equal(quantizer.books, previous)


@pytest.mark.parametrize("init", ["data", "kmeans"])
def test_the_start_is_a_function_of_images_and_seed(init: str) -> None:
    (first, *_), (second, *_), (third, *_) = (initialised(init, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.books, second.books)
    assert not torch.equal(first.books, third.books)


@pytest.mark.parametrize(("books", "codes", "enough"), [
    ("shared", 512, True), ("shared", 513, False), ("per_step", 256, True), ("per_step", 257, False),
])  # fmt: skip
def test_fewer_vectors_than_codes_are_refused(books: str, codes: int, enough: bool) -> None:
    """16 images of 16 positions: 256 vectors a step."""
    fields = {"init": "data", "codebooks": books, "codes": codes}
    if enough:
        cfg = tiny_config(quantizer=fields)
        initialise_codebook(tokenizer_of(cfg), first_batch(cfg), 0)
        return
    with pytest.raises(ValidationError, match=rf"for {codes} codes.*train\.batch"):
        tiny_config(quantizer=fields)
    tiny_config(quantizer={**fields, "init": "normal"})


def test_kmeans_can_be_stopped_between_two_pieces_of_work() -> None:
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    cfg = tiny_config(quantizer={"init": "kmeans"})
    tokenizer = Tokenizer(cfg).train()
    books = tokenizer.quantizer.books.clone()
    with pytest.raises(KeyboardInterrupt):
        initialise_codebook(tokenizer, first_batch(cfg), 0, stop)
    assert calls == 3
    assert torch.equal(tokenizer.quantizer.books, books)


# ---- by the command line -------------------------------------------------------------------------------------------

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
        initialise_codebook(*args)

    monkeypatch.setattr(engine, "initialise_codebook", counted)
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


def books_by_rank(environment: dict[str, str], out: Path) -> None:
    """In a process of its own: save the codebook at the start, and after three steps with restarts."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    with process_group("cpu", several=True):
        torch.save(started_and_trained(out), out / f"{world()[0]}of{world()[1]}.pt")


def started_and_trained(out: Path) -> dict[str, Any]:
    books: dict[str, Any] = {}
    for init in ("data", "kmeans"):
        cfg = tiny_config(
            quantizer={"init": init, "decay": 0.0, "restart_below": 0.5},
            train={"steps": 3, "batch": 32},
            loss={"adversarial": "none"},
        )
        players = tiny_players(cfg)
        network = players[0].model
        assert isinstance(network, Tokenizer)
        initialise_codebook(network, first_batch(cfg), 0)
        books[f"{init}/start"] = network.quantizer.books.clone()
        train(players, cfg, out / f"{init}{world()[1]}")
        books[f"{init}/end"] = network.quantizer.books.clone()
    return books


def test_two_processes_start_and_restart_codes_as_one_does(tmp_path: Path) -> None:
    pair = [spawn(books_by_rank, environment, tmp_path) for environment in torchrun(2)]
    one = started_and_trained(tmp_path)
    assert [exit_code(process) for process in pair] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}of2.pt", weights_only=True) for rank in range(2))
    assert_same(second, first)
    for init in ("data", "kmeans"):
        assert torch.equal(first[f"{init}/start"], one[f"{init}/start"])
        assert distance(first[f"{init}/end"], one[f"{init}/end"]) < 0.05
        restarted = [[row["restarted"] for row in metrics(tmp_path / f"{init}{size}")] for size in (1, 2)]
        assert sum(restarted[0]) > 0
        assert restarted[0][0] == restarted[1][0]


# ---- restarts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("books", ["shared", "per_step"])
def test_dead_codes_of_a_training_step_restart_on_its_vectors(books: str) -> None:
    """Micro-batches included: the vectors are those of all rows of the step."""
    cfg = tiny_config(
        quantizer={"codebooks": books, "decay": 0.0, "restart_below": 0.03, "codes": 256},
        train={"batch": 48},
        loss={"adversarial": "none"},
    )
    (player,) = tiny_players(cfg)
    assert isinstance(player.model, Tokenizer)
    quantizer, pixels = player.model.quantizer, digits(cfg).batch_at(2, range(48))
    for rows in (range(16), range(16, 48)):
        player.loss(pixels[rows.start : rows.stop], TrainStep(0, 2, rows, 48, CPU))
    usage = player.usage
    assert usage is not None
    vectors, used = usage.vectors_TBSC.clone(), usage.counts_MK.clone()
    logs = player.after_step(TrainStep(0, 2, range(48), 48, CPU))
    assert float(logs["restarted"]) == int((used < 0.03 * used.mean(1, keepdim=True)).sum()) > 10
    source_rows = set()
    for book in range(len(quantizer.books)):
        pool = (vectors[book] if books == "per_step" else vectors).reshape(-1, C)
        dead = used[book] < 0.03 * used[book].mean()
        gaps = torch.cdist(quantizer.books[book][dead].double(), pool.double())
        assert gaps.amin(1).max() < 1e-5
        source_rows |= set((gaps.argmin(1) // 16 % 48).tolist())  # 16 positions a row, 48 rows a step
    assert min(source_rows) < 16 <= max(source_rows)


# ---- the alarm -----------------------------------------------------------------------------------------------------


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


def test_the_alarm_comes_once_with_overrides_that_can_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert warnings_of([0.2] * 4, capsys) == []
    (line,) = warnings_of([0.2] * 30, capsys, codebook="gradient", restart_below=0.0)
    assert "step 50" in line
    overrides = re.findall(r"quantizer\.(\w+)=([a-z]+|[\d.]*\d)", line)
    assert {name for name, _ in overrides} == {"codebook", "restart_below", "init", "codes"}
    for name, value in overrides:
        tiny_config(quantizer={name: value if value.isalpha() else float(value)})


@pytest.mark.parametrize(
    ("usage", "threshold", "lines"),
    [
        ([0.9] * 30, 0.5, 0),
        ([0.2, 0.2, 0.2, 0.2, 0.9] * 6, 0.5, 0),  # five in a row are needed
        ([0.0] * 30, 0.0, 0),
        ([0.6] * 30, 0.7, 1),
        ([0.6] * 30, 0.5, 0),
    ],
)
def test_the_alarm_has_a_threshold_and_zero_is_off(
    usage: list[float], threshold: float, lines: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(warnings_of(usage, capsys, alarm=threshold)) == lines


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
        nn.init.zeros_(tokenizer.quant_conv.weight)
        tokenizer.quant_conv.bias = nn.Parameter(torch.arange(C).float())
    run = Run(tmp_path, 0, CPU, 8, 0, StopRequest())
    fit(players, digits(cfg), cfg.train, run, [watch.codebook_alarm(cfg)])
    rows = metrics(tmp_path)
    assert all(row["usage/book"] > 0.5 for row in rows), [row["usage/book"] for row in rows]
    assert all((row["latent_spread"] < 0.01) == collapsed for row in rows)
    assert ["latent" in line and "step 5" in line for line in capsys.readouterr().err.splitlines()] == [
        True
    ] * collapsed


# ---- curves --------------------------------------------------------------------------------------------------------


def test_curves_are_drawn_while_a_run_goes_on_and_not_without_a_log(tmp_path: Path) -> None:
    drawn: list[int] = []
    cfg = tiny_config(train={"steps": 6, "eval_every": 2})
    observer = watch.curves(cfg.train, lambda: drawn.append(len(metrics(tmp_path))))
    fit(tiny_players(cfg), digits(cfg), cfg.train, Run(tmp_path, 0, CPU, 6, 0, StopRequest()), [observer])
    assert drawn == [1, 3]  # lines of the log; the training command draws the end, when all lines are there
    watch.training_curves(tmp_path / "curves.png", tokenizer_run=tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "empty").mkdir()
    watch.training_curves(tmp_path / "empty" / "curves.png", tokenizer_run=tmp_path / "empty")
    assert not (tmp_path / "empty" / "curves.png").exists()

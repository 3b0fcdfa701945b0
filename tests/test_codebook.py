"""The codebook's start (on data, by k-means), its restarts, its alarm and its curves."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, assert_same, digits, distance, metrics, tiny_config, tiny_players, train
from processes import exit_code, spawn, torchrun
from pydantic import ValidationError
from torch import Tensor, nn

from rdpm_cli import modelfile
from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.config import ScheduleConfig, TokenizerConfig
from rdpm_cli.engine import observers
from rdpm_cli.engine.runs import training_curves
from rdpm_cli.images.tensors import to_model
from rdpm_cli.signals import StopRequest
from rdpm_cli.step import TrainStep, world
from rdpm_cli.threads import one_thread
from rdpm_cli.tokenizer import codebook
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.tokenizer.quantizer import Quantizer, diffuse
from rdpm_cli.training import checkpoint, distributed
from rdpm_cli.training.loop import Run, fit

K, T, C = 32, 2, 4


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


# ---- where the codes start -----------------------------------------------------------------------------------------


def tokenizer_of(cfg: TokenizerConfig) -> Tokenizer:
    player = tiny_players(cfg)[0]
    assert isinstance(player.model, Tokenizer)
    return player.model


def first_batch(cfg: TokenizerConfig) -> Tensor:
    return digits(cfg).batch_at(0, range(cfg.train.batch))


@torch.no_grad()
def vectors_of(tokenizer: Tokenizer, pixels: Tensor) -> Tensor:
    """v_t of Eq. 2 written out, over the codebook as it is, (T, N, C); 16 images, the step's own noise."""
    quantizer = tokenizer.quantizer
    z = tokenizer.latents(to_model(pixels))
    eps = TrainStep(0, 0, range(16), 16, CPU).normal(T, *tokenizer.latent_shape)
    found, total = [], torch.zeros_like(z)
    for t in range(1, T + 1):
        v = diffuse(z - total, eps[:, t - 1], quantizer.alphas[t - 1])
        total = total + quantizer.bias(quantizer.look_up(quantizer.quantize(v, t), t))
        found.append(v.movedim(1, -1).reshape(-1, C))
    return torch.stack(found)


def nearest(codes_KC: Tensor, vectors_NC: Tensor) -> Tensor:
    """Distance of each code to the vector nearest to it, in float64, (K,)."""
    return torch.cdist(codes_KC.double(), vectors_NC.double(), compute_mode="donot_use_mm_for_euclid_dist").amin(1)


def error(vectors_NC: Tensor, codes_KC: Tensor) -> float:
    """Mean squared distance of the vectors to their codes."""
    return float(nearest(vectors_NC, codes_KC).pow(2).mean())


def placed(init: str, books: str = "shared", kind: str = "ema", seed: int = 0) -> tuple[Quantizer, Tensor, Tensor]:
    """-> the quantiser after its start, its codebooks before, the vectors of the batch."""
    cfg = tiny_config(quantizer={"init": init, "codebooks": books, "codebook": kind})
    tokenizer, pixels = tokenizer_of(cfg), first_batch(cfg)
    vectors, before = vectors_of(tokenizer, pixels), tokenizer.quantizer.books.detach().clone()
    codebook.initialise(tokenizer, pixels, seed)
    return tokenizer.quantizer, before, vectors


def test_data_puts_every_code_on_a_vector_of_the_batch() -> None:
    quantizer, _, vectors = placed("data")
    assert nearest(quantizer.books[0], vectors.flatten(0, 1)).max() < 1e-6
    assert len(quantizer.books[0].unique(dim=0)) == K


@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_the_book_follows_from_where_it_was_placed(kind: str) -> None:
    quantizer, _, _ = placed("kmeans", kind=kind)
    if kind == "gradient":
        assert quantizer.books.requires_grad
        return
    assert torch.equal(quantizer.ema_sums / quantizer.ema_counts.unsqueeze(-1), quantizer.books)
    assert bool((quantizer.ema_counts == 1).all())


def test_a_book_of_its_own_gets_the_vectors_of_its_step() -> None:
    quantizer, _, vectors = placed("data", "per_step")
    for t in range(T):
        assert nearest(quantizer.books[t], vectors[t]).max() < 1e-6
        assert nearest(quantizer.books[t], vectors[1 - t]).max() > 1e-3


@pytest.mark.parametrize("books", ["shared", "per_step"])
def test_kmeans_lowers_the_error_on_those_vectors(books: str) -> None:
    errors = {}
    for init in ("normal", "data", "kmeans"):
        quantizer, _, vectors = placed(init, books)
        pools = vectors if books == "per_step" else vectors.flatten(0, 1).unsqueeze(0)
        errors[init] = [error(pool, book.detach()) for pool, book in zip(pools, quantizer.books, strict=True)]
    for by_kmeans, by_data, by_normal in zip(errors["kmeans"], errors["data"], errors["normal"], strict=True):
        assert by_kmeans < 0.95 * by_data
        assert by_data < by_normal


def test_normal_leaves_the_book_alone() -> None:
    quantizer, before, _ = placed("normal")
    assert torch.equal(quantizer.books, before)


@pytest.mark.parametrize("init", ["data", "kmeans"])
def test_the_start_is_a_function_of_images_and_seed(init: str) -> None:
    (first, *_), (again, *_), (other, *_) = (placed(init, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.books, again.books)
    assert not torch.equal(first.books, other.books)


@pytest.mark.parametrize(("books", "codes", "enough"), [
    ("shared", 512, True), ("shared", 513, False), ("per_step", 256, True), ("per_step", 257, False),
])  # fmt: skip
def test_fewer_vectors_than_codes_are_refused(books: str, codes: int, enough: bool) -> None:
    """16 images of 16 positions: 256 vectors a step."""
    sections = {"init": "data", "codebooks": books, "codes": codes}
    if enough:
        cfg = tiny_config(quantizer=sections)
        codebook.initialise(tokenizer_of(cfg), first_batch(cfg), 0)
        return
    with pytest.raises(ValidationError, match=rf"vectors in a batch for {codes} codes; raise train\.batch"):
        tiny_config(quantizer=sections)
    tiny_config(quantizer={**sections, "init": "normal"})


# ---- by the command line -------------------------------------------------------------------------------------------

SMALL = [
    "autoencoder.width=8", "autoencoder.channels=4", "autoencoder.res_blocks=1", "quantizer.codes=32",
    "quantizer.steps=2", "quantizer.init=kmeans", "train.batch=32", "train.save_every=1", "train.keep=10",
]  # fmt: skip


def command(out: Path, *more: object) -> list[str]:
    return [
        "train-tokenizer",
        "digits",
        "--recipe",
        "digits",
        "--device",
        "cpu",
        "--out",
        str(out),
        *SMALL,
        *map(str, more),
    ]


def starts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the calls that place the codebook."""
    calls: list[int] = []
    plain = codebook.initialise

    def counted(*given: Any) -> None:
        calls.append(1)
        plain(*given)

    monkeypatch.setattr(codebook, "initialise", counted)
    return calls


def test_too_few_vectors_end_the_command_with_a_hint_that_can_be_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(command(tmp_path / "run", "train.steps=1", "quantizer.codes=2048")) == 2
    shown = capsys.readouterr().err
    assert "1024 vectors in a batch for 2048 codes" in shown
    assert "train.batch" in shown
    assert run_cli(command(tmp_path / "run", "train.steps=1", "quantizer.codes=64")) == 0  # no folder was claimed


def test_a_resumed_run_keeps_its_codebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, out = starts(monkeypatch), tmp_path / "run"
    assert run_cli(command(out, "train.steps=2")) == 0
    assert len(calls) == 1
    whole = (out / "tokenizer.pt").read_bytes()
    (out / "tokenizer.pt").unlink()
    checkpoint.found(out / "checkpoints")[-1][1].unlink()
    assert run_cli(command(out, "train.steps=2")) == 0
    assert len(calls) == 1
    assert (out / "tokenizer.pt").read_bytes() == whole


def test_a_warm_start_keeps_the_codebook_that_comes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = starts(monkeypatch)
    given = tmp_path / "first" / "tokenizer.pt"
    assert run_cli(command(tmp_path / "first", "train.steps=2")) == 0
    warm = command(tmp_path / "warm", "train.steps=1", "train.lr=1e-9", "--from-weights", given)
    assert run_cli(warm) == 0
    assert len(calls) == 1  # the first run's
    before, after = (modelfile.load(path)["weights"] for path in (given, tmp_path / "warm" / "tokenizer.pt"))
    moved = distance(after["quantizer.books"], before["quantizer.books"])
    assert moved < 0.2  # one step of its average with decay 0.99, no new book


def placed_by_rank(environment: dict[str, str], out: Path) -> None:
    """The codebook a process begins with, and what four steps of restarts make of it."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    with distributed.process_group("cpu", several=True):
        torch.save(begun_and_trained(out), out / f"{world()[0]}of{world()[1]}.pt")


def begun_and_trained(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for init in ("data", "kmeans"):
        cfg = tiny_config(
            quantizer={"init": init, "decay": 0.0, "restart_below": 0.5},
            train={"steps": 3, "batch": 32},
            loss={"adversarial": "none"},
        )
        players = tiny_players(cfg)
        network = players[0].model
        assert isinstance(network, Tokenizer)
        codebook.initialise(network, digits(cfg).batch_at(0, range(32)), 0)
        found[f"{init}/start"] = network.quantizer.books.clone()
        train(players, cfg, out / f"{init}{world()[1]}")
        found[f"{init}/end"] = network.quantizer.books.clone()
    return found


def test_two_processes_start_and_restart_codes_as_one_does(tmp_path: Path) -> None:
    pair = [spawn(placed_by_rank, environment, tmp_path) for environment in torchrun(2)]
    one = begun_and_trained(tmp_path)
    assert [exit_code(process) for process in pair] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}of2.pt", weights_only=True) for rank in range(2))
    assert_same(second, first)
    for init in ("data", "kmeans"):
        assert torch.equal(first[f"{init}/start"], one[f"{init}/start"])
        assert distance(first[f"{init}/end"], one[f"{init}/end"]) < 0.05
        rows = {n: [json.loads(line)["restarted"] for line in lines(tmp_path / f"{init}{n}")] for n in (1, 2)}
        assert sum(rows[1]) > 0
        assert rows[1][0] == rows[2][0]


def lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


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
    quantizer = player.model.quantizer
    pixels = digits(cfg).batch_at(2, range(48))
    for rows in (range(16), range(16, 48)):
        player.loss(pixels[rows.start : rows.stop], TrainStep(0, 2, rows, 48, CPU))
    usage = player.usage
    assert usage is not None
    vectors, used = usage.vectors_TBNC.clone(), usage.counts_SK.clone()
    logs = player.after_step(TrainStep(0, 2, range(48), 48, CPU))
    assert float(logs["restarted"]) == int((used < 0.03 * used.mean(1, keepdim=True)).sum()) > 10
    rows_seen = set()
    for book in range(len(quantizer.books)):
        pool = (vectors[book] if books == "per_step" else vectors).reshape(-1, C)
        dead = used[book] < 0.03 * used[book].mean()
        gaps = torch.cdist(quantizer.books[book][dead].double(), pool.double())
        assert gaps.amin(1).max() < 1e-5
        rows_seen |= set((gaps.argmin(1) // 16 % 48).tolist())  # 16 positions a row, 48 rows a step
    assert min(rows_seen) < 16 <= max(rows_seen)


def test_kmeans_stops_between_two_pieces_of_work() -> None:
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    cfg = tiny_config(quantizer={"init": "kmeans"})
    tokenizer = Tokenizer(cfg).train()
    before = tokenizer.quantizer.books.clone()
    with pytest.raises(KeyboardInterrupt):
        codebook.initialise(tokenizer, digits(cfg).batch_at(0, range(16)), 0, stop)
    assert calls == 3
    assert torch.equal(tokenizer.quantizer.books, before)


# ---- the alarm -----------------------------------------------------------------------------------------------------


def heard(usage: list[float], capsys: pytest.CaptureFixture[str], **quantizer: Any) -> list[str]:
    """What the alarm says to this usage of the book, line by line of the log; between logged steps there is none."""
    threshold = quantizer.pop("alarm", 0.5)
    alarm = observers.codebook_alarm(tiny_config(quantizer=quantizer).model_copy(update={"codebook_alarm": threshold}))
    run = Run(Path(), 0, CPU, 1000, 0, StopRequest())
    for step, share in enumerate(usage, 1):
        run.step = 10 * step
        alarm(run, {"loss": 1.0, "usage/book": share, "usage/t02": 0.01, "latent_spread": 1.0})
        alarm(run, None)
    return capsys.readouterr().err.splitlines()


def test_the_alarm_is_given_once_with_its_fix(capsys: pytest.CaptureFixture[str]) -> None:
    assert heard([0.2] * 4, capsys) == []
    (line,) = heard([0.2] * 30, capsys, codebook="gradient", restart_below=0.0)
    assert line.startswith("warning: at step 50 the codebook's usage is 20%")
    overrides = re.findall(r"quantizer\.\w+=[\w.]+", line)
    assert overrides == ["quantizer.codebook=ema", "quantizer.restart_below=0.03", "quantizer.init=kmeans"]
    for override in overrides:  # the fix can be typed as it stands
        name, value = override.removeprefix("quantizer.").split("=")
        tiny_config(quantizer={name: float(value) if name == "restart_below" else value})


def test_the_fix_is_one_that_the_recipe_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = heard([0.2] * 30, capsys)
    assert line.endswith(". Start on data (quantizer.init=kmeans)")
    (line,) = heard([0.2] * 30, capsys, init="kmeans", restart_below=0.0)
    assert line.endswith(". Restart dead codes (quantizer.restart_below=0.03)")
    (line,) = heard([0.2] * 30, capsys, init="kmeans")
    assert line.endswith(". Lower quantizer.codes=32")


@pytest.mark.parametrize("collapsed", [True, False])
def test_the_alarm_hears_an_encoder_that_tells_nothing(
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
    fit(players, digits(cfg), cfg.train, run, [observers.codebook_alarm(cfg)])
    rows = metrics(tmp_path)
    assert all(row["usage/book"] > 0.5 for row in rows), [r["usage/book"] for r in rows]
    assert all((row["latent_spread"] < 0.01) == collapsed for row in rows)
    found = capsys.readouterr().err.splitlines()
    assert [line.partition(" of the latent")[0] for line in found] == (
        ["warning: at step 5 only 0%"] if collapsed else []
    )


def test_the_alarm_is_silent_for_a_healthy_book(capsys: pytest.CaptureFixture[str]) -> None:
    assert heard([0.9] * 30, capsys) == []
    assert heard([0.2, 0.2, 0.2, 0.2, 0.9] * 6, capsys) == []  # five in a row


def test_the_alarm_has_a_threshold_and_zero_is_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert heard([0.0] * 30, capsys, alarm=0) == []
    assert len(heard([0.6] * 30, capsys, alarm=0.7)) == 1
    assert heard([0.6] * 30, capsys, alarm=0.5) == []


def test_the_alarm_asks_no_more_than_a_batch_can_use(capsys: pytest.CaptureFixture[str]) -> None:
    """512 vectors, drawn evenly, use 12% of 4096 codes: 1 - (1 - 1/4096)^512; a book a step has half of them."""
    assert heard([0.06] * 10, capsys, codes=4096) == []
    assert len(heard([0.05] * 10, capsys, codes=4096)) == 1
    assert heard([0.05] * 10, capsys, codes=4096, codebooks="per_step") == []
    assert len(heard([0.02] * 10, capsys, codes=4096, codebooks="per_step")) == 1


# ---- curves --------------------------------------------------------------------------------------------------------


def log(folder: Path, rows: list[dict[str, float]]) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def row(step: int, ts: int, **more: float) -> dict[str, float]:
    health = {f"{name}/t{t:02d}": 0.1 * t for t in range(1, ts + 1) for name in ("usage", "perplexity", "dead")}
    return {"step": step, "loss": 1.0, "recon": 0.5, "quant": 0.3, "usage/book": 1.0, **health, **more}


def test_the_panels_of_a_tokenizer_run(tmp_path: Path) -> None:
    adversary = {
        "gan": 0.1,
        "discriminator/loss": 1.0,
        "discriminator/logits_real": 0.3,
        "discriminator/logits_fake": 0.0,
    }
    panels = observers.tokenizer_curves(log(tmp_path / "run", [row(10, 10), row(20, 10, **adversary)]))
    titles = list(panels)
    assert titles == [
        "tokenizer losses|step", "adversary|step", "codebook usage|step", "dead codes|step",
        "codebook perplexity|step", "codebook perplexity at the end|t",
    ]  # fmt: skip
    assert panels["tokenizer losses|step"] == {
        "recon": ([10.0, 20.0], [0.5, 0.5]),
        "quant": ([10.0, 20.0], [0.3, 0.3]),
    }
    assert panels["adversary|step"]["gan"] == ([20.0], [0.1])  # from its start on
    assert list(panels["codebook usage|step"]) == ["usage/book", "usage/t01", "usage/t06", "usage/t10"]
    assert panels["codebook perplexity|step"]["perplexity/t10"] == ([10.0, 20.0], [1.0, 1.0])
    t, perplexity = panels["codebook perplexity at the end|t"]["perplexity"]
    assert t == [float(place) for place in range(1, 11)]
    assert perplexity == pytest.approx([0.1 * place for place in t])


def test_a_run_without_a_critic_has_no_such_panel(tmp_path: Path) -> None:
    panels = observers.tokenizer_curves(log(tmp_path / "run", [row(10, 2)]))
    assert "adversary|step" not in panels
    assert list(panels["dead codes|step"]) == ["dead/t01", "dead/t02"]


def test_curves_are_drawn(tmp_path: Path) -> None:
    run = log(tmp_path / "run", [row(10, 2, gan=-0.5), row(20, 2, gan=0.5)])
    training_curves(run / "curves.png", tokenizer_run=run)
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_logged_nothing_still_ends(tmp_path: Path) -> None:
    """Every step passed over, say: there is nothing to draw."""
    (tmp_path / "run").mkdir()
    training_curves(tmp_path / "run" / "curves.png", tokenizer_run=tmp_path / "run")
    assert not (tmp_path / "run" / "curves.png").exists()


def test_the_curves_are_drawn_while_a_run_goes_on(tmp_path: Path) -> None:
    drawn: list[int] = []
    cfg = tiny_config(train={"steps": 6, "eval_every": 2})
    look = observers.redrawn(lambda: drawn.append(len(metrics(tmp_path))), cfg.train)
    fit(tiny_players(cfg), digits(cfg), cfg.train, Run(tmp_path, 0, CPU, 6, 0, StopRequest()), [look])
    assert drawn == [1, 3]  # lines of the log; the end is drawn once all are there

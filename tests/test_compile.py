"""Forms of the same network: channels_last and torch.compile change how it runs, not what it computes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, metrics, newest_state, tiny_config, tiny_players, train
from torch import nn

from rdpm_cli import checkpoint
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.config import TokenizerConfig


def attending(**options: Any) -> TokenizerConfig:
    return tiny_config(autoencoder={"attention": True}, train={"steps": 3, "save_every": 2, **options})


def trained(folder: Path, cfg: TokenizerConfig) -> tuple[nn.Module, nn.Module]:
    """-> the network and its average."""
    players = tiny_players(cfg)
    run = train(players, cfg, folder)
    assert run.ema is not None
    return players[0].model, run.ema.model


def losses(folder: Path) -> list[float]:
    return [row[name] for row in metrics(folder) for name in ("loss", "recon", "quant", "gan", "discriminator/loss")]


def is_channels_last(network: nn.Module) -> list[bool]:
    weights = [w for w in network.state_dict().values() if w.ndim == 4 and 1 not in w.shape and w.shape[-1] > 1]
    return [w.is_contiguous(memory_format=torch.channels_last) for w in weights]


def test_channels_last_trains_the_same_in_another_layout_and_resumes_exactly(tmp_path: Path) -> None:
    cfg = attending(channels_last=True)
    plain, _ = trained(tmp_path / "plain", attending())
    network, average = trained(tmp_path / "last", cfg)
    assert not any(is_channels_last(plain))
    assert all(is_channels_last(network) + is_channels_last(average))
    assert losses(tmp_path / "last") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3, abs=1e-5)
    whole = newest_state(tmp_path / "last")
    (tmp_path / "last" / "checkpoints" / "step-000000003.pt").unlink()
    trained(tmp_path / "last", cfg)
    assert_same(newest_state(tmp_path / "last"), whole)


def test_the_layout_is_no_part_of_a_model_file(tmp_path: Path) -> None:
    network, _ = trained(tmp_path / "run", attending(channels_last=True))
    assert isinstance(network, model.Tokenizer)
    content = model.pack(network, class_names=[], provenance={})
    copy = {name: w.clone(memory_format=torch.contiguous_format) for name, w in network.state_dict().items()}
    assert content["digest"] == checkpoint.model_digest(copy, content["config"])
    checkpoint.save(tmp_path / "tokenizer.pt", content)
    loaded, read = model.load(tmp_path / "tokenizer.pt")
    assert not any(is_channels_last(loaded))
    assert model.pack(loaded)["digest"] == read["digest"] == content["digest"]


def compares_equal(tmp_path: Path) -> None:
    """Two steps of both players with the adaptive weight, eager and compiled, with the same names in the state."""
    for name, compiled in (("eager", False), ("compiled", True)):
        train_options = {"steps": 2, "compile": compiled}
        parts: dict[str, Any] = {"autoencoder": {"multipliers": [1, 2]}, "discriminator": {"layers": 1}}
        network, average = trained(tmp_path / name, tiny_config(**parts, train=train_options))
        assert average.state_dict().keys() == network.state_dict().keys()  # the generated form stays out of it
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5, abs=1e-6)
    eager, after = (newest_state(tmp_path / name)["players"] for name in ("eager", "compiled"))
    for player in ("tokenizer", "discriminator"):
        assert list(after[player]["model"]) == list(eager[player]["model"])


def test_compiling_changes_no_loss_and_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as torch.compile traces, forwards and backwards, with no code generated: a second, not minutes."""
    calls, compile_ = [], torch.compile

    def traced(network: Any, **options: Any) -> Any:
        calls.append(network)
        return compile_(network, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", traced)
    compares_equal(tmp_path)
    assert len(calls) == 5  # encoder, the decoder's middle and two levels, the discriminator


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler that torch.compile could use")
def test_generated_code_changes_no_loss_and_no_name(tmp_path: Path) -> None:
    compares_equal(tmp_path)

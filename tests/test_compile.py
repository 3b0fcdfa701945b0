"""Forms of the same network: channels_last and torch.compile change how it runs, not what it computes."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, assert_same, metrics, newest_state, tiny_config, tiny_players, train
from torch import nn

from rdpm_cli import checkpoint
from rdpm_cli.device import one_thread
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.config import TokenizerConfig
from rdpm_cli.training.loop import Run


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def attending(**options: Any) -> TokenizerConfig:
    return tiny_config(autoencoder={"attention": True}, train={"steps": 3, "save_every": 2, **options})


def trained(folder: Path, cfg: TokenizerConfig) -> tuple[Run, nn.Module]:
    players = tiny_players(cfg)
    return train(players, cfg, folder), players[0].model


def losses(folder: Path) -> list[float]:
    return [row[name] for row in metrics(folder) for name in ("loss", "recon", "quant", "gan", "discriminator/loss")]


def is_channels_last(network: nn.Module) -> list[bool]:
    weights = [w for w in network.state_dict().values() if w.ndim == 4 and 1 not in w.shape and w.shape[-1] > 1]
    return [w.is_contiguous(memory_format=torch.channels_last) for w in weights]


def test_channels_last_trains_the_same_in_another_layout(tmp_path: Path) -> None:
    _, plain = trained(tmp_path / "plain", attending())
    run, network = trained(tmp_path / "last", attending(channels_last=True))
    assert not any(is_channels_last(plain))
    assert all(is_channels_last(network))
    assert run.ema is not None
    assert all(is_channels_last(run.ema.model))
    assert losses(tmp_path / "last") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3, abs=1e-5)


def test_the_layout_is_no_part_of_a_model_file(tmp_path: Path) -> None:
    run, network = trained(tmp_path / "run", attending(channels_last=True))
    assert run.ema is not None
    assert isinstance(network, model.Tokenizer)
    content = model.pack(network, class_names=[], provenance={})
    state = network.state_dict()
    assert list(content["weights"]) == list(state)
    copy = {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    assert content["digest"] == checkpoint.model_digest(copy, content["config"])
    checkpoint.save(tmp_path / "tokenizer.pt", content)
    loaded, read = model.load(tmp_path / "tokenizer.pt")
    assert not any(is_channels_last(loaded))
    assert model.pack(loaded)["digest"] == read["digest"] == content["digest"]


def test_a_run_in_channels_last_resumes_exactly(tmp_path: Path) -> None:
    cfg = attending(channels_last=True)
    trained(tmp_path / "run", cfg)
    whole = newest_state(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-000000003.pt").unlink()
    trained(tmp_path / "run", cfg)
    assert_same(newest_state(tmp_path / "run"), whole)


# ---- torch.compile -------------------------------------------------------------------------------------------------


def compares_equal(tmp_path: Path) -> None:
    """Two steps of both players with the adaptive weight, eager and compiled, with the same names in the state."""
    options: dict[str, dict[str, Any]] = {
        "loss": {"adversarial": "hinge"},
        "autoencoder": {"multipliers": [1, 2]},
        "discriminator": {"layers": 1},
    }
    for name, compiled in (("eager", False), ("compiled", True)):
        cfg = tiny_config(**options, train={"steps": 2, "compile": compiled})
        trained(tmp_path / name, cfg)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5, abs=1e-6)
    eager, compiled_state = (newest_state(tmp_path / name)["players"] for name in ("eager", "compiled"))
    for player in ("tokenizer", "discriminator"):
        assert list(compiled_state[player]["model"]) == list(eager[player]["model"])


def test_compiling_changes_no_loss_and_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as torch.compile traces, forwards and backwards, with no code generated: a second, not minutes."""
    calls = []

    def traced(network: Any, **options: Any) -> Any:
        calls.append(network)
        return compile_(network, backend="aot_eager", **options)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    compares_equal(tmp_path)
    assert len(calls) == 5  # encoder, the decoder's middle and two levels, the discriminator


@functools.cache
def lacks_a_compiler() -> bool:
    from torch._inductor import cpp_builder, exc

    try:
        return not cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return True


@pytest.mark.slow
def test_generated_code_changes_no_loss_and_no_name(tmp_path: Path) -> None:
    if lacks_a_compiler():
        pytest.skip("no C++ compiler that torch.compile could use")
    compares_equal(tmp_path)


def test_the_generated_form_stays_out_of_the_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    run, network = trained(tmp_path, tiny_config(train={"steps": 1, "compile": True}))
    assert run.ema is not None
    assert run.ema.model.state_dict().keys() == network.state_dict().keys()
    assert next(network.parameters()).device == CPU

"""Tokenizers of sound: codes that depend on their own recording only, training, and recipes.

Legend: B sounds, T steps, C channels, S latents, F frames, M bands."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import metrics, train
from sounds import RATE, STEP, TINY_MEL, burst, finish, making, mel_tokenizer, save_tokenizer, strings, write_speech

from rdpm_cli import noise
from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.data.audio import AudioSource, open_audio, write_wav
from rdpm_cli.data.mel import PRESETS, Wave, log_mel
from rdpm_cli.distributed import TrainStep, one_thread
from rdpm_cli.recipes import load_recipe
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.config import MelConfig, TokenizerConfig
from rdpm_cli.tokenizer.mel_networks import MelEncoder
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.tokenizer.training import ItemBatches, initialise, players_of

CPU = torch.device("cpu")
kinds = pytest.mark.parametrize("kind", ["sin", "rvq"])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> AudioSource:
    """Ten strings of words, of different lengths."""
    return open_audio(write_speech(tmp_path_factory.mktemp("sound"), strings(10)))


def item_of(tokenizer: Tokenizer, wave: Wave) -> torch.Tensor:
    """(1, M, F)."""
    return tokenizer.inputs.tensor([log_mel(wave, PRESETS["speech8"], 4)])


# ---- codes ---------------------------------------------------------------------------------------------------------


@kinds
@torch.no_grad()
def test_a_row_has_the_codes_of_its_recording_alone(kind: str, source: AudioSource, tmp_path: Path) -> None:
    """Whatever the number of workers and shards, and whatever lies in the store with it."""
    file = save_tokenizer(tmp_path / "tokenizer.pt", kind, source)
    tokenizer, works = model.load(file)[0], [(1, 4), (3, 4), (2, 1), (1, 99)]
    for workers, shard_images in works:
        root = tmp_path / f"{workers}-{shard_images}"
        store = finish(making(root, source, file, views=2, latents=True, workers=workers, shard_images=shard_images))
        for index in range(len(source)):
            x = item_of(tokenizer, source.wave(index, RATE))
            S = x.shape[2] // 4
            draws = [noise.normal("encode", 0, index, view, t, (S, 4)).T for view in (0, 1) for t in (1, 2, 3)]
            eps = torch.from_numpy(np.stack(draws)).view(2, 3, 4, S)
            with one_thread():
                z = tokenizer.latents(x)
                codes = tokenizer.quantizer.encode(z.repeat(2, 1, 1), eps)
            for view in range(2):
                row = np.array([2 * index + view])
                assert np.array_equal(store.codes(row), codes[view : view + 1].numpy())
                assert np.array_equal(store.latents(row), z.half().numpy())


def test_codes_without_noise_are_those_of_a_store_of_one_recording(source: AudioSource, tmp_path: Path) -> None:
    file = save_tokenizer(tmp_path / "tokenizer.pt", "rvq", source)
    together = finish(making(tmp_path / "all", source, file))
    for index in (1, 7):
        write_wav(tmp_path / str(index) / "a.wav", source.wave(index, RATE), RATE)
        one = finish(making(tmp_path / f"codes{index}", open_audio(str(tmp_path / str(index))), file, text=None))
        assert np.array_equal(one.codes(np.array([0])), together.codes(np.array([index])))


@kinds
@pytest.mark.parametrize("samples", [0, 1, 320, 321, 3000])
def test_the_decoded_length_is_the_length_of_the_frames(kind: str, samples: int, source: AudioSource) -> None:
    tokenizer = mel_tokenizer(kind, source)
    x = item_of(tokenizer, burst(samples))
    S = max(1, -(-samples // STEP))
    codes = tokenizer.encode(x, tokenizer.noise("encode", 0, [0], [0], S))
    assert codes.shape == (1, 3, S)
    assert tokenizer.decode(codes).shape == x.shape == (1, 64, 4 * S)


@kinds
def test_a_latent_does_not_see_beyond_the_reach_of_the_convolutions(kind: str, source: AudioSource) -> None:
    """Two convolutions of a residual block a level, one in, one out, and the strided ones reach less than 8 latents."""
    tokenizer = mel_tokenizer(kind, source)
    wave, S, changed = burst(60 * STEP), 60, 40
    other = np.concatenate([wave[: changed * STEP], 3 * burst(20 * STEP, seed=1)])
    longer = np.concatenate([wave, other])
    eps = tokenizer.noise("encode", 0, [5], [0], 120)
    codes, ends = (tokenizer.encode(item_of(tokenizer, w), eps[..., :S])[0] for w in (wave, other))
    more = tokenizer.encode(item_of(tokenizer, longer), eps)[0]
    same = (codes == ends).all(0)
    assert same[: changed - 8].all()
    assert same[changed:].float().mean() < 0.5
    assert torch.equal(more[:, : S - 8], codes[:, :-8])


# ---- training ------------------------------------------------------------------------------------------------------


def tiny(kind: str = "sin", **sections: dict[str, Any]) -> TokenizerConfig:
    plain: dict[str, Any] = {"autoencoder": TINY_MEL, "schedule": {"kind": kind}, "flip": False}
    plain["quantizer"] = {"codes": 32, "steps": 3, "bias": "none"}
    plain["train"] = {"batch": 16, "steps": 60, "lr": 1e-2, "log_every": 1}
    return TokenizerConfig.model_validate({**plain, **{name: plain[name] | more for name, more in sections.items()}})


def test_noise_on_z_and_dropped_depths_act_in_training_only(source: AudioSource) -> None:
    """The encoder, the chain and the decoder of evaluation are those without; the loss is another."""
    changes: list[dict[str, Any]] = [{}, {"autoencoder": {"noise": 0.5}}, {"quantizer": {"dropout": 1.0}}]
    losses, codes, recons = [], [], []
    for change in changes:
        cfg = tiny("rvq", **change)
        torch.manual_seed(0)
        tokenizer = Tokenizer(cfg)
        batch = ItemBatches(source, cfg, 0).batch_at(0, range(16))
        initialise(tokenizer, batch, 0)
        loss, _ = players_of(tokenizer.train(), cfg)[0].loss(batch, TrainStep(0, 0, range(16), 16, CPU))
        losses.append(loss.item())
        codes.append(tokenizer.eval().encode(batch, torch.zeros(16, 3, 4, 8)))
        recons.append(tokenizer.decode(codes[-1]))
    assert len(set(losses)) == 3
    assert all(torch.equal(x[0], x[other]) for x in (codes, recons) for other in (1, 2))


@kinds
def test_a_few_steps_lower_the_loss_and_a_shorter_sound_is_followed_by_silence(
    kind: str, source: AudioSource, tmp_path: Path
) -> None:
    cfg = tiny(kind, quantizer={"dropout": 0.3}, autoencoder={"noise": 0.1})
    batches = ItemBatches(source, cfg, 0)
    torch.manual_seed(0)
    tokenizer = Tokenizer(cfg)
    batch = batches.batch_at(0, range(16))
    assert batch.shape == (16, 64, 32)
    assert float(batch[:, :, -1].min()) == pytest.approx(np.log(1e-4))
    initialise(tokenizer, batch, 0)
    assert isinstance(tokenizer.encoder, MelEncoder)
    assert float(tokenizer.encoder.scale(batch).std()) == pytest.approx(1, abs=1e-3)
    train(players_of(tokenizer.train(), cfg), cfg, tmp_path, batches)
    recon = [row["recon"] for row in metrics(tmp_path) if "recon" in row]
    assert len(recon) == 60
    assert np.mean(recon[-5:]) < 0.5 * recon[0]


# ---- recipes and configs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind", "books"), [("speech8-sin", "sin", 1), ("speech8-rvq", "rvq", 8)])
def test_recipes_build_a_tokenizer_at_25_latents_a_second(name: str, kind: str, books: int) -> None:
    cfg = load_recipe(name).tokenizer
    assert cfg is not None
    assert isinstance(cfg.autoencoder, MelConfig)
    tokenizer = Tokenizer(cfg)
    assert (tokenizer.inputs.rate, tokenizer.grid, cfg.schedule.kind) == (25, (-1,), kind)
    assert tokenizer.quantizer.books.shape[0] == books
    assert 5e5 < model.parameters(tokenizer) < 2e6
    assert Tokenizer(TokenizerConfig.model_validate(cfg.model_dump(mode="json"))).cfg == cfg
    with torch.no_grad():
        assert tokenizer.eval()(torch.zeros(2, 64, 12), torch.zeros(2, 8, 16, 3))[0].shape == (2, 64, 12)


@pytest.mark.parametrize("name", ["digits", "imagenet256-d16", "resgen-digits"])
def test_recipes_of_images_do_not_mention_what_came_with_sound(name: str) -> None:
    """So that their digests, which test_recipes.py lists, stay."""
    dump, words = load_recipe(name).model_dump_json(), ("dropout", "prompt", 'kind":"mel1d', 'noise":0', "windows")
    assert not [word for word in (*words, "resolutions", "feature_matching") if f'"{word}' in dump]


@pytest.mark.parametrize(
    ("setting", "token"),
    [
        ("loss.adversarial=lsgan", "adversarial"), ("loss.perceptual=lpips", "perceptual"),
        ("autoencoder.frames=30", "30"), ("autoencoder.features=speech9", "autoencoder.features"),
        ("autoencoder.widht=9", "autoencoder.widht"), ("autoencoder.kind=mel2d", "autoencoder.kind"),
        ("autoencoder.noise=-1", "autoencoder.noise"), ("autoencoder.resolution=64", "resolution"),
        ("autoencoder.latent_norm=batch", "autoencoder.latent_norm"),
    ],
)  # fmt: skip
def test_a_setting_that_sound_cannot_have_is_named(
    setting: str, token: str, source: AudioSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run_cli(["train-tokenizer", source.spec, "--recipe", "speech8-sin", "--out", str(out), setting]) == 2
    assert token in capsys.readouterr().err
    assert not out.exists()

"""Warm starts of generators: equal networks, classes by name, other grids, raw and averaged weights, resuming, errors.

Legend: K classes, L positions, C channels, D width."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generators import fixed_seed, wake  # noqa: F401
from helpers import assert_same, newest_state
from scipy.interpolate import RegularGridInterpolator
from sounds import save_speech_generator, speech_config, speech_store
from stores import Making, MemoryImages

from rdpm_cli import checkpoint, files
from rdpm_cli.cli.app import run
from rdpm_cli.distributed import TrainStep
from rdpm_cli.engine import generator as engine
from rdpm_cli.generator import registry
from rdpm_cli.generator.config import GeneratorConfig
from rdpm_cli.generator.importers import resample, warm_start
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.config import TokenizerArchitecture

Capture = pytest.CaptureFixture[str]
NETWORK: dict[str, Any] = {"depth": 2, "width": 32, "heads": 2}
TABLES = {"positions": "both", "class_latents": True, "class_tokens": 2}
POSITIONS, EMBEDDING, LATENTS = (f"trunk.{name}.weight" for name in ("positions", "class_embedding", "class_latents"))


def config(family: str = "rdpm", **network: Any) -> GeneratorConfig:
    sizes = {"network": {**NETWORK, **TABLES, **network}, "train": {"steps": 1, "batch": 16}}
    return registry.FAMILIES[family].config.model_validate(sizes)


def save_source(path: Path, codes: Path, cfg: GeneratorConfig, **tables: torch.Tensor) -> dict[str, torch.Tensor]:
    """The file of a generator whose every weight is random, apart from these tables. -> its weights."""
    opened = registry.open_codes(codes, cfg, 0)
    names = list(opened.store.manifest.condition_names)
    generator = registry.build(cfg, opened.tokenizer, len(names))
    generator.begin(cfg, opened.store)
    wake(generator.network)
    for name, table in tables.items():
        generator.network.get_parameter(f"trunk.{name}.weight").data.copy_(table)
    checkpoint.save(path, registry.pack(generator, cfg, opened.content, names, provenance={}))
    return dict(generator.network.state_dict())


def renamed_store(root: Path, tokenizer: Path, names: Sequence[str], side: int = 16) -> Path:
    """A store of 12 images of classes of these names."""
    source = MemoryImages(12, side=side)
    source.class_names = list(names)
    source.labels = [index % len(names) for index in range(12)]
    Making(root, source, tokenizer, views=1).finish()
    return root


def new_tokenizer(path: Path, like: Path, resolution: int = 16) -> Path:
    """A tokenizer of the sizes of another, with other weights, for images of another side: 32 has a grid of 8×8."""
    plain = model.load(like)[0].cfg.model_dump()
    plain["autoencoder"]["resolution"] = resolution
    tokenizer = model.Tokenizer(TokenizerArchitecture.model_validate(plain))
    checkpoint.save(path, model.pack(tokenizer, class_names=[], provenance={}))
    return path


def names_of(layer: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if name.startswith(layer)]


# ---- equal networks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_a_network_of_the_same_sizes_begins_with_the_weights_and_the_loss_of_its_source(
    family: str, rvq_codes: Path, tmp_path: Path
) -> None:
    cfg = config(family)
    weights = save_source(tmp_path / "source.pt", rvq_codes, cfg)
    opened = registry.open_codes(rvq_codes, cfg, 0)
    generator, imported = warm_start(cfg, opened, 7, tmp_path / "source.pt")
    assert_same({name: p.detach() for name, p in generator.network.named_parameters()},
                {name: weights[name] for name, _ in generator.network.named_parameters()})  # fmt: skip
    assert (imported.named("fresh"), imported.named("interpolated")) == ([], [])
    generator.begin(cfg, opened.store)
    batch = opened.batches.batch_at(0, range(16))
    losses = []
    for network in (generator, registry.load(tmp_path / "source.pt").generator):
        registry.prepare(network, cfg)
        losses.append(network.loss(batch, TrainStep(0, 0, range(16), 16, torch.device("cpu")))[0].detach())
    assert losses[0] == losses[1]


def test_what_a_store_measures_is_not_taken_from_the_file(rvq_codes: Path, tmp_path: Path) -> None:
    cfg = config("resgen")
    weights = save_source(tmp_path / "source.pt", rvq_codes, cfg)
    generator, imported = warm_start(cfg, registry.open_codes(rvq_codes, cfg, 0), 0, tmp_path / "source.pt")
    assert not torch.equal(generator.network.rho, weights["rho"])
    assert {"rho", "sigma_psi"} <= imported.left.keys()


def test_blocks_of_another_depth_stay_fresh_and_are_listed(digits_codes: Path, tmp_path: Path) -> None:
    weights, cfg = save_source(tmp_path / "source.pt", digits_codes, config()), config(depth=3)
    generator, imported = warm_start(cfg, registry.open_codes(digits_codes, cfg, 0), 0, tmp_path / "source.pt")
    state = generator.network.state_dict()
    fresh = imported.named("fresh")
    assert fresh == names_of("trunk.blocks.2.", list(state))
    assert_same({name: state[name] for name in weights}, weights)
    assert any("depth" in note for note in imported.notes)


def test_a_layer_of_another_shape_is_left_whole_with_both_shapes(digits_codes: Path, tmp_path: Path) -> None:
    save_source(tmp_path / "source.pt", digits_codes, config())
    cfg = config(eps_input=False)
    _, imported = warm_start(cfg, registry.open_codes(digits_codes, cfg, 0), 0, tmp_path / "source.pt")
    assert imported.named("fresh") == ["input.weight", "input.bias"]
    assert all(shape in imported.left["input.bias"] for shape in ("(32, 8)", "(32, 4)"))


def test_another_family_takes_the_blocks_and_says_so(rvq_codes: Path, tmp_path: Path) -> None:
    weights, cfg = save_source(tmp_path / "source.pt", rvq_codes, config()), config("flow")
    generator, imported = warm_start(cfg, registry.open_codes(rvq_codes, cfg, 0), 0, tmp_path / "source.pt")
    state = generator.network.state_dict()
    blocks = names_of("trunk.", list(state))
    assert_same({name: state[name] for name in blocks}, {name: weights[name] for name in blocks})
    assert names_of("head.", imported.named("fresh"))
    assert any("rdpm" in note and "flow" in note for note in imported.notes)


# ---- classes -------------------------------------------------------------------------------------------------------


def test_rows_of_classes_go_by_name_whatever_their_order_and_number(
    digits_codes: Path, tiny_tokenizer_file: Path, tmp_path: Path
) -> None:
    weights, cfg = save_source(tmp_path / "source.pt", digits_codes, config()), config()  # classes a, b, c
    codes = renamed_store(tmp_path / "codes", tiny_tokenizer_file, ["c", "x", "a", "y"])
    opened = registry.open_codes(codes, cfg, 0)
    generator, imported = warm_start(cfg, opened, 0, tmp_path / "source.pt")
    torch.manual_seed(0)
    cold = registry.build(cfg, opened.tokenizer, 4).network.state_dict()
    for name in (EMBEDDING, LATENTS, "trunk.class_tokens.weight"):
        (a, _, c, null), (_, x, _, y, _) = weights[name], cold[name]
        assert torch.equal(generator.network.state_dict()[name], torch.stack([c, x, a, y, null])), name
    assert imported.classes == {"matched": ["c", "a"], "fresh": ["x", "y"], "left": ["b"]}
    assert any("3 of 5" in line for line in imported.lines())


@pytest.mark.parametrize("align", ["durations", "cross"])
def test_units_of_text_go_by_name_too(align: str, tmp_path: Path) -> None:
    cfg = speech_config("rdpm", network={"align": align, **({"text_depth": 1} if align == "cross" else {})})
    words = [["low", "high"], ["high", "rise"], ["low", "rise"]]
    more = [["hiss", "low"], ["rise", "hiss"], ["low", "rise"]]
    old, new = (
        speech_store(tmp_path / name, "sin", [[(word, 5) for word in string] for string in spoken * 3], latents=True)
        for name, spoken in (("old", words), ("new", more))
    )
    file = save_speech_generator(tmp_path / "old.pt", old.root, cfg)
    weights = checkpoint.load(file)["weights"]
    generator, imported = warm_start(cfg, registry.open_codes(new.root, cfg, 0), 0, file)
    number = {name: row for row, name in enumerate([*old.manifest.condition_names, "no text"])}
    tables = [name for name, value in weights.items() if len(value) == 4 and value.ndim == 2 and "unit" in name]
    if align == "cross":
        tables.append("trunk.speech.predictor.duration.weight")
    assert len(tables) == 2
    for table in tables:
        rows = generator.network.state_dict()[table]
        for row, name in enumerate([*new.manifest.condition_names, "no text"]):
            if name in number:
                assert torch.equal(rows[row], weights[table][number[name]]), (table, name)
    assert imported.classes == {"matched": ["low", "rise"], "fresh": ["hiss"], "left": ["high"]}


# ---- grids ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [((5,), (9,)), ((4, 3), (7, 6)), ((6, 6), (4, 5)), ((2, 3, 4), (4, 4, 4))])
def test_positions_of_another_grid_are_interpolated_linearly_along_each_axis(
    old: tuple[int, ...], new: tuple[int, ...]
) -> None:
    table = np.random.default_rng(0).normal(size=(math.prod(old), 3))
    axes = [np.linspace(0, 1, side) for side in old]
    places = np.stack(np.meshgrid(*(np.linspace(0, 1, side) for side in new), indexing="ij"), -1).reshape(-1, len(new))
    expected = RegularGridInterpolator(axes, table.reshape(*old, 3))(places)
    torch.testing.assert_close(resample(torch.from_numpy(table)[None], old, new)[0], torch.from_numpy(expected))


def ramp(side: int) -> torch.Tensor:
    """Height and breadth of the positions of a square grid, from 0 to 1: (L, 2)."""
    axis = torch.linspace(0, 1, side)
    return torch.cartesian_prod(axis, axis)


def test_ramps_over_the_grid_stay_ramps_on_another(
    digits_codes: Path, tiny_tokenizer_file: Path, tmp_path: Path
) -> None:
    directions = torch.randn(4, 2, 4)  # of each class and the null class, (K, 2, C)
    slopes = torch.randn(2, 32)
    tables = {"positions": ramp(4) @ slopes, "class_latents": (ramp(4) @ directions).flatten(1)}
    save_source(tmp_path / "source.pt", digits_codes, config(), **tables)
    tokenizer = new_tokenizer(tmp_path / "tokenizer.pt", tiny_tokenizer_file, 32)
    codes, cfg = renamed_store(tmp_path / "codes", tokenizer, ["c", "b", "a"], 32), config()
    generator, imported = warm_start(cfg, registry.open_codes(codes, cfg, 0), 0, tmp_path / "source.pt")
    state = generator.network.state_dict()
    torch.testing.assert_close(state[POSITIONS], ramp(8) @ slopes)
    torch.testing.assert_close(state[LATENTS], (ramp(8) @ directions[[2, 1, 0, 3]]).flatten(1))
    assert imported.named("interpolated") == [POSITIONS, LATENTS]


def test_positions_of_a_grid_of_other_axes_are_left(rvq_codes: Path, tmp_path: Path) -> None:
    save_source(tmp_path / "source.pt", rvq_codes, config())  # 4×4 positions
    cfg = config("maskgit")  # 4×4 positions of 4 depths
    _, imported = warm_start(cfg, registry.open_codes(rvq_codes, cfg, 0), 0, tmp_path / "source.pt")
    assert {POSITIONS, LATENTS} <= set(imported.named("fresh"))
    assert {POSITIONS, LATENTS} <= imported.left.keys()


# ---- the command ---------------------------------------------------------------------------------------------------

TINY = [
    "--recipe", "digits", "--device", "cpu", "network.depth=1", "network.width=16", "network.heads=1", "train.batch=16",
    "train.steps=4", "train.save_every=2", "train.ema=0.5",
]  # fmt: skip


def train(codes: Path, out: Path, *arguments: object) -> int:
    return run(["train-gen", str(codes), "--out", str(out), *TINY, *map(str, arguments)])


@pytest.fixture(scope="module")
def source(digits_codes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run. Read-only."""
    out = tmp_path_factory.mktemp("source") / "run"
    assert train(digits_codes, out) == 0
    return out


@pytest.mark.parametrize("kind", ["ema", "raw"])
def test_a_run_starts_with_the_average_of_a_file_or_the_raw_weights_of_a_state(
    kind: str, source: Path, digits_codes: Path, tmp_path: Path, capsys: Capture
) -> None:
    state, content = newest_state(source), checkpoint.load(source / "generator.pt")
    raw = state["players"]["generator"]["model"]
    assert not torch.equal(raw[EMBEDDING], content["weights"][EMBEDDING])
    path = source / ("generator.pt" if kind == "ema" else "checkpoints/step-000000004.pt")
    out = tmp_path / "run"
    assert train(digits_codes, out, "--from-weights", path, "train.lr=1e-9", "--json") == 0
    shown = capsys.readouterr()
    json.loads(shown.out)
    assert all(token in shown.err for token in (path.name, f"weights: {kind}", "trunk.blocks"))
    warm = checkpoint.load(out / "generator.pt")
    expected = raw if kind == "raw" else content["weights"]
    for name, value in warm["weights"].items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)
    record, sha256 = warm["provenance"]["from_weights"], files.sha256_file(path)
    digest = None if kind == "raw" else content["digest"]
    assert (record["file"], record["sha256"], record["weights"], record["model"]) == (path.name, sha256, kind, digest)
    assert (record["taken"], record["fresh"], record["left"]) == (len(raw), [], [])
    assert record["classes"]["matched"] == ["a", "b", "c"]
    assert files.read_json(out / "from_weights.json") == record
    assert files.read_json(out / "run.json")["settings"]["from_weights"] == {"sha256": sha256}


def test_a_resumed_warm_run_equals_an_uninterrupted_one(
    source: Path, digits_codes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "generator.pt", tmp_path / "run"
    path.write_bytes((source / "generator.pt").read_bytes())
    assert train(digits_codes, out, "--from-weights", path) == 0
    whole = (out / "generator.pt").read_bytes()
    (out / "generator.pt").unlink()
    checkpoint.states(out / "checkpoints")[-1][1].unlink()
    assert [step for step, _ in checkpoint.states(out / "checkpoints")] == [2]
    monkeypatch.setattr(engine, "warm_start", lambda *_: pytest.fail("imported a second time"))
    moved = path.rename(tmp_path / "moved.pt")  # the sha256 of the file counts, not its path
    assert train(digits_codes, out, "--from-weights", moved) == 0
    assert (out / "generator.pt").read_bytes() == whole


@pytest.mark.parametrize("change", ["another file", "warm to cold", "cold to warm"])
def test_a_run_is_not_resumed_with_different_weights(
    change: str, source: Path, digits_codes: Path, tmp_path: Path, capsys: Capture
) -> None:
    out, warm = tmp_path / "run", ["--from-weights", source / "generator.pt"]
    assert train(digits_codes, out, *(warm if change != "cold to warm" else [])) == 0
    if change == "another file":
        warm = ["--from-weights", source / "checkpoints/step-000000002.pt"]
    assert train(digits_codes, out, *(warm if change != "warm to cold" else [])) == 2
    assert "from_weights" in capsys.readouterr().err


def test_a_file_of_no_use_is_named_and_claims_no_run_folder(
    source: Path, digits_codes: Path, tiny_tokenizer_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    alone, judge = tmp_path / "step-000000002.pt", tmp_path / "step-000000001.pt"
    alone.write_bytes((source / "checkpoints" / alone.name).read_bytes())  # without its sha256
    checkpoint.save_state(tmp_path, 1, {"players": {"judge": {"model": {}}}}, 3)
    checkpoint.save_state(tmp_path / "ema", 1, {"updates": 1, "averages": {}}, 3)  # a snapshot of an average
    (tmp_path / "text.pt").write_text("404")
    cases: list[tuple[Path, str]] = [
        (source / "generator.pt", "network.width=32"), (source / "checkpoints/step-000000002.pt", "network.width=32"),
        (tmp_path / "text.pt", "train.lr=1e-4"), (tiny_tokenizer_file, "train.lr=1e-4"), (alone, "train.lr=1e-4"),
        (judge, "train.lr=1e-4"), (tmp_path / "ema/step-000000001.pt", "train.lr=1e-4"),
        (tmp_path / "absent.pt", "train.lr=1e-4"),
    ]  # fmt: skip
    for path, change in cases:
        assert train(digits_codes, tmp_path / "run", "--from-weights", path, change) == 3, path
        assert str(path) in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_codes_of_another_tokenizer_are_a_warning(
    source: Path, tiny_tokenizer_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    codes = renamed_store(tmp_path / "codes", new_tokenizer(tmp_path / "tokenizer.pt", tiny_tokenizer_file), "abc")
    path = source / "generator.pt"
    assert train(codes, tmp_path / "run", "--from-weights", path, "--quiet") == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("warning") and str(path) in line for line in lines] == [True]


def test_a_run_that_is_not_filled_whole_depends_on_its_own_seed_alone(
    source: Path, digits_codes: Path, tmp_path: Path
) -> None:
    weights = []
    for state in (99, 7):
        torch.manual_seed(state)  # of the process; the run has its own
        out = tmp_path / str(state)
        assert train(digits_codes, out, "--from-weights", source / "generator.pt", "network.depth=2") == 0
        weights.append(checkpoint.load(out / "generator.pt")["weights"])
    assert_same(*weights)

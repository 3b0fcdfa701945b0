"""Recipes: one frozen class a component, YAML files with `extends`, `key=value` overrides, one digest. Torch-free.

The field is the single source of an option: recipe key, override, help, manifest entry and error all derive from it.
"""

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rdpm_cli import files
from rdpm_cli.errors import RecipeError


class Section(BaseModel):
    """Frozen, keyword-only, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


S = TypeVar("S", bound=Section)


class AutoencoderConfig(Section):
    """The VQGAN encoder and decoder."""

    resolution: int = Field(256, gt=0, description="height and width of the images, pixels")
    width: int = Field(128, gt=0, description="channels at full resolution (VQGAN 128, VAR 160)")
    multipliers: tuple[int, ...] = Field((1, 1, 2, 2, 4), description="channels of each level over width; f = 2^(n-1)")
    res_blocks: int = Field(2, ge=1, description="residual blocks a level; the decoder has one more, as VQGAN")
    attention: bool = Field(True, description="self-attention at the lowest resolution")
    groups: int = Field(32, gt=0, description="groups of every GroupNorm")
    channels: int = Field(32, gt=0, description="C, channels of the latent z")
    features: int | None = Field(None, gt=0, description="channels outside quant_conv and post_quant_conv; default C")
    quant_kernel: Literal[1, 3] = Field(3, description="kernel of quant_conv and post_quant_conv (VAR 3, VQGAN 1)")
    latent_norm: Literal["layernorm", "none"] = Field("layernorm", description="z = LN(E(x)) over channels, no affine")

    @property
    def factor(self) -> int:
        """f, image pixels per latent position and side."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the latent."""
        return self.resolution // self.factor, self.resolution // self.factor

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.resolution % self.factor:
            raise ValueError(f"resolution {self.resolution} is not a multiple of f = {self.factor}")
        if odd := [m for m in self.multipliers if (m * self.width) % self.groups]:
            raise ValueError(f"width × {odd[0]} is not a multiple of groups = {self.groups}")
        return self


class ScheduleConfig(Section):
    """The noise schedule alpha_t."""

    kind: Literal["pow", "linear", "sin", "rvq"] = Field("pow", description="alpha_t; rvq is alpha = 1, no noise")
    base: float = Field(0.75, gt=0, le=1, description="the paper's varphi in alpha_t = base^(T-t), for pow")


class QuantizerConfig(Section):
    """The T-step residual quantiser."""

    codes: int = Field(4096, ge=2, le=65536, description="K, codebook entries")
    steps: int = Field(10, ge=1, description="T, diffusion steps = tokens a position")
    bias: Literal["none", "add", "blend"] = Field("blend", description="q; q + conv(q); 0.5 q + 0.5 conv(q)")
    codebook: Literal["ema", "gradient"] = Field("ema", description="how the codebook learns")
    codebooks: Literal["shared", "per_step"] = Field("shared", description="one book for all t, or one a t")
    decay: float = Field(0.99, ge=0, lt=1, description="of the codebook's EMA")
    restart_below: float = Field(
        0.03, ge=0, lt=1, description="a code used less than this × the mean restarts; 0 = off"
    )


class TokenizerLossConfig(Section):
    """Factors of the tokenizer's loss."""

    quant: float = Field(0.25, ge=0, description="factor of L_quant, Eq. 4")
    weight: bool = Field(True, description="gamma_t = alpha_t in L_quant; false: 1")


class TrainConfig(Section):
    """What the one training loop needs, the same for every task."""

    batch: int = Field(128, gt=0, description="images a step, over all processes")
    micro_batch: int | None = Field(None, gt=0, multiple_of=16, description="images at once; gradients accumulate")
    steps: int | None = Field(None, gt=0, description="optimiser steps; or give epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the images; or give steps")
    lr: float = Field(4e-5, gt=0, description="learning rate after warm-up")
    lr_decay: Literal["constant", "cosine"] = Field("constant", description="after warm-up; cosine ends at 0")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up, in steps")
    warmup_epochs: float = Field(0.0, ge=0, description="linear warm-up, in epochs (added to warmup_steps)")
    betas: tuple[float, float] = Field((0.9, 0.95), description="of AdamW")
    weight_decay: float = Field(0.0, ge=0, description="not on embeddings, norms and biases")
    clip: float = Field(0.0, ge=0, description="largest gradient norm; 0 = off")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the weights' average; 0 = off")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="autocast of the network; quantiser and losses fp32")
    workers: int = Field(0, ge=0, description="processes that prepare batches")
    log_every: int = Field(50, gt=0, description="steps between lines in metrics.jsonl")
    eval_every: int = Field(0, ge=0, description="steps between held-out evaluations and previews; 0 = at the end only")
    save_every: int = Field(1000, gt=0, description="steps between checkpoints")
    keep: int = Field(3, ge=2, description="checkpoints kept")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self

    def total_steps(self, images: int) -> int:
        """Optimiser steps for a data set of so many images."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * images / self.batch))

    def warmup(self, images: int) -> int:
        """Warm-up steps for a data set of so many images."""
        return self.warmup_steps + round(self.warmup_epochs * images / self.batch)


class TokenizerArchitecture(Section):
    """What rebuilds a tokenizer; travels in its checkpoint."""

    autoencoder: AutoencoderConfig = AutoencoderConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    quantizer: QuantizerConfig = QuantizerConfig()


class TokenizerConfig(TokenizerArchitecture):
    """A tokenizer and its training."""

    loss: TokenizerLossConfig = TokenizerLossConfig()
    flip: bool = Field(True, description="mirror training images at random")
    train: TrainConfig


class NetworkConfig(Section):
    """The transformer, shared by the families."""

    depth: int = Field(16, gt=0, description="transformer blocks")
    width: int | None = Field(None, gt=0, description="D; default 64 × depth (Table 1)")
    heads: int | None = Field(None, gt=0, description="attention heads; default depth")
    positions: Literal["rope", "learned", "both"] = Field("rope", description="2-D RoPE, a learned table, or both")
    class_latents: bool = Field(False, description="a learned C-vector a class and position, added to the input")
    class_tokens: int = Field(0, ge=0, description="in-context tokens a class, dropped before the head")
    head: Literal["linear", "geometric"] = Field("linear", description="geometric also predicts z and scores by it")

    @property
    def hidden(self) -> int:
        """D, the width of the residual stream."""
        return self.width or 64 * self.depth

    @property
    def head_count(self) -> int:
        """Attention heads."""
        return self.heads or self.depth

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.hidden % self.head_count or (self.hidden // self.head_count) % 4:
            raise ValueError(f"width / heads must be a multiple of 4, not {self.hidden} / {self.head_count}")
        return self


class GeneratorArchitecture(Section):
    """What rebuilds a generator, beside its tokenizer; travels in its checkpoint."""

    family: Literal["rdpm"] = Field("rdpm", description="generator family")
    network: NetworkConfig = NetworkConfig()


class ObjectiveConfig(Section):
    """How a training batch is drawn from the code store."""

    noise: Literal["cached", "fresh"] = Field("cached", description="the store's draws, or new ones (needs latents)")
    steps_per_image: int = Field(1, ge=1, description="values of t an image and step; loss rows = batch × this")
    t_weights: Literal["uniform", "alpha"] = Field("uniform", description="t drawn uniformly, or ~ alpha_t + 0.2")
    perturb: float = Field(0.0, ge=0, description="a in z' + a·U·N(0,1), one U an image, targets unchanged")
    label_drop: float = Field(0.1, ge=0, le=1, description="probability of the null class")


class SamplingConfig(Section):
    """Defaults of `rdpm sample`, recorded in the checkpoint."""

    cfg: float = Field(0.0, ge=0, description="lambda of guidance; 0 = off")
    cfg_schedule: Literal["constant", "linear"] = Field("linear", description="linear: 0 at t = 1, lambda at t = T")
    tau: float = Field(1.0, gt=0, description="inverse temperature: 1 samples exactly, larger is greedier")
    skip_steps: int = Field(0, ge=0, description="first steps taken from the model-free guess, no network call")
    micro_batch: int = Field(8, gt=0, description="images a forward pass; part of what fixes a sample on the CPU")


class GeneratorConfig(GeneratorArchitecture):
    """A generator, its training and its sampling defaults."""

    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig
    sampling: SamplingConfig = SamplingConfig()


class JudgeConfig(Section):
    """A small classifier of real images, an honest extractor where Inception says little."""

    width: int = Field(32, gt=0, description="channels of the first layer")
    features: int = Field(64, gt=0, description="width of the penultimate layer")
    train: TrainConfig


class Recipe(Section):
    """The whole way. A recipe may hold only the parts its commands need."""

    name: str = Field("", description="filled in with the file's name")
    seed: int = Field(0, ge=0, description="of training and of the store's noise")
    classes: int = Field(1000, gt=0, description="for `rdpm inspect` alone; training counts the store's own")
    views: int = Field(1, ge=1, description="noise draws an image that the demo keeps in its store")
    tokenizer: TokenizerConfig | None = Field(None, description="for train-tokenizer")
    generator: GeneratorConfig | None = Field(None, description="for train-gen")
    judge: JudgeConfig | None = Field(None, description="for the demo")

    def digest(self) -> str:
        """sha256 of the resolved recipe."""
        return files.digest(self.model_dump(mode="json"))


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice; PyYAML keeps the last one silently."""


def _unique_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise RecipeError(f"key '{twice[0]}' stands twice, line {node.start_mark.line + 1} on")
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def parse_yaml(text: str, where: str) -> Any:
    """Plain YAML values. Raises RecipeError, which names `where`, on a syntax error or a key written twice."""
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not valid YAML: {error}") from error
    except RecipeError as error:
        raise RecipeError(f"{where}: {error.message}") from error
    finally:
        loader.dispose()


def recipe_folder() -> Path:
    """Where the shipped recipes are: inside the wheel, or at the root of a checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def find_recipe(name_or_file: str) -> Path:
    """A shipped recipe by name, or a YAML file by path. Raises RecipeError with near names."""
    path = Path(name_or_file)
    if path.suffix in {".yaml", ".yml"} or os.sep in name_or_file:
        if not path.is_file():
            raise RecipeError(f"recipe file {path} does not exist", f"shipped recipes: {', '.join(recipe_names())}")
        return path
    shipped = recipe_folder() / f"{name_or_file}.yaml"
    if not shipped.is_file():
        near = difflib.get_close_matches(name_or_file, recipe_names(), 1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise RecipeError(f"no recipe named '{name_or_file}'", f"{hint}shipped recipes: {', '.join(recipe_names())}")
    return shipped


def leaf_keys(section: type[Section] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema."""
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is None:
            yield prefix + name
        else:
            yield from leaf_keys(inner, f"{prefix}{name}.")


def _section_of(annotation: Any) -> type[Section] | None:
    options = getattr(annotation, "__args__", (annotation,))
    found = [a for a in options if isinstance(a, type) and issubclass(a, Section)]
    return found[0] if found else None


def _nearest(key: str, section: str) -> str:
    keys = list(leaf_keys())
    keys += [k.removeprefix(f"{section}.") for k in keys if k.startswith(f"{section}.")]
    near = difflib.get_close_matches(key, keys, 1, cutoff=0.5)
    if not near:  # right name in the wrong place: compare last words
        word = key.rsplit(".", 1)[-1]
        words = {k.rsplit(".", 1)[-1]: k for k in (keys if section else reversed(keys))}
        near = [words[w] for w in difflib.get_close_matches(word, list(words), 1)]
    return f"did you mean '{near[0]}'?" if near else "see the recipe's own keys with `rdpm inspect RECIPE`"


RIVALS = {"steps": "epochs", "epochs": "steps"}  # two ways to give a length: the later one replaces the other


def _set(section: dict[str, Any], path: str, key: str, value: Any) -> None:
    """section[key] = value; in a train section a length also drops the other way to give it."""
    section[key] = value
    if path.endswith("train") and key in RIVALS and value is not None:
        section.pop(RIVALS[key], None)


def _merge(base: dict[str, Any], change: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        deeper = isinstance(old, dict) and isinstance(value, Mapping)
        _set(merged, path, key, _merge(old, value, f"{path}.{key}") if deeper and isinstance(old, dict) else value)
    return merged


def _parent(path: Path, name_or_file: str) -> Path:
    """What a recipe extends: a file beside it, else as on the command line."""
    beside = path.parent / name_or_file
    return beside if beside.is_file() else find_recipe(name_or_file)


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The recipe's plain dict, after the recipe it extends."""
    if path in seen:
        raise RecipeError(f"{path} extends itself")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} holds no keys", "start from a shipped recipe")
    parent = raw.pop("extends", None)
    return raw if parent is None else _merge(_read(_parent(path, str(parent)), (*seen, path)), raw)


def _override(raw: dict[str, Any], text: str, section: str) -> None:
    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"override '{text}' is not key=value", "write it as train.steps=100")
    known = set(leaf_keys())
    full = next((k for k in (key, f"{section}.{key}") if k in known), None)
    if full is None:
        raise RecipeError(f"unknown recipe key '{key}'", _nearest(key, section))
    *parents, leaf = full.split(".")
    here = raw
    for parent in parents:
        if here.get(parent) is None:
            here[parent] = {}
        here = here[parent]
        if not isinstance(here, dict):
            raise RecipeError(f"override '{text}': {parent} is not a section", "mend the recipe file")
    _set(here, ".".join(parents), leaf, parse_yaml(value, f"override '{text}'") if value else "")


def load_recipe(name_or_file: str, overrides: Sequence[str] = (), section: str = "") -> Recipe:
    """Resolve a recipe: file, what it extends, then overrides in order. `section` is where short keys are looked up.

    `load_recipe("digits", ["train.steps=10"], "tokenizer")` sets tokenizer.train.steps. Raises RecipeError.
    """
    path = find_recipe(name_or_file)
    raw = _read(path)
    raw["name"] = path.stem
    lacks = section != "" and section not in raw
    for text in overrides:
        _override(raw, text, section)
    recipe = validate(Recipe, raw, str(path), section)
    if lacks or (section and getattr(recipe, section) is None):
        able = [name for name in recipe_names() if section in _read(recipe_folder() / f"{name}.yaml")]
        raise RecipeError(f"recipe '{recipe.name}' has no {section} section", f"recipes that do: {', '.join(able)}")
    return recipe


def validate(section: type[S], raw: Any, where: str, prefix: str = "") -> S:
    """raw as a section. Raises RecipeError naming `where`, the key, and the nearest key if it is unknown."""
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise RecipeError(f"{where}: unknown recipe key '{key}'", _nearest(key, prefix)) from error
        raise RecipeError(f"{where}: {key or 'recipe'}: {first['msg']}", f"got {first['input']!r}"[:200]) from error

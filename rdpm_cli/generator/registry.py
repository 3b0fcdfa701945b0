"""The one table of generator families, and generator files, each of which carries its tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rdpm_cli import checkpoint
from rdpm_cli.codes.ragged import open_store
from rdpm_cli.codes.store import TOKENIZER, CodeStore, Manifest
from rdpm_cli.data.pixels import Cut
from rdpm_cli.data.text import Kind
from rdpm_cli.errors import CheckpointError, DataError, UsageError, some_of
from rdpm_cli.generator import config as configs
from rdpm_cli.generator.ar import AR
from rdpm_cli.generator.conditions import TextCondition
from rdpm_cli.generator.contract import Generator, GeneratorBatches, Guide, SampleOptions
from rdpm_cli.generator.flow import Flow, LatentBatches
from rdpm_cli.generator.maskgit import MaskGIT, MaskGITBatches
from rdpm_cli.generator.masking import MaskBatches
from rdpm_cli.generator.rdpm import RDPM, CodeBatches
from rdpm_cli.generator.resgen import ResGen
from rdpm_cli.generator.sampler import Job, KnownCodes
from rdpm_cli.generator.tokens import TokenBatches
from rdpm_cli.generator.transformer import Kernel, sdpa
from rdpm_cli.tokenizer import model as tokenizer_model
from rdpm_cli.training.loop import CHECKPOINTS

KIND = "rdpm-generator"


class Family(NamedTuple):
    """The classes that make up a generator family."""

    make: type[Generator]
    batches: type[GeneratorBatches]
    config: type[configs.GeneratorConfig]
    network: type[configs.TransformerConfig]
    sampling: type[configs.SamplingConfig]


FAMILIES = {
    "rdpm": Family(RDPM, CodeBatches, configs.RDPMConfig, configs.NetworkConfig, configs.RDPMSampling),
    "resgen": Family(ResGen, MaskBatches, configs.ResGenConfig, configs.ResGenNetwork, configs.ResGenSampling),
    "maskgit": Family(
        MaskGIT, MaskGITBatches, configs.MaskGITConfig, configs.TransformerConfig, configs.MaskGITSampling
    ),
    "ar": Family(AR, TokenBatches, configs.ARConfig, configs.ARNetworkConfig, configs.ARSampling),
    "flow": Family(Flow, LatentBatches, configs.FlowConfig, configs.TransformerConfig, configs.FlowSampling),
}


def build(cfg: configs.GeneratorConfig, tokenizer: tokenizer_model.Tokenizer, classes: int) -> Generator:
    """A fresh generator of the recipe's family over a tokenizer's codes."""
    return FAMILIES[cfg.family].make(cfg.network, tokenizer.quantizer, classes)


@dataclass
class Codes:
    """What a training of a generator reads. content: of the tokenizer's file."""

    store: CodeStore
    tokenizer: tokenizer_model.Tokenizer
    content: dict[str, Any]
    batches: GeneratorBatches


def open_codes(root: Path, cfg: configs.GeneratorConfig, seed: int) -> Codes:
    """A store with the copy of its tokenizer, and batches of it. Raises DataError, CheckpointError and UsageError."""
    manifest = Manifest.load(root)  # before its tokenizer is read: a missing store has the clearer error
    tokenizer, content = tokenizer_model.load(root / TOKENIZER)
    store = open_store(root, content["digest"], manifest)
    if manifest.speech and not (manifest.speech.text and manifest.latents):
        lacking = "latents" if manifest.speech.text else "texts"
        raise DataError(
            f"{root} keeps no {lacking}, which generators of speech learn from",
            "tokenize with --units and --keep latents",
        )
    if manifest.speech and not manifest.speech.durations and cfg.network.align == "durations":
        hint = "tokenize with --units words --align judge.pt, or give network.align=cross, which needs more recordings"
        raise DataError(f"{root} keeps no durations of words", hint)
    if cfg.sampling.cfg and (fault := configs.guidance_fault(None, len(manifest.condition_names))):
        raise UsageError(f"sampling.cfg={cfg.sampling.cfg:g} with {root}: {fault}", "give sampling.cfg=0")
    family = FAMILIES[cfg.family]
    family.make.check_codes(tokenizer.cfg, str(root))
    return Codes(store, tokenizer, content, family.batches(store, cfg, tokenizer.quantizer, seed))


def find_kernel(cfg: configs.GeneratorConfig, device: str) -> Kernel:
    """The recipe's attention kernel. Raises UsageError if flash-attn cannot run here."""
    if cfg.attention == "sdpa":
        return sdpa
    if device == "cpu" or not torch.cuda.is_available() or cfg.train.precision != "bf16":
        raise UsageError("attention=flash runs in bf16 on a CUDA device", "give attention=sdpa")
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        hint = "uv pip install 'rdpm[flash]' --no-build-isolation, or leave attention=sdpa"
        raise UsageError("attention=flash needs the flash-attn package, which is not installed", hint) from error

    def flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        if mask is not None:
            raise UsageError("attention=flash cannot mask the condition's tokens", "leave attention=sdpa")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # its layout: (B, N, A, E)
        return flash_attn_func(q, k, v, causal=causal).transpose(1, 2)

    return flash


def prepare(generator: Generator, cfg: configs.GeneratorConfig, kernel: Kernel = sdpa) -> None:
    """Set the training options: the objective, the attention kernel, activation checkpointing."""
    generator.objective, generator.network.trunk.recompute = cfg.objective, cfg.recompute
    for block in generator.network.trunk.blocks:
        block.attn.kernel = kernel


def pack(
    generator: Generator, cfg: configs.GeneratorConfig, tokenizer: dict[str, Any], class_names: list[str], **extra: Any
) -> dict[str, Any]:
    """The content of a generator file. tokenizer: the content of its file. extra: provenance."""
    architecture = cfg.model_dump(mode="json", include={"family", "network"})
    content = {**architecture, "classes": len(class_names), "tokenizer": tokenizer["digest"]}
    # The sampling defaults are outside the config, and so outside the digest: tuned ones make no other model.
    extra |= {"tokenizer": tokenizer, "class_names": class_names, "sampling": cfg.sampling.model_dump(mode="json")}
    return checkpoint.pack(KIND, content, generator.network, **extra)


@dataclass
class LoadedGenerator:
    generator: Generator
    tokenizer: tokenizer_model.Tokenizer
    sampling: configs.SamplingConfig
    class_names: list[str]  # or the names of the units of text
    digest: str
    provenance: dict[str, Any]
    text: Kind | None = None  # kind of the units of sound
    tokenizer_digest: str = ""

    @property
    def attends_to_text(self) -> bool:
        """Whether network.align is `cross`."""
        return isinstance(self.generator.network.trunk.speech, TextCondition)

    def options(self, seed: int, preset: str | None, sampling: Mapping[str, Any]) -> SampleOptions:
        """The recorded sampling options with a preset's and these over them. Raises UsageError as `check`."""
        if not 0 <= seed < 2**63:
            raise UsageError(f"seed {seed} is not in 0..2^63-1", "give another one")
        options = SampleOptions(self.sampling.changed(preset, sampling), int(seed))
        if named := getattr(options.sampling, "guide", None):
            options = replace(options, guide=self.guide(named))
        self.check(options)
        return options

    def guide(self, named: str) -> Guide:
        """The generator of a checkpoint, or of RUN@STEP. Raises UsageError if it draws other codes."""
        run, at, step = named.rpartition("@")
        weak = load_step(Path(run), int(step)) if at and step.isdecimal() else load(Path(named))
        ours = (self.tokenizer_digest, self.class_names, type(self.generator))
        if (weak.tokenizer_digest, weak.class_names, type(weak.generator)) != ours:
            message = f"guide={named}: it is of another tokenizer, family or set of classes"
            raise UsageError(message, "name a generator that was trained on the same codes")
        return Guide(weak.generator, weak.digest)

    def job(self, options: SampleOptions, known_codes: KnownCodes | None = None, cut: Cut = "round") -> Job:
        """What draws samples under these options, as many a pass as they say for this generator's device."""
        device = next(self.generator.network.parameters()).device
        return Job(
            self.generator, self.tokenizer, options, options.sampling.images_at_once(device.type), known_codes, cut
        )

    def check(self, options: SampleOptions) -> None:
        """Raise UsageError for options that this generator cannot use."""
        objective = (self.provenance.get("recipe", {}).get("generator") or {}).get("objective", {})
        fault = "" if options.guide else configs.guidance_fault(objective.get("label_drop"), self.generator.classes)
        if options.sampling.cfg and fault:
            raise UsageError(f"cfg={options.sampling.cfg:g} with this checkpoint: {fault}", "give cfg=0")
        self.generator.check(options)

    def to(self, device: torch.device, compiled: str = "off") -> "LoadedGenerator":
        """Move both networks. compiled: as the sampling option `compile`."""
        self.generator.network.to(device)
        self.tokenizer.to(device)
        if compiled != "off":
            self.generator.network.compile(mode="reduce-overhead" if compiled == "graphs" else "default")
        return self


def load(path: Path) -> LoadedGenerator:
    """The generator of a file. Raises CheckpointError."""
    return unpack(checkpoint.load(path, KIND), str(path))


def load_step(run: Path, step: int) -> LoadedGenerator:
    """The generator of a finished run as it was after a step, its average if there is one. Raises CheckpointError."""
    saved, content = dict(checkpoint.states(run / CHECKPOINTS)), checkpoint.load(run / "generator.pt", KIND)
    if step not in saved:
        have = some_of(map(str, saved))
        raise CheckpointError(f"{run} keeps no state of step {step}, but of {have}", "train with a larger train.keep")
    state = checkpoint.load_state(saved[step], "cpu")
    weights = (state["ema"] or state["players"]["generator"])["model"]
    digest = checkpoint.model_digest(weights, content["config"])
    return unpack({**content, "weights": weights, "digest": digest}, f"{run}@{step}")


def unpack(content: dict[str, Any], path: str) -> LoadedGenerator:
    """The frozen generator of a file's content, in evaluation mode. Raises CheckpointError."""
    inner = f"the tokenizer inside {path}"
    checkpoint.check(content.get("tokenizer"), inner, tokenizer_model.KIND)
    tokenizer = tokenizer_model.unpack(content["tokenizer"], inner)
    fields = content["config"]
    if fields["tokenizer"] != content["tokenizer"]["digest"]:
        raise CheckpointError(f"{path} carries another tokenizer than it was trained with", "copy or make it again")
    if len(content["class_names"]) != fields["classes"]:
        raise CheckpointError(f"{path} names {len(content['class_names'])} of its {fields['classes']} classes")
    family = FAMILIES.get(fields["family"])
    if family is None:
        raise CheckpointError(f"{path} is of the family {fields['family']}, which this rdpm does not know")
    network = checkpoint.config_of(family.network, fields["network"], path)
    generator = family.make(network, tokenizer.quantizer, fields["classes"])
    checkpoint.fill(generator.network, content, path)
    generator.network.eval().requires_grad_(False)
    # Files of 0.1.0 have the sampling options in the config, or nowhere.
    recorded = content.get("sampling", fields.get("sampling")) or {}
    sampling = checkpoint.config_of(family.sampling, recorded, path)
    class_names, digest, provenance = (content[name] for name in ("class_names", "digest", "provenance"))
    return LoadedGenerator(
        generator, tokenizer, sampling, class_names, digest, provenance, content.get("text"), fields["tokenizer"]
    )

"""The one table of generator families, and generator files, each of which carries its tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rdpm_cli import checkpoint, progress
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.errors import CheckpointError, UsageError
from rdpm_cli.generator import rdpm, resgen, transformer
from rdpm_cli.generator.config import (
    GeneratorArchitecture,
    GeneratorConfig,
    RDPMArchitecture,
    RDPMConfig,
    RDPMSampling,
    ResGenArchitecture,
    ResGenConfig,
    ResGenSampling,
    SamplingConfig,
)
from rdpm_cli.generator.contract import Generator, GeneratorBatches
from rdpm_cli.generator.transformer import Kernel
from rdpm_cli.tokenizer import model as tokenizer_model
from rdpm_cli.tokenizer.config import TokenizerArchitecture
from rdpm_cli.tokenizer.model import Tokenizer

KIND = "rdpm-generator"


@dataclass(frozen=True)
class Family:
    """What a generator family brings."""

    config: type[GeneratorConfig]
    architecture: type[GeneratorArchitecture]  # what rebuilds the network; stored in its file
    sampling: type[SamplingConfig]
    make: Callable[..., Generator]  # (architecture, quantizer, classes)
    check_codes: Callable[[TokenizerArchitecture, str], None]  # raises UsageError for codes it cannot learn from
    batches: Callable[..., GeneratorBatches]  # (store, config, quantizer, seed)
    blank: Callable[..., Any]  # (config, quantizer, rows) -> a batch without content, for memory and FLOP counts


FAMILIES = {
    "rdpm": Family(
        RDPMConfig, RDPMArchitecture, RDPMSampling, rdpm.RDPM, rdpm.RDPM.check_codes, rdpm.CodeBatches, rdpm.blank
    ),
    "resgen": Family(
        ResGenConfig, ResGenArchitecture, ResGenSampling, resgen.ResGen, resgen.ResGen.check_codes, resgen.MaskBatches,
        resgen.blank,
    ),
}  # fmt: skip


def build(cfg: GeneratorArchitecture, tokenizer: Tokenizer, classes: int) -> Generator:
    """A fresh generator of the recipe's family over a tokenizer's codes."""
    return FAMILIES[cfg.family].make(cfg, tokenizer.quantizer, classes)


def batches(cfg: GeneratorConfig, store: CodeStore, tokenizer: Tokenizer, seed: int) -> GeneratorBatches:
    """The family's batches from a store of this tokenizer's codes."""
    return FAMILIES[cfg.family].batches(store, cfg, tokenizer.quantizer, seed)


def check_codes(family: str, tokenizer: TokenizerArchitecture, where: str) -> None:
    """Raise UsageError, naming a recipe that fits, where the family cannot learn from this tokenizer's codes."""
    FAMILIES[family].check_codes(tokenizer, where)


def find_kernel(cfg: GeneratorConfig, device: str) -> Kernel:
    """The recipe's attention kernel. Raises UsageError where flash-attn cannot run."""
    if cfg.attention == "sdpa":
        return transformer.sdpa
    if device == "cpu" or not torch.cuda.is_available() or cfg.train.precision != "bf16":
        raise UsageError(
            "attention=flash runs in bf16 on a CUDA device", "give train.precision=bf16, or attention=sdpa"
        )
    return transformer.flash()


def prepare(generator: Generator, cfg: GeneratorConfig, kernel: Kernel = transformer.sdpa) -> None:
    """Set the attention kernel and activation checkpointing for training."""
    trunk = transformer.trunk_of(generator.network)
    trunk.use(kernel)
    trunk.recompute = cfg.recompute


def parameters(generator: Generator) -> int:
    """Trainable parameters of the generator alone, without tokenizer and EMA."""
    return sum(p.numel() for p in generator.network.parameters())


def pack(
    generator: Generator, cfg: GeneratorConfig, tokenizer: dict[str, Any], class_names: list[str], **fields: Any
) -> dict[str, Any]:
    """The content of a generator file. tokenizer: the content of its file. fields: provenance.

    The sampling defaults are outside config and digest: tuned defaults make no other model.
    """
    config = {
        **cfg.model_dump(mode="json", include=set(GeneratorArchitecture.model_fields)),
        "classes": len(class_names),
        "tokenizer": tokenizer["digest"],
    }
    sampling = cfg.sampling.model_dump(mode="json")
    return checkpoint.pack(
        KIND, config, generator.network, tokenizer=tokenizer, class_names=class_names, sampling=sampling, **fields
    )


@dataclass
class LoadedGenerator:
    """A generator file, ready to sample."""

    generator: Generator
    tokenizer: Tokenizer
    sampling: SamplingConfig
    class_names: list[str]
    digest: str
    provenance: dict[str, Any]

    def to(self, device: torch.device, compiled: str = "off") -> "LoadedGenerator":
        """Move both networks. compiled: as the sampling option `compile`."""
        self.generator.network.to(device)
        self.tokenizer.to(device)
        if compiled != "off":
            self.generator.network.compile(mode="reduce-overhead" if compiled == "graphs" else "default")
        return self


def load(path: Path) -> LoadedGenerator:
    """The generator of a file, frozen, in evaluation mode. Raises CheckpointError."""
    content = checkpoint.load(path, KIND)
    inner = f"the tokenizer inside {path}"
    checkpoint.check(content.get("tokenizer"), inner, tokenizer_model.KIND)
    tokenizer = tokenizer_model.unpack(content["tokenizer"], inner)
    config = dict(content["config"])
    classes = config.pop("classes")
    if config.pop("tokenizer") != content["tokenizer"]["digest"]:
        raise CheckpointError(f"{path} carries another tokenizer than it was trained with", "copy or make it again")
    family = FAMILIES.get(config["family"])
    if family is None:
        raise CheckpointError(f"{path} is of the family {config['family']}, which this rdpm does not know")
    generator = build(checkpoint.config_of(family.architecture, config, str(path)), tokenizer, classes)
    checkpoint.fill(generator.network, content, str(path))
    sampling = _sampling(family.sampling, content.get("sampling"), path)
    generator.network.eval().requires_grad_(False)
    return LoadedGenerator(
        generator, tokenizer, sampling, content["class_names"], content["digest"], content["provenance"]
    )


def _sampling(section: type[SamplingConfig], recorded: Any, path: Path) -> SamplingConfig:
    """The sampling defaults of a file; where it records none, those of the family, with a message."""
    if recorded is None:
        progress.say(f"{path} records no sampling options; the family's defaults are used")
        return section()
    return checkpoint.config_of(section, recorded, str(path))

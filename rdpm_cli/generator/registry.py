"""The one table of generator families, and generator files, each of which carries its tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rdpm_cli import checkpoint, progress
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.errors import CheckpointError, UsageError
from rdpm_cli.generator import config, transformer
from rdpm_cli.generator.config import GeneratorArchitecture, GeneratorConfig, SamplingConfig
from rdpm_cli.generator.contract import Generator, GeneratorBatches
from rdpm_cli.generator.rdpm import RDPM, CodeBatches
from rdpm_cli.generator.resgen import MaskBatches, ResGen
from rdpm_cli.generator.transformer import Kernel
from rdpm_cli.tokenizer import model as tokenizer_model
from rdpm_cli.tokenizer.config import TokenizerArchitecture
from rdpm_cli.tokenizer.model import Tokenizer

KIND = "rdpm-generator"


@dataclass(frozen=True)
class Family:
    """The classes that make up a generator family."""

    make: type[Generator]
    batches: type[GeneratorBatches]
    config: type[GeneratorConfig]
    architecture: type[GeneratorArchitecture]  # the part of the config that rebuilds the network
    sampling: type[SamplingConfig]


FAMILIES = {
    "rdpm": Family(RDPM, CodeBatches, config.RDPMConfig, config.RDPMArchitecture, config.RDPMSampling),
    "resgen": Family(ResGen, MaskBatches, config.ResGenConfig, config.ResGenArchitecture, config.ResGenSampling),
}


def build(cfg: GeneratorArchitecture, tokenizer: Tokenizer, classes: int) -> Generator:
    """A fresh generator of the recipe's family over a tokenizer's codes."""
    return FAMILIES[cfg.family].make(cfg, tokenizer.quantizer, classes)


def batches(cfg: GeneratorConfig, store: CodeStore, tokenizer: Tokenizer, seed: int) -> GeneratorBatches:
    """The family's batches from a store of this tokenizer's codes."""
    return FAMILIES[cfg.family].batches(store, cfg, tokenizer.quantizer, seed)


def check_codes(family: str, tokenizer: TokenizerArchitecture, origin: str) -> None:
    """Raise UsageError, naming a recipe that fits, if the family cannot learn this tokenizer's codes."""
    FAMILIES[family].make.check_codes(tokenizer, origin)


def find_kernel(cfg: GeneratorConfig, device: str) -> Kernel:
    """The recipe's attention kernel. Raises UsageError if flash-attn cannot run here."""
    if cfg.attention == "sdpa":
        return transformer.sdpa
    if device == "cpu" or not torch.cuda.is_available() or cfg.train.precision != "bf16":
        raise UsageError(
            "attention=flash runs in bf16 on a CUDA device", "give train.precision=bf16, or attention=sdpa"
        )
    return transformer.flash()


def prepare(generator: Generator, cfg: GeneratorConfig, kernel: Kernel = transformer.sdpa) -> None:
    """Set the attention kernel, and whether the backward pass computes the blocks' activations again."""
    trunk = transformer.trunk_of(generator.network)
    trunk.use(kernel)
    trunk.recompute = cfg.recompute


def parameters(generator: Generator) -> int:
    """Trainable parameters of the generator only, without tokenizer and EMA."""
    return sum(p.numel() for p in generator.network.parameters())


# ---- files ---------------------------------------------------------------------------------------------------------


def pack(
    generator: Generator, cfg: GeneratorConfig, tokenizer: dict[str, Any], class_names: list[str], **extra: Any
) -> dict[str, Any]:
    """The content of a generator file. tokenizer: the content of its file. extra: provenance."""
    architecture = cfg.model_dump(mode="json", include=set(GeneratorArchitecture.model_fields))
    content = {**architecture, "classes": len(class_names), "tokenizer": tokenizer["digest"]}
    # The sampling defaults are outside the config, and so outside the digest: tuned ones make no other model.
    sampling = cfg.sampling.model_dump(mode="json")
    return checkpoint.pack(
        KIND, content, generator.network, tokenizer=tokenizer, class_names=class_names, sampling=sampling, **extra
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
    fields = dict(content["config"])
    classes, old_sampling = fields.pop("classes"), fields.pop("sampling", None)  # files of 0.1.0 have the latter here
    if fields.pop("tokenizer") != content["tokenizer"]["digest"]:
        raise CheckpointError(f"{path} carries another tokenizer than it was trained with", "copy or make it again")
    if fields["family"] not in FAMILIES:
        raise CheckpointError(f"{path} is of the family {fields['family']}, which this rdpm does not know")
    family = FAMILIES[fields["family"]]
    generator = build(checkpoint.config_of(family.architecture, fields, str(path)), tokenizer, classes)
    checkpoint.fill(generator.network, content, str(path))
    generator.network.eval().requires_grad_(False)
    sampling = content.get("sampling", old_sampling)
    if sampling is None:
        progress.say(f"{path} records no sampling options; its family's defaults apply")
    return LoadedGenerator(
        generator,
        tokenizer,
        checkpoint.config_of(family.sampling, sampling or {}, str(path)),
        content["class_names"],
        content["digest"],
        content["provenance"],
    )

"""Building generators, and their files. A generator's file carries its tokenizer, so `rdpm sample` needs no more."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rdpm_cli import modelfile, progress
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.config import (
    GeneratorArchitecture,
    GeneratorConfig,
    RDPMArchitecture,
    RDPMSampling,
    ResGenArchitecture,
    ResGenSampling,
    SamplingConfig,
    TokenizerArchitecture,
)
from rdpm_cli.errors import CheckpointError, UsageError
from rdpm_cli.generator import rdpm_batches, resgen_batches, transformer
from rdpm_cli.generator.contract import Generator, GeneratorBatches
from rdpm_cli.generator.rdpm import RDPM
from rdpm_cli.generator.resgen import ResGen
from rdpm_cli.generator.transformer import Kernel
from rdpm_cli.tokenizer import model as tokenizer_file
from rdpm_cli.tokenizer.model import Tokenizer

KIND = "rdpm-generator"


@dataclass(frozen=True)
class Family:
    """What a generator family brings."""

    make: Callable[..., Generator]  # of its architecture, the quantizer, the grid (h, w), the number of classes
    batches: Callable[..., GeneratorBatches]  # of the store, its recipe, the quantizer, the seed
    blank: Callable[..., Any]  # a micro-batch without content: of its recipe, the quantizer, the grid, the rows
    architecture: type[GeneratorArchitecture]
    sampling: type[SamplingConfig]


FAMILIES = {
    "rdpm": Family(RDPM, rdpm_batches.CodeBatches, rdpm_batches.blank, RDPMArchitecture, RDPMSampling),
    "resgen": Family(ResGen, resgen_batches.MaskBatches, resgen_batches.blank, ResGenArchitecture, ResGenSampling),
}


def build(cfg: GeneratorArchitecture, tokenizer: Tokenizer, classes: int) -> Generator:
    """A fresh generator of the recipe's family over a tokenizer's codes."""
    return FAMILIES[cfg.family].make(cfg, tokenizer.quantizer, tokenizer.cfg.autoencoder.grid, classes)


def batches(cfg: GeneratorConfig, store: CodeStore, tokenizer: Tokenizer, seed: int) -> GeneratorBatches:
    """The family's batches from a store of this tokenizer's codes."""
    return FAMILIES[cfg.family].batches(store, cfg, tokenizer.quantizer, seed)


def check_codes(family: str, tokenizer: TokenizerArchitecture, where: str) -> None:
    """Raise UsageError, naming a recipe that fits, where a family cannot learn from this tokenizer's codes."""
    kind, bias = tokenizer.schedule.kind, tokenizer.quantizer.bias
    if family == "rdpm" and kind == "rvq":
        raise UsageError(
            f"{where} holds codes of plain residual quantisation (rvq), and RDPM predicts those of noisy steps",
            "train ResGen on it, e.g. --recipe resgen-digits; or make codes by a noisy tokenizer, e.g. --recipe digits",
        )
    if family == "resgen" and (kind != "rvq" or bias != "none"):
        raise UsageError(
            f"{where} holds codes of schedule {kind} with bias {bias}, and ResGen needs plain residual quantisation: "
            "codes that fit noise, or a sum that is not the embeddings', cannot be requantised",
            "train a tokenizer with schedule.kind=rvq quantizer.bias=none, e.g. `rdpm train-tokenizer IMAGES --recipe "
            "resgen-digits`, and tokenize again; or train RDPM on it, e.g. --recipe digits",
        )


def find_kernel(cfg: GeneratorConfig, device: str) -> Kernel:
    """The attention of the recipe. Raises UsageError where flash-attn, or what it needs, is not here."""
    if cfg.attention == "sdpa":
        return transformer.sdpa
    if device == "cpu" or not torch.cuda.is_available() or cfg.train.precision != "bf16":
        raise UsageError(
            "attention=flash runs in bf16 on a CUDA device", "give train.precision=bf16, or attention=sdpa"
        )
    return transformer.flash()


def prepare(generator: Generator, cfg: GeneratorConfig, kernel: Kernel) -> None:
    """How it is trained: with which attention, and whether the blocks' activations are kept."""
    trunk = transformer.trunk_of(generator.network)
    trunk.use(kernel)
    trunk.recompute = cfg.recompute


def parameters(generator: Generator) -> int:
    """Trainable parameters of the generator alone, without tokenizer and EMA."""
    return sum(p.numel() for p in generator.network.parameters())


def pack(
    generator: Generator, cfg: GeneratorConfig, tokenizer: dict[str, Any], class_names: list[str], **more: Any
) -> dict[str, Any]:
    """The content of a generator file. tokenizer: the content of its file. more: provenance.

    The sampling defaults stand beside the config, outside the digest: tuned ones make no other model.
    """
    config = {
        **cfg.model_dump(mode="json", include=set(GeneratorArchitecture.model_fields)),
        "classes": len(class_names),
        "tokenizer": tokenizer["digest"],
    }
    beside: dict[str, Any] = {"class_names": class_names, "sampling": cfg.sampling.model_dump(mode="json")}
    return modelfile.pack(KIND, config, generator.network, tokenizer=tokenizer, **beside, **more)


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
        """Move both networks. compiled: as the sampling options' `compile`."""
        self.generator.network.to(device)
        self.tokenizer.to(device)
        if compiled != "off":
            self.generator.network.compile(mode="reduce-overhead" if compiled == "graphs" else "default")
        return self


def load(path: Path) -> LoadedGenerator:
    """The generator of a file, frozen, in evaluation mode. Raises CheckpointError."""
    content = modelfile.load(path, KIND)
    modelfile.check(content.get("tokenizer"), f"the tokenizer inside {path}", tokenizer_file.KIND)
    tokenizer = tokenizer_file.unpack(content["tokenizer"], f"the tokenizer inside {path}")
    config = dict(content["config"])
    classes = config.pop("classes")
    if config.pop("tokenizer") != content["tokenizer"]["digest"]:
        raise CheckpointError(f"{path} carries another tokenizer than it was trained with", "copy or make it again")
    family = FAMILIES.get(config["family"])
    if family is None:
        raise CheckpointError(f"{path} is of the family {config['family']}, which this rdpm does not know")
    before = config.pop("sampling", None)  # where files of 0.1.0 have it
    generator = build(modelfile.config_of(family.architecture, config, str(path)), tokenizer, classes)
    modelfile.fill(generator.network, content, str(path))
    sampling = _sampling(family.sampling, content.get("sampling", before), path)
    generator.network.eval().requires_grad_(False)
    return LoadedGenerator(
        generator, tokenizer, sampling, content["class_names"], content["digest"], content["provenance"]
    )


def _sampling(section: type[SamplingConfig], recorded: Any, path: Path) -> SamplingConfig:
    """The sampling defaults of a file; where it has none, those of the family's section, which is said."""
    if recorded is None:
        chosen = ", ".join(f"{name}={value}" for name, value in section().model_dump(exclude_none=True).items())
        progress.say(f"{path} records no sampling options; the defaults are taken: {chosen}")
        return section()
    return modelfile.config_of(section, recorded, str(path))

"""Building generators, and their files. A generator's file carries its tokenizer, so `rdpm sample` needs no more."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rdpm_cli import modelfile, progress
from rdpm_cli.config import GeneratorArchitecture, GeneratorConfig, RDPMSampling, SamplingConfig
from rdpm_cli.errors import CheckpointError, UsageError
from rdpm_cli.generator import transformer
from rdpm_cli.generator.contract import Generator
from rdpm_cli.generator.rdpm import RDPM
from rdpm_cli.generator.transformer import Kernel
from rdpm_cli.tokenizer import model as tokenizer_file
from rdpm_cli.tokenizer.model import Tokenizer

KIND = "rdpm-generator"
FAMILIES: dict[str, Callable[..., Generator]] = {"rdpm": RDPM}
SAMPLING: dict[str, type[SamplingConfig]] = {"rdpm": RDPMSampling}


def build(cfg: GeneratorArchitecture, tokenizer: Tokenizer, classes: int) -> Generator:
    """A fresh generator of the recipe's family over a tokenizer's codes."""
    return FAMILIES[cfg.family](cfg, tokenizer.quantizer, tokenizer.cfg.autoencoder.grid, classes)


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
    trunk = generator.network.get_submodule("trunk")
    assert isinstance(trunk, transformer.Transformer)
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
    fields = GeneratorArchitecture.model_fields
    architecture = GeneratorArchitecture(**{name: getattr(cfg, name) for name in fields})
    config = {
        **architecture.model_dump(mode="json"),
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
    before = config.pop("sampling", None)  # where files of 0.1.0 have it
    architecture = modelfile.config_of(GeneratorArchitecture, config, str(path))
    generator = build(architecture, tokenizer, classes)
    modelfile.fill(generator.network, content, str(path))
    sampling = _sampling(SAMPLING[architecture.family], content.get("sampling", before), path)
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

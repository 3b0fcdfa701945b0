"""The recipe's schema: one frozen class a component. `recipe_files.py` reads the files. Torch-free.

The field is the single source of an option: recipe key, override, help, manifest entry and error all derive from it.
"""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from rdpm_cli import files
from rdpm_cli.config.base import Section
from rdpm_cli.config.generator import (
    GeneratorArchitecture,
    GeneratorConfig,
    NetworkConfig,
    ObjectiveConfig,
    ProxyConfig,
    RDPMArchitecture,
    RDPMConfig,
    RDPMSampling,
    SamplingConfig,
    TransformerConfig,
)
from rdpm_cli.config.resgen import (
    ResGenArchitecture,
    ResGenConfig,
    ResGenNetwork,
    ResGenObjective,
    ResGenSampling,
)
from rdpm_cli.config.tokenizer import (
    AutoencoderConfig,
    DiscriminatorConfig,
    QuantizerConfig,
    ScheduleConfig,
    TokenizerArchitecture,
    TokenizerConfig,
    TokenizerLossConfig,
)
from rdpm_cli.config.train import CHANGEABLE_ON_RESUME, FREE_ON_RESUME, LOOKS, TrainConfig, binding

__all__ = [
    "CHANGEABLE_ON_RESUME",
    "FAMILIES",
    "FREE_ON_RESUME",
    "LOOKS",
    "AutoencoderConfig",
    "DiscriminatorConfig",
    "GeneratorArchitecture",
    "GeneratorConfig",
    "JudgeConfig",
    "NetworkConfig",
    "ObjectiveConfig",
    "ProxyConfig",
    "QuantizerConfig",
    "RDPMArchitecture",
    "RDPMConfig",
    "RDPMSampling",
    "Recipe",
    "ResGenArchitecture",
    "ResGenConfig",
    "ResGenNetwork",
    "ResGenObjective",
    "ResGenSampling",
    "SamplingConfig",
    "ScheduleConfig",
    "Section",
    "TokenizerArchitecture",
    "TokenizerConfig",
    "TokenizerLossConfig",
    "TrainConfig",
    "TransformerConfig",
    "binding",
    "family_of",
]

FAMILIES: dict[str, type[GeneratorConfig]] = {"rdpm": RDPMConfig, "resgen": ResGenConfig}


def family_of(generator: Any) -> str | None:
    """The family that a generator section, plain or validated, names; RDPM where it names none."""
    named = generator.get("family", "rdpm") if isinstance(generator, dict) else getattr(generator, "family", None)
    return named if isinstance(named, str) else None


AnyGenerator = Annotated[
    Annotated[RDPMConfig, Tag("rdpm")] | Annotated[ResGenConfig, Tag("resgen")],
    Discriminator(
        family_of,
        custom_error_type="family",
        custom_error_message=f"family is one of {', '.join(FAMILIES)}",
    ),
]


class JudgeConfig(Section):
    """A small classifier of real images, an honest extractor where Inception says little."""

    width: int = Field(32, gt=0, multiple_of=8, description="channels of the first layer")
    blocks: int = Field(0, ge=0, description="residual blocks after each halving; 1 or 2 for photographs")
    features: int = Field(64, gt=0, description="width of the penultimate layer")
    flip: bool = Field(False, description="mirror training images at random; not for digits and letters")
    train: TrainConfig


class Recipe(Section):
    """The whole way. A recipe may hold only the parts its commands need."""

    name: str = Field("", description="default: the file's name")
    seed: int = Field(0, ge=0, lt=2**63, description="of training and of the store's noise")
    classes: int = Field(1000, gt=0, description="for `rdpm inspect` alone; training counts the store's own")
    views: int = Field(1, ge=1, description="noise draws an image that the demo keeps in its store")
    tokenizer: TokenizerConfig | None = Field(None, description="for train-tokenizer")
    generator: AnyGenerator | None = Field(None, description="for train-gen")
    judge: JudgeConfig | None = Field(None, description="for eval judge and the demo")

    def digest(self) -> str:
        """sha256 of the resolved recipe."""
        return files.digest(self.model_dump(mode="json"))

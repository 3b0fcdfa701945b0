"""The ResGen family (arXiv 2412.10208): network, objective, sampling."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from rdpm_cli.choices import MaskSchedule
from rdpm_cli.config.base import Section
from rdpm_cli.config.generator import GeneratorArchitecture, GeneratorConfig, SamplingConfig, TransformerConfig

GAMMA = "gamma(r), the share masked: 1-r²; cos(pi r/2); sqrt(1-r²); 1-N^(r-1); 1-r"


class ResGenNetwork(TransformerConfig):
    """ResGen's network: the transformer and its head."""

    mixtures: int = Field(1024, ge=1, description="Gaussians of the mixture a position")
    rank: int = Field(16, ge=1, description="r, of what a position adds to the shared means")
    count_embed: bool = Field(True, description="tell each position how many of its depths are visible")
    ratio_cond: bool = Field(True, description="tell the condition which share of all tokens is masked")
    target: Literal["cumulative", "direct"] = Field(
        "cumulative", description="the sum of the masked embeddings by the mixture; direct: each depth's token"
    )


class ResGenArchitecture(GeneratorArchitecture):
    """What rebuilds ResGen's."""

    family: Literal["resgen"] = Field("resgen", description="generator family")
    network: ResGenNetwork = ResGenNetwork()


class ResGenObjective(Section):
    """How tokens are masked in training, and what is asked of the head."""

    schedule: MaskSchedule = Field("square", description=GAMMA)
    order: Literal["coarse-to-fine", "random"] = Field(
        "coarse-to-fine", description="which depths are masked: the finest first, or any (a baseline)"
    )
    mog_loss: Literal["split", "nll", "clam"] = Field(
        "split", description="bound of the mixture's likelihood: classification + regression; exact; CLaM-TTS's"
    )
    detach_resp: bool = Field(True, description="no gradient through the responsibilities of split's classification")
    sigma_psi: float | None = Field(None, gt=0, description="RMS of what quantisation leaves; default: measured")
    label_drop: float = Field(0.1, ge=0, le=1, description="probability of the null class")


class ResGenSampling(SamplingConfig):
    """How ResGen samples."""

    family: ClassVar[str] = "resgen"
    effective_with: ClassVar[Mapping[str, tuple[str, Sequence[str]]]] = {
        "conf_temp": ("conf", ("logp", "comp")),
        "conf_anneal": ("conf", ("logp", "comp")),
    }
    search: ClassVar[Mapping[str, Sequence[Any]]] = {
        **SamplingConfig.search,
        "top_p": (0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        "z_temp": (0.6, 0.8, 0.9, 1.0),
        "conf_temp": (0.5, 1.0, 2.0),
    }

    steps: int = Field(8, ge=1, description="S, forward passes, whatever the depth T")
    schedule: MaskSchedule = Field("square", description=f"as in training, or another: {GAMMA}")
    top_p: float = Field(1.0, gt=0, le=1, description="components of the smallest set that holds this probability")
    z_temp: float = Field(1.0, ge=0, description="factor of the drawn component's scale")
    conf: Literal["logp", "comp", "rand"] = Field(
        "logp", description="what is revealed first: likely vectors (z-scored), likely components, any"
    )
    conf_temp: float = Field(1.0, ge=0, description="factor of the Gumbel noise on the confidence")
    conf_anneal: bool = Field(True, description="that noise falls to 0 at the last step")
    cfg_schedule: Literal["constant", "linear"] = Field("linear", description="linear: 0 at step 1, lambda at step S")
    cfg_mode: Literal["both", "logits"] = Field("both", description="guide weights and means, or weights alone")


class ResGenConfig(ResGenArchitecture, GeneratorConfig):
    """A ResGen generator."""

    objective: ResGenObjective = ResGenObjective()
    sampling: ResGenSampling = ResGenSampling()

    @property
    def uses_latents(self) -> bool:
        """What quantisation leaves of them is measured."""
        return self.objective.sigma_psi is None

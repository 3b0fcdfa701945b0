"""The configs of all generator families: network, objective, training and sampling defaults."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rdpm_cli.errors import UsageError
from rdpm_cli.schema import FileName, Section, Share, added, validate
from rdpm_cli.training.config import TrainConfig

Presets = Mapping[str, Mapping[str, Any]]  # named sets of a family's fields
Search = Mapping[str, Sequence[Any]]  # the fields, and the values of each, that `rdpm tune-sampling` tries, in order
Effective = Mapping[str, tuple[str, Sequence[str]]]  # fields that act only while another has one of these values
MaskSchedule = Literal["square", "cosine", "circle", "exp", "linear"]
UnitShare = Annotated[float, Field(ge=0, le=1)]
ALL_CODES = {"skip_steps": 0, "top_k": 0, "top_p": 1.0}  # each step draws, among all codes
GAMMA = "gamma(r), the masked share: 1-r²; cos(pi r/2); sqrt(1-r²); 1-N^(r-1); 1-r"


class TransformerConfig(Section):
    """The transformer that the families share."""

    depth: int = Field(16, gt=0, description="transformer blocks")
    width: int | None = Field(None, gt=0, description="D; default 64 × depth (Table 1)")
    heads: int | None = Field(None, gt=0, description="attention heads; default depth")
    positions: Literal["rope", "learned", "both"] = Field("rope", description="RoPE on each axis, a table, or both")
    class_latents: bool = Field(False, description="a learned C-vector a class and position, added to the input")
    class_tokens: int = Field(0, ge=0, description="in-context tokens a class, dropped before the head")
    mlp: Literal["rounded", "exact"] = added("rounded", "SwiGLU's width 8D/3 in whole 64s, or int(8D/3)")
    qk_norm: bool = Field(False, description="RMSNorm of queries and keys, a head at a time")
    align: Literal["durations", "cross"] = added(
        "durations", "of speech: units last as long as their durations say, or attention to the text finds them"
    )
    text_depth: Annotated[int, Field(ge=0)] = added(4, "transformer layers of the text encoder of align: cross")

    @property
    def hidden(self) -> int:
        """D, the width of the residual stream."""
        return self.width or 64 * self.depth

    @property
    def mlp_width(self) -> int:
        """The hidden width of SwiGLU. With D = 64·depth both meet Table 1 within 1%, `exact` within 0.4%."""
        D = self.hidden
        return int(8 * D / 3) if self.mlp == "exact" else max(1, round(8 * D / 3 / 64)) * 64

    @model_validator(mode="after")
    def _whole_pairs(self) -> Self:
        heads = self.heads or self.depth  # RoPE turns pairs of numbers, and on two axes half of the pairs each.
        if self.hidden % (4 * heads):
            raise ValueError(f"width / heads must be a multiple of 4, not {self.hidden} / {heads}")
        return self


class SamplingConfig(Section):
    """Defaults of `rdpm sample`, recorded in the checkpoint: the fields of every family."""

    family: ClassVar[str] = ""
    presets: ClassVar[Presets] = {}
    guided: ClassVar[frozenset[str]] = frozenset()  # the presets that have no effect without a lambda
    search: ClassVar[Search] = {"cfg": (0.0, 0.25, 0.5, 1.0, 1.5, 2.5, 4.0)}
    effective_with: ClassVar[Effective] = {}

    cfg: float = Field(0.0, ge=0, description="lambda of guidance; 0 = off")
    micro_batch: int = Field(8, gt=0, description="images a forward pass; part of what fixes a sample on the CPU")
    gpu_micro_batch: int = Field(64, gt=0, description="the same on a GPU, halved where its memory is too small")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of network and decoder on a GPU; CPUs take fp32")
    channels_last: bool = Field(False, description="memory layout of the decoder's convolutions")
    compile: Literal["off", "default", "graphs"] = Field("off", description="torch.compile; graphs: with CUDA graphs")

    def images_at_once(self, device_type: str) -> int:
        return self.micro_batch if device_type == "cpu" else self.gpu_micro_batch

    def changed(self, preset: str | None, requested: Mapping[str, Any]) -> Self:
        """These options, with a preset's over them and the requested ones over both.

        Raises UsageError for a preset or an option that the family does not have, and for an option without effect."""
        if preset is not None and preset not in self.presets:
            names = ", ".join(self.presets) or "none"
            raise UsageError(f"--preset {preset}: this checkpoint's family has no such preset", f"it has {names}")
        if unknown := [name for name in requested if name not in type(self).model_fields]:
            message = f"{unknown[0]} is not a sampling option of {self.family}, this checkpoint's family"
            raise UsageError(message, f"it has {', '.join(type(self).model_fields)}")
        values = {**self.model_dump(), **(self.presets[preset] if preset else {}), **requested}
        options = validate(type(self), values, "sampling options")
        if preset in self.guided and options.cfg == 0 and "cfg" not in requested:
            message = f"--preset {preset} needs guidance, and the lambda of this checkpoint is 0"
            raise UsageError(message, f"write --preset {preset} cfg=1.5")
        for name, (switch, effective) in self.effective_with.items():
            value = getattr(options, switch)
            if name in requested and value not in effective:
                message = f"{name} has no effect with {switch}={value}"
                raise UsageError(message, f"leave it out, or give {switch}={' or '.join(effective)}")
        return options


def guidance_fault(label_drop: float | None, classes: int | None = None) -> str:
    """Why a generator cannot be guided, by its training and its number of classes; empty if it can. None: unknown."""
    if classes == 1:
        return "guidance compares a class with all of them, and there is only one"
    if label_drop in (0, 1):  # the rate of the null class; the rest are the classes
        unseen = "the classes" if label_drop else "the null class"
        return f"guidance compares with the null class, and training with label_drop={label_drop:g} never saw {unseen}"
    return ""


class ProxyConfig(Section):
    """A score of a few samples while a generator trains: for comparing steps of one run, not for reporting."""

    samples: int = Field(0, ge=0, description="class-balanced, drawn from fixed seeds every train.eval_every; 0 = off")
    extractor: FileName | None = Field(None, description="as --extractor; default: Inception")
    weights: FileName | None = Field(None, description="its weight file, as --weights; default: looked up")


class ObjectiveConfig(Section):
    """What every family's training has."""

    label_drop: float = Field(0.1, ge=0, le=1, description="probability of the null class, or of no text")


class SpokenObjective(ObjectiveConfig):
    """Of the families that learn sound, too."""

    prompt: UnitShare = added(0.8, "share of sounds that begin with a known prompt")
    span: UnitShare = added(0.0, "share of these whose end is known, too, for editing; with align: cross")
    sorted_steps: Annotated[int, Field(ge=1)] = added(
        1, "steps whose rows of sound are sorted by length, so that batches have little padding"
    )


class GeneratorConfig(Section):
    """The fields of every family. family and network travel in the checkpoint: with the tokenizer they rebuild it."""

    family: str = Field(description="generator family")
    network: TransformerConfig
    attention: Literal["sdpa", "flash"] = Field("sdpa", description="in training; flash: the flash-attn package")
    recompute: bool = Field(False, description="activation checkpointing: each block's again in the backward pass")
    objective: ObjectiveConfig
    train: TrainConfig
    sampling: SamplingConfig
    proxy: ProxyConfig = ProxyConfig()

    @model_validator(mode="after")
    def _default_guidance_is_trained(self) -> Self:
        if self.sampling.cfg and (fault := guidance_fault(self.objective.label_drop)):
            raise ValueError(f"sampling.cfg={self.sampling.cfg:g}: {fault}; give sampling.cfg=0")
        return self

    @model_validator(mode="after")
    def _spans_are_of_cross_attention(self) -> Self:
        if getattr(self.objective, "span", 0) and self.network.align != "cross":
            raise ValueError("objective.span needs network.align=cross")
        return self

    @property
    def uses_latents(self) -> bool:
        """Whether training reads latents, so that the store should keep them."""
        return False


class NetworkConfig(TransformerConfig):
    head: Literal["linear", "geometric"] = Field("linear", description="geometric also predicts z and scores by it")
    eps_input: bool = added(True, "eps_t is an input; codes of schedule rvq do not depend on it")
    guidance: Annotated[float, Field(ge=0)] = added(
        0.0, "largest lambda that is an input, to be guided by one pass; 0: guided by two"
    )


class RDPMObjective(SpokenObjective):
    """How RDPM's training batch is drawn from the code store."""

    noise: Literal["cached", "fresh", "fresh-from-codes"] = Field(
        "cached", description="the store's draws; new ones on its latents z; new ones on z'_T of its codes"
    )
    steps_per_image: int = Field(1, ge=1, description="values of t an image and step; loss rows = batch × this")
    t_weights: Literal["uniform", "alpha"] = Field("uniform", description="t drawn uniformly, or ~ alpha_t + 0.2")
    perturb: float = Field(0.0, ge=0, description="a in z' + a·U·N(0,1), one U an image, targets unchanged")


class DrawnSampling(SamplingConfig):
    """Of the families that draw codes from logits."""

    draw: Literal["gumbel", "inverse", "argmax"] = Field(
        "gumbel", description="argmax of logits + Gumbel noise; the same by one uniform a position; the likeliest code"
    )
    tau: float = Field(1.0, gt=0, description="inverse temperature: 1 samples exactly, larger is greedier")
    top_k: int = Field(0, ge=0, description="draw among the k likeliest codes; 0 = all")
    top_p: float = Field(1.0, gt=0, le=1, description="draw among the fewest codes of at least this probability")


class RDPMSampling(DrawnSampling):
    family: ClassVar[str] = "rdpm"
    # The rows of the paper's Table 3. lambda and tau are not among them, since each network has its own best ones.
    presets: ClassVar[Presets] = {
        "raw": {"cfg": 0.0, "draw": "argmax", **ALL_CODES},
        "cfg": {"cfg_schedule": "constant", "draw": "argmax", **ALL_CODES},
        "cfg-linear": {"cfg_schedule": "linear", "draw": "argmax", **ALL_CODES},
        "gumbel": {"cfg_schedule": "linear", "draw": "gumbel", **ALL_CODES},
    }
    guided: ClassVar[frozenset[str]] = frozenset(("cfg", "cfg-linear"))
    search: ClassVar[Search] = {
        **SamplingConfig.search, "cfg_schedule": ("constant", "linear", "cosine", "power"),
        "tau": (0.9, 1.0, 1.1, 1.25, 1.5, 2.0), "skip_steps": (0, 1, 2, 3, 4),
    }  # fmt: skip
    effective_with: ClassVar[Effective] = {
        "cfg_power": ("cfg_schedule", ("power",)),
        **dict.fromkeys(("cfg_first", "cfg_last"), ("cfg_schedule", ("interval",))),
        **dict.fromkeys(("tau", "tau_end", "top_k", "top_p"), ("draw", ("gumbel", "inverse"))),
    }

    cfg_schedule: Literal["constant", "linear", "cosine", "power", "interval"] = Field(
        "linear", description="lambda_t over t: linear, cosine and power rise from 0 at t = 1 to lambda at t = T"
    )
    cfg_power: float = Field(2.0, gt=0, description="exponent of the power schedule; 1 is linear")
    cfg_first: int = Field(1, ge=1, description="first step with guidance, of the interval schedule")
    cfg_last: int | None = Field(None, ge=1, description="its last one; default T")
    tau_schedule: Literal["constant", "linear"] = Field("constant", description="tau over t; linear ends at tau_end")
    tau_end: float | None = Field(None, gt=0, description="tau at t = T of the linear schedule")
    skip_steps: int = Field(0, ge=0, description="first steps taken from the model-free guess, no network call")
    guide: FileName | None = added(None, "weaker checkpoint, or RUN@STEP, in place of the null class")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.tau_schedule == "linear") != (self.tau_end is not None):
            raise ValueError("tau_schedule=linear and tau_end go together")
        if self.guide and not self.cfg:
            raise ValueError("guide needs a lambda; give cfg=0.5")
        if self.cfg_last is not None and self.cfg_last < self.cfg_first:
            raise ValueError(f"no step is guided from step {self.cfg_first} to {self.cfg_last}; cfg=0 turns it off")
        return self


class RDPMConfig(GeneratorConfig):
    family: Literal["rdpm"] = Field("rdpm", description="generator family")
    network: NetworkConfig = NetworkConfig()
    objective: RDPMObjective = RDPMObjective()
    sampling: RDPMSampling = RDPMSampling()

    @model_validator(mode="after")
    def _guidance_is_learnt_and_guides_are_given(self) -> Self:
        if self.network.guidance and (fault := guidance_fault(self.objective.label_drop)):
            raise ValueError(f"network.guidance={self.network.guidance:g}: {fault}")
        if self.sampling.guide:
            raise ValueError(f"sampling.guide={self.sampling.guide}: a guide is for sampling; give it to `rdpm sample`")
        return self

    @property
    def uses_latents(self) -> bool:
        return self.objective.noise == "fresh"


class ResGenNetwork(TransformerConfig):
    mixtures: int = Field(1024, ge=1, description="Gaussians of the mixture a position")
    rank: int = Field(16, ge=1, description="r, of what a position adds to the shared means")
    count_embed: bool = Field(True, description="tell each position how many of its depths are visible")
    ratio_cond: bool = Field(True, description="tell the condition which share of all tokens is masked")
    target: Literal["cumulative", "direct"] = Field("cumulative", description="the masked sum, or each depth's token")


class ResGenObjective(SpokenObjective):
    """How tokens are masked in training, and the loss of the head."""

    schedule: MaskSchedule = Field("square", description=GAMMA)
    order: Literal["coarse-to-fine", "random"] = Field("coarse-to-fine", description="masked: the finest first, or any")
    mog_loss: Literal["split", "nll", "clam"] = Field("split", description="classification + regression; exact; CLaM's")
    detach_resp: bool = Field(True, description="no gradient through the responsibilities of split's classification")
    sigma_psi: float | None = Field(None, gt=0, description="RMS of the quantisation error; default: measured")


class MaskedSampling(SamplingConfig):
    """Of the families that reveal masked tokens."""

    steps: int = Field(8, ge=1, description="S, forward passes, whatever the depth T")
    schedule: MaskSchedule = Field("square", description=f"as in training, or another: {GAMMA}")
    conf_temp: float = Field(1.0, ge=0, description="factor of the Gumbel noise on the confidence")
    conf_anneal: bool = Field(True, description="that noise falls to 0 at the last step")
    cfg_schedule: Literal["constant", "linear"] = Field("linear", description="linear: 0 at step 1, lambda at step S")


class ResGenSampling(MaskedSampling):
    family: ClassVar[str] = "resgen"
    effective_with: ClassVar[Effective] = dict.fromkeys(("conf_temp", "conf_anneal"), ("conf", ("logp", "comp")))
    search: ClassVar[Search] = {
        **SamplingConfig.search, "top_p": (0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        "z_temp": (0.6, 0.8, 0.9, 1.0), "conf_temp": (0.5, 1.0, 2.0),
    }  # fmt: skip

    top_p: float = Field(1.0, gt=0, le=1, description="components of the smallest set that holds this probability")
    z_temp: float = Field(1.0, ge=0, description="factor of the drawn component's scale")
    conf: Literal["logp", "comp", "rand"] = Field("logp", description="revealed first: likely vectors, components; any")
    cfg_mode: Literal["both", "logits"] = Field("both", description="guide weights and means, or only the weights")


class ResGenConfig(GeneratorConfig):
    family: Literal["resgen"] = Field("resgen", description="generator family")
    network: ResGenNetwork = ResGenNetwork()
    objective: ResGenObjective = ResGenObjective()
    sampling: ResGenSampling = ResGenSampling()

    @property
    def uses_latents(self) -> bool:
        return self.objective.sigma_psi is None


class MaskGITObjective(ObjectiveConfig):
    """How tokens are masked in training: any, at gamma(r) of a uniform r."""

    order: ClassVar[str] = "random"

    schedule: MaskSchedule = Field("cosine", description=GAMMA)
    label_smoothing: Share = Field(0.0, description="share of the target that all codes have alike; the paper's is 0.1")


class MaskGITSampling(MaskedSampling):
    family: ClassVar[str] = "maskgit"
    search: ClassVar[Search] = {
        **SamplingConfig.search, "conf_temp": (1.0, 2.0, 4.5, 8.0), "tau": (0.9, 1.0, 1.1, 1.25),
    }  # fmt: skip

    schedule: MaskSchedule = Field("cosine", description=f"as in training, or another: {GAMMA}")
    conf_temp: float = Field(4.5, ge=0, description="factor of the Gumbel noise on the confidence")
    tau: float = Field(1.0, gt=0, description="inverse temperature of the codes: 1 samples exactly")


class MaskGITConfig(GeneratorConfig):
    family: Literal["maskgit"] = Field("maskgit", description="generator family")
    network: TransformerConfig = TransformerConfig()
    objective: MaskGITObjective = MaskGITObjective()
    sampling: MaskGITSampling = MaskGITSampling()


class ARNetworkConfig(TransformerConfig):
    depth_layers: int = Field(
        0, ge=0, description="0: one sequence of all tokens; else a position a token, and a transformer over its depths"
    )


class ARSampling(DrawnSampling):
    family: ClassVar[str] = "ar"
    search: ClassVar[Search] = {
        **SamplingConfig.search, "tau": (0.9, 1.0, 1.1, 1.25, 1.5), "top_p": (0.8, 0.9, 0.95, 1.0),
    }  # fmt: skip
    effective_with: ClassVar[Effective] = dict.fromkeys(("tau", "top_k", "top_p"), ("draw", ("gumbel", "inverse")))


class ARConfig(GeneratorConfig):
    family: Literal["ar"] = Field("ar", description="generator family")
    network: ARNetworkConfig = ARNetworkConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    sampling: ARSampling = ARSampling()


class FlowSampling(SamplingConfig):
    family: ClassVar[str] = "flow"

    steps: int = Field(50, ge=1, description="steps of the solver from noise to latents")
    solver: Literal["euler", "heun"] = Field("euler", description="heun: two passes a step")


class FlowConfig(GeneratorConfig):
    family: Literal["flow"] = Field("flow", description="generator family")
    network: TransformerConfig = TransformerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    sampling: FlowSampling = FlowSampling()

    @property
    def uses_latents(self) -> bool:
        return True

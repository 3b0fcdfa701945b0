"""The training section of a recipe: what the one loop needs, and which of it a resumed run may change."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rdpm_cli.schema import Section, Share

# Fields of `train` that a run may change when it resumes, since no step depends on them. micro_batch, compile and
# channels_last are not among them: they change the order of floating-point sums.
FREE_ON_RESUME = {"keep", "log_every", "eval_every", "save_every", "workers", "skip_bad"}
# They change the result, but an unfinished run that diverges must be able to go on. run.json records the change.
CHANGEABLE_ON_RESUME = {"lr", "clip"}
# Fields outside `train` that only observe the run, or say where the data lie: their digests bind it.
OBSERVING = {"codebook_alarm", "proxy", "source", "heldout"}


class TrainConfig(Section):
    """Length, optimiser, precision and bookkeeping of a training, the same for every task."""

    batch: int = Field(128, gt=0, description="images a step, over all processes")
    micro_batch: int | None = Field(None, gt=0, multiple_of=16, description="images at once; gradients accumulate")
    steps: int | None = Field(None, gt=0, description="optimiser steps; or give epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the images; or give steps")
    lr: float = Field(4e-5, gt=0, description="learning rate after warm-up")
    lr_decay: Literal["constant", "cosine"] = Field("constant", description="after warm-up; cosine ends at 0")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up, in steps")
    warmup_epochs: float = Field(0.0, ge=0, description="linear warm-up, in epochs (added to warmup_steps)")
    betas: tuple[Share, Share] = Field((0.9, 0.95), description="of AdamW")
    weight_decay: float = Field(0.0, ge=0, description="not on embeddings, norms and biases")
    clip: float = Field(0.0, ge=0, description="largest gradient norm; 0 = off")
    ema: float | Literal["power"] = Field(
        0.0, description="decay of the weights' average; 0 = off; power: EDM2's, sigma_rel 0.10, others by `rdpm ema`"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="autocast of the network; quantiser and losses fp32")
    channels_last: bool = Field(False, description="memory layout of convolutions, faster on GPUs")
    compile: bool = Field(False, description="torch.compile the networks")
    skip_bad: int = Field(0, ge=0, description="steps with a non-finite loss that are skipped before the run fails")
    workers: int = Field(0, ge=0, description="processes that prepare batches")
    log_every: int = Field(50, gt=0, description="steps between lines in metrics.jsonl")
    eval_every: int = Field(0, ge=0, description="steps between held-out evaluations and previews; 0 = at the end only")
    save_every: int = Field(1000, gt=0, description="steps between checkpoints")
    keep: int = Field(3, ge=2, description="checkpoints kept")

    @field_validator("ema", mode="before")  # a union's own errors would name its members after the key
    @classmethod
    def _decay_or_power(cls, value: Any) -> Any:
        if value == "power" or (isinstance(value, float | int) and 0 <= value < 1):
            return value
        raise ValueError("expected a decay, 0 or more and below 1, or power")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self

    @property
    def accumulates(self) -> bool:
        """Whether a step's gradients come from several micro-batches."""
        return self.micro_batch is not None and self.micro_batch < self.batch

    def total_steps(self, images: int) -> int:
        """Optimiser steps on a data set of this many images."""
        return self.steps or max(1, round((self.epochs or 0) * images / self.batch))

    def warmup(self, images: int) -> int:
        """Warm-up steps on a data set of this many images."""
        return self.warmup_steps + round(self.warmup_epochs * images / self.batch)


def binding(settings: dict[str, Any], finished: bool = False) -> dict[str, Any]:
    """A run's settings without the fields that may change on resume, in every `train` section and outside it."""
    bound = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            free = FREE_ON_RESUME | (set() if finished else CHANGEABLE_ON_RESUME) if name == "train" else OBSERVING
            value = {key: inner for key, inner in binding(value, finished).items() if key not in free}
        bound[name] = value
    return bound

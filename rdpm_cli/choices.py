"""Names that the command line and the recipes share. Free of pydantic, which `--help` need not import."""

from typing import Literal

CfgSchedule = Literal["constant", "linear", "cosine", "power", "interval"]  # lambda_t of guidance
Draw = Literal["gumbel", "inverse", "argmax"]  # how a code is drawn from its logits
MaskSchedule = Literal["square", "cosine", "circle", "exp", "linear"]  # gamma(r) of ResGen

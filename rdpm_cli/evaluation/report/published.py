"""Published figures, each with where it stands. Only what this project's own documents quote; nothing from memory.

Tables 3 and 4 of arXiv 2412.18390 are named by the project's documents without their figures, so they have no row.
"""

from dataclasses import dataclass
from typing import Literal

INCEPTION = "inception-2015-12-05"
IMAGENET = "imagenet"
RDPM = "arXiv 2412.18390"
RESGEN = "arXiv 2412.10208, by summaries of it"
ADM = "ADM, evaluations/README.md: admnet_guided_upsampled_imagenet256.npz"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A figure of a paper or code release.

    quoted: the figure as it stands there. of: which of our scores stand beside it; `other` for another method, beside
    which ours are not put. n, extractor, data: what it was computed with; None and "" where the source does not say.
    depth: of the generator. note: what a reader should know.
    """

    source: str
    what: str
    metric: str
    quoted: str
    of: Literal["generator", "tokenizer", "evaluator", "other"]
    n: int | None = None
    extractor: str = ""
    data: str = ""
    depth: int | None = None
    note: str = ""

    @property
    def value(self) -> float:
        """The figure as a number."""
        return float(self.quoted.removesuffix("M")) * (1e6 if self.quoted.endswith("M") else 1)


def _parameters(depth: int, quoted: str) -> Published:
    what = f"generator, depth {depth}"
    return Published(
        source=f"{RDPM}, Table 1", what=what, metric="parameters", quoted=quoted, of="generator", depth=depth
    )


def _adm(metric: str, quoted: str) -> Published:
    return Published(
        source=ADM, what="what an evaluator should find", metric=metric, quoted=quoted, of="evaluator", n=50_000,
        extractor=INCEPTION, data=IMAGENET,
    )  # fmt: skip


def _resgen(what: str, quoted: str) -> Published:
    return Published(source=RESGEN, what=what, metric="fid", quoted=quoted, of="other", data=IMAGENET)


PUBLISHED = (
    _parameters(12, "133M"),
    _parameters(16, "310M"),
    _parameters(20, "602M"),
    Published(
        source=f"{RDPM}, Table 2", what="tokenizer", metric="psnr", quoted="29.97", of="tokenizer", data=IMAGENET,
        note="its data range is not stated; 2 instead of 1 would add 6.02 dB, and fits the SSIM beside it",
    ),
    Published(source=f"{RDPM}, Table 2", what="tokenizer", metric="ssim", quoted="0.62", of="tokenizer", data=IMAGENET),
    _adm("fid", "3.943"),
    _adm("sfid", "6.140"),
    _adm("inception_score", "215.84"),
    _adm("precision", "0.8265"),
    _adm("recall", "0.5309"),
    _resgen("ResGen-rvq16, 576M, 63 steps, with guidance", "1.93"),
    _resgen("ResGen d16 (first version), 574M, with guidance", "1.95"),
    _resgen("ResGen d16 (first version), 574M, without guidance", "6.04"),
    _resgen("ResGen d8 (first version), 574M, with guidance", "2.71"),
    _resgen("ResGen d8 (first version), 574M, without guidance", "6.56"),
    Published(source="VAR, its paper", what="VAR-d16", metric="fid", quoted="3.30", of="other", data=IMAGENET),
    Published(source="VAR, its README", what="VAR-d16", metric="fid", quoted="3.55", of="other", data=IMAGENET),
)  # fmt: skip

"""The papers' experiments: what each is run on, and the cells of each table. `run.py` runs them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

Chain = Literal["images", "strings", "voices"]  # of commands; the others are in speech.py and voices.py
Words = tuple[str, ...]
Command = tuple[str | Path, ...]
OUT = "OUT"  # among the words of a command: the path that it writes

# The paper's tokenizer (section 4.2, Table 2 row 9) and its generator: every option beyond the paper off.
TOKENIZER: Words = (
    "schedule.kind=pow", "schedule.base=0.75", "quantizer.steps=10", "quantizer.bias=add", "loss.weight=true",
)  # fmt: skip
GENERATOR: Words = (
    "network.positions=rope", "network.class_latents=false", "network.head=linear", "objective.t_weights=uniform",
    "objective.perturb=0",
)  # fmt: skip
# L_quant with the total of TOKENIZER's, whatever the schedule, T and weight: 0.25 · sum of 0.75^(10 - t) = 1 - 0.75^10.
EQUAL: Words = ("loss.quant_reduce=mean", f"loss.quant={1 - 0.75**10:.4f}")
UNGUIDED: Words = ("cfg=0",)
RVQ_DEPTH = 8
EXPOSURES = 20  # of each image at each t, of `views`


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What an experiment is run on: recipes, and overrides that make its trainings shorter."""

    tokenizer: str
    generator: str
    plus: str
    resgen: str
    images: str = ""  # built in
    heldout: str = ""
    subset: int | None = None  # number of images of `views`; None: all
    seeds: Words = ("0", "1", "2")
    tokenize: Words
    judge: Words | None = None  # options of `eval judge`; None: Inception scores the samples
    crop: Words = ()
    per_class: int = 80
    sample_seeds: int = 5
    seconds: float | None = None  # training time of a `timed` cell; None: the recipe's own length
    flops: float | None = None  # operations of a training of `families`
    baselines: Words = ()  # recipes of MaskGIT, AR and flow, without the family's name, and overrides
    single: Words  # one quantiser with as many bits an image as TOKENIZER
    sizes: Mapping[str, Words]  # recipe and overrides of Table 5's generators
    half: Words  # half of the generator's training
    strengths: Mapping[str, Words]  # of Table 3's generators
    table2: Words = ()  # overrides of all tokenizers there
    tokenizers: Words = ()  # of those that generators learn from
    generators: Words = ()
    epochs: Words = ()  # of Table 4 and Figure 5, whose generators the paper trains for 100
    codes: int = 256  # K of `bits`
    t_an_image: int = 2  # of `views`
    chain: Chain = "images"


def sized(recipe: str, depths: Sequence[int], channels: int) -> dict[str, Words]:
    """Networks of the paper's form, with as many heads as layers, of fewer channels a head than its 64."""
    return {
        f"d{d}": (recipe, f"network.depth={d}", f"network.width={channels * d}", f"network.heads={d}") for d in depths
    }


SCALES = {
    "digits": Scale(
        tokenizer="digits", generator="digits", plus="digits", resgen="resgen-digits", images="digits:train",
        heldout="digits:heldout", subset=500, tokenize=("--views", "8"), judge=("--recipe", "digits"), seconds=20,
        single=("autoencoder.multipliers=[1]", "quantizer.codes=32"), sizes=sized("digits", (2, 3, 4), 24),
        half=("train.steps=3000",),
        strengths={"weak": ("train.steps=150",), "middle": ("train.steps=500",), "strong": ()},
        flops=3e12, baselines=("shapes", "network.width=64"),
        table2=("train.steps=300", "autoencoder.channels=32", "autoencoder.width=16", "train.batch=32"),
        tokenizers=("train.steps=200", "train.eval_every=0"), generators=("train.steps=1500",),
    ),
    "shapes": Scale(
        tokenizer="shapes", generator="shapes-plus", plus="shapes-plus", resgen="resgen-shapes", images="shapes:train",
        heldout="shapes:heldout", subset=500, tokenize=("--views", "2"), judge=("--recipe", "shapes"), seconds=180,
        single=("autoencoder.multipliers=[1]", "quantizer.codes=32"), sizes=sized("shapes-plus", (2, 3, 4), 32),
        half=("train.steps=700",),
        strengths={"weak": ("train.steps=140",), "middle": ("train.steps=420",), "strong": ()},
        flops=1.05e13, baselines=("shapes",),
    ),
    "cifar10": Scale(
        tokenizer="cifar10-smoke", generator="cifar10-smoke", plus="cifar10-smoke", resgen="resgen-cifar10",
        subset=5000, seeds=("0",), tokenize=("--views", "2", "--flip"), judge=("train.epochs=6",), seconds=180,
        single=("autoencoder.multipliers=[1]", "quantizer.codes=49"), sizes=sized("cifar10-smoke", (2, 4, 6), 32),
        half=("train.steps=300",),
        strengths={"weak": ("train.steps=300",), "middle": ("train.steps=900",), "strong": ()},
        table2=("train.steps=2000",), tokenizers=("train.steps=2000",), generators=("train.steps=3000",),
        flops=2e13, baselines=("shapes", "network.depth=4", "network.width=128"),
    ),
    "imagenet256": Scale(
        tokenizer="imagenet256-tokenizer", generator="imagenet256-d12", plus="imagenet256-d12-plus",
        resgen="imagenet256-resgen-rvq8", seeds=("0",), tokenize=("--keep", "latents"), crop=("--resolution", "256"),
        per_class=50, single=("autoencoder.multipliers=[1,1,4]", "quantizer.codes=181"),
        sizes={f"d{d}": (f"imagenet256-d{d}",) for d in (12, 16, 20)}, half=("train.epochs=100",),
        strengths={"weak": ("train.epochs=20",), "middle": ("train.epochs=60",), "strong": ()},
        epochs=("train.epochs=100",), codes=4096, t_an_image=1,
    ),
    "speech": Scale(
        tokenizer="speech8-sin", generator="speech8-sin", plus="speech8-sin", resgen="speech8-rvq", chain="strings",
        tokenize=("--units", "words", "--keep", "latents"), judge=("--recipe", "speech8-sin"), sample_seeds=3,
        seconds=240, single=(), sizes={}, half=(), strengths={},
    ),
    "voices": Scale(
        tokenizer="speech8-sin", generator="speech8-sin", plus="speech8-sin", resgen="speech8-rvq", chain="voices",
        images="espeak", seeds=("0", "1"), tokenize=("--units", "words", "--keep", "latents"),
        judge=("--recipe", "speech8-sin"), sample_seeds=1, single=(), sizes={}, half=(), strengths={},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One row of a table: the words behind each command of a chain. A cell without `generator` ends at reconstructions.

    tokenizer, generator: recipe and overrides. tokenize: options. sampling: KEY=VALUE and --preset of `rdpm sample`.
    images: number of training images, or voices, evenly spaced. timed: trained for the scale's seconds. flops: trained
    for so many operations, and what a sample costs is measured."""

    name: str
    tokenizer: Words
    tokenize: Words = ()
    generator: Words = ()
    sampling: Words = ()
    images: int | None = None
    timed: bool = False
    flops: float | None = None


@dataclass(frozen=True)
class Table:
    """An experiment. A column `a/b` is a, or b of rows without a: Inception and a judge; absent columns are left out.

    published: the paper's table whose rows are appended. plot: one point a row, curves over lambda, or the first column
    against what a sample costs. chain: of the scales that it is for."""

    title: str
    columns: Words
    cells: Callable[[Scale], list[Cell]]
    published: str = ""
    plot: Literal["dots", "curves", "costs"] = "dots"
    chain: Chain = "images"


def tokenizer_cell(scale: Scale, name: str, *changes: str) -> Cell:
    return Cell(name, ("--recipe", scale.tokenizer, *scale.table2, *TOKENIZER, *changes))


def generator_cell(
    scale: Scale, name: str, tokenizer: Words = (), generator: Words = (), *, recipe: str | None = None,
    tokenize: Words | None = None, sampling: Words = (), images: int | None = None, timed: bool = False,
) -> Cell:  # fmt: skip
    """A cell of the scale's generator on a tokenizer that differs from TOKENIZER by these words.

    t is drawn uniformly: with weights of alpha_t a schedule would change the training, too."""
    trained = ("--recipe", scale.tokenizer, *scale.tokenizers, *TOKENIZER, *tokenizer)
    words = ("--recipe", recipe or scale.generator, *scale.generators, "objective.t_weights=uniform", *generator)
    return Cell(name, trained, tokenize or scale.tokenize, words, sampling, images, timed)


def resgen_cell(
    scale: Scale, name: str, *changes: str, depth: int = RVQ_DEPTH, sampling: Words = (), timed: bool = False
) -> Cell:
    """A cell of ResGen on plain residual codes."""
    trained = ("--recipe", scale.resgen, *scale.tokenizers, f"quantizer.steps={depth}")
    words = ("--recipe", scale.resgen, *changes)
    return Cell(name, trained, ("--keep", "latents"), words, sampling, timed=timed)


def ruler(scale: Scale) -> list[Cell]:
    """Whether the scores rank: the recipes as they are, and less trained."""
    recipe = ("--recipe", scale.plus)
    lengths = {"untrained": ("train.steps=1", "train.warmup_steps=0"), "half trained": scale.half, "trained": ()}
    trained = {name: (*recipe, *words) for name, words in lengths.items()}
    trained |= {"the paper's generator": (*recipe, *GENERATOR)}
    tokenizer = ("--recipe", scale.tokenizer)
    cells = [Cell(name, tokenizer, scale.tokenize, words, UNGUIDED) for name, words in trained.items()]
    return [*cells, Cell("ResGen", ("--recipe", scale.resgen), ("--keep", "latents"), ("--recipe", scale.resgen))]


def table2(scale: Scale) -> list[Cell]:
    """The paper's rows; then, at an equal total of L_quant, some of them again and other quantisers of equal bits."""
    unweighted, unbiased = "loss.weight=false", "quantizer.bias=none"
    steps = {1: 6, 2: 8, 3: 10, 4: 12, 5: 14, 6: 20}
    rows: dict[str, Words] = {f"row {row}": (unweighted, unbiased, f"quantizer.steps={T}") for row, T in steps.items()}
    rows |= {"row 7": (unbiased,), "row 8": (unweighted,), "row 9": ()}
    equal = {f"{name}, equal total": (*rows[name], *EQUAL) for name in ("row 1", "row 3", "row 6", "row 8")}
    plain = ("schedule.kind=rvq", unbiased, "quantizer.codebooks=per_step")
    controls: dict[str, Words] = {
        "rvq": ("schedule.kind=rvq",),
        "rvq, equal total": ("schedule.kind=rvq", *EQUAL),
        "rvq, a codebook a step, no bias": (*plain, *EQUAL),
        "one VQ of a finer grid": (*plain, "quantizer.steps=1", *scale.single, *EQUAL),
        "linear, equal total": ("schedule.kind=linear", *EQUAL),
        "sin, equal total": ("schedule.kind=sin", *EQUAL),
    }
    return [tokenizer_cell(scale, name, *words) for name, words in (rows | equal | controls).items()]


def noise(scale: Scale) -> list[Cell]:
    """Whether the noise buys generation: one network on noisy and on plain codes of equal bits and total of L_quant."""
    cells = [generator_cell(scale, kind, (f"schedule.kind={kind}", *EQUAL)) for kind in ("pow", "linear", "sin")]
    rvq, blind = ("schedule.kind=rvq", *EQUAL), ("network.eps_input=false",)
    return [*cells, generator_cell(scale, "rvq", rvq, blind), generator_cell(scale, "rvq, eps an input", rvq)]


def table3(scale: Scale) -> list[Cell]:
    """Guidance, its schedule and the draw, at generators trained for different lengths."""
    lambdas = ("0", "0.25", "0.5", "1", "2", "4")
    cells = []
    for key in product(scale.strengths, ("argmax", "gumbel"), ("constant", "linear"), lambdas):
        strength, draw, schedule, cfg = key
        guidance = (f"cfg={cfg}",) if cfg == "0" else (f"cfg={cfg}", f"cfg_schedule={schedule}")
        sampling = (f"draw={draw}", *guidance)
        cells.append(generator_cell(scale, ", ".join(key), generator=scale.strengths[strength], sampling=sampling))
    return cells


def table4(scale: Scale) -> list[Cell]:
    """Noise schedules, each with a tokenizer, a store and a generator of its own."""
    kinds = ("sin", "linear", "pow")
    return [generator_cell(scale, kind, (f"schedule.kind={kind}",), scale.epochs) for kind in kinds]


def table4_early(scale: Scale) -> list[Cell]:
    """The use of pow's early steps: T = 5, and sampling without the first 2, 4 or 6 of 10."""
    skips = [
        generator_cell(scale, f"pow, without {k} steps", generator=scale.epochs, sampling=(f"skip_steps={k}",))
        for k in (0, 2, 4, 6)
    ]
    return [*skips, generator_cell(scale, "pow, T = 5", ("quantizer.steps=5",), scale.epochs)]


def figure5(scale: Scale) -> list[Cell]:
    """The base of the pow schedule, alpha_t = base^(T - t)."""
    bases = ("0.5", "0.65", "0.75", "0.85", "0.95")
    return [generator_cell(scale, f"base {base}", (f"schedule.base={base}",), scale.epochs) for base in bases]


def table5(scale: Scale) -> list[Cell]:
    """The paper's three sizes, and ResGen. At the small scales as many heads as layers, of fewer channels than 64."""
    sizes = [generator_cell(scale, name, (), words[1:], recipe=words[0]) for name, words in scale.sizes.items()]
    return [*sizes, resgen_cell(scale, "resgen", *scale.generators)]


def views(scale: Scale) -> list[Cell]:
    """Cached noise of 1, 2 and 8 views an image against fresh noise, at equal exposures of each image and t."""
    passes = EXPOSURES * 10 // scale.t_an_image
    length = ("train.steps=null", f"train.epochs={passes}", f"objective.steps_per_image={scale.t_an_image}")
    stores = {f"views: {count}": (("--views", str(count)), "cached") for count in (1, 2, 8)}
    stores |= {"fresh": (("--keep", "latents"), "fresh")}
    return [
        generator_cell(
            scale, name, generator=(*length, f"objective.noise={kind}"), tokenize=tokenize, images=scale.subset
        )
        for name, (tokenize, kind) in stores.items()
    ]  # fmt: skip


def bits(scale: Scale) -> list[Cell]:
    """Steps and codes, one at a time, at an equal total of L_quant."""
    sizes = {f"T = {T}": (T, scale.codes) for T in (6, 8, 10, 12)}
    sizes |= {f"K = {codes}": (10, codes) for codes in (256, 1024, 4096)}
    return [
        generator_cell(scale, name, (f"quantizer.steps={T}", f"quantizer.codes={codes}", *EQUAL))
        for name, (T, codes) in sizes.items()
    ]


def paper_vs_plus(scale: Scale) -> list[Cell]:
    """The options beyond the paper at equal time: all of them, each removed, each alone."""
    parts: dict[str, str] = {
        "positions": "network.positions=both", "latents": "network.class_latents=true",
        "geometric": "network.head=geometric", "t-weights": "objective.t_weights=alpha",
        "perturb": "objective.perturb=0.3",
    }  # fmt: skip

    def cell(name: str, names: Iterable[str]) -> Cell:
        words = (*GENERATOR, *(parts[n] for n in names))
        return generator_cell(scale, name, (), words, recipe=scale.plus, sampling=UNGUIDED, timed=True)

    removed = [cell(f"plus-without-{n}", [m for m in parts if m != n]) for n in parts]
    return [cell("paper", []), cell("plus", parts), *removed, *(cell(f"paper-with-{n}", [n]) for n in parts)]


def resgen_families(scale: Scale) -> list[Cell]:
    """RDPM, the paper's and with the options beyond it, and ResGen at several depths, at equal time."""
    families = {"paper": GENERATOR, "plus": ("objective.t_weights=alpha",)}
    return [
        *(
            generator_cell(scale, f"rdpm-{name}", (), words, recipe=scale.plus, sampling=UNGUIDED, timed=True)
            for name, words in families.items()
        ),
        *(resgen_cell(scale, f"resgen-depth-{d}", depth=d, sampling=UNGUIDED, timed=True) for d in (4, 8, 16)),
    ]


def resgen_steps(scale: Scale) -> list[Cell]:
    """ResGen at several depths, sampled in 2 to 32 passes."""
    return [
        resgen_cell(scale, f"depth-{d}-in-{steps}", depth=d, timed=True, sampling=(f"steps={steps}",))
        for d in (4, 8, 16)
        for steps in (2, 4, 8, 16, 32)
    ]


# top_p = 1 for ResGen's own choices, so that the whole distribution shows.
WHOLE = ("sampling.top_p=1",)


def resgen_switches(scale: Scale) -> list[Cell]:
    """ResGen's own choices at equal steps: random depths, direct tokens, the number of components."""
    changes = {"default": (), "random-depths": ("objective.order=random",), "direct-tokens": ("network.target=direct",)}
    changes |= {f"components-{n}": (f"network.mixtures={n}",) for n in ("1", "16", "256", "1024")}
    return [resgen_cell(scale, name, *WHOLE, *words) for name, words in changes.items()]


def resgen_nucleus(scale: Scale) -> list[Cell]:
    """Sampling from the smallest set of components of probability top_p, for two orders of the depths."""
    orders = {"default": WHOLE, "random-depths": (*WHOLE, "objective.order=random")}
    shares = ("1", "0.9", "0.8", "0.7", "0.5")
    pairs = [(order, share) for order in orders for share in shares]
    return [resgen_cell(scale, f"{o}-top-p-{p}", *orders[o], sampling=(f"top_p={p}",)) for o, p in pairs]


def resgen_schedules(scale: Scale) -> list[Cell]:
    """Masking schedules: each trained with, and each sampled with."""
    schedules = ("square", "cosine", "circle", "exp", "linear")
    pairs = [(trained, sampled) for trained in schedules for sampled in schedules]
    return [
        resgen_cell(scale, f"trained-{a}-sampled-{b}", *WHOLE, f"objective.schedule={a}", sampling=(f"schedule={b}",))
        for a, b in pairs
    ]


def families(scale: Scale) -> list[Cell]:
    """RDPM, the paper's and with the options beyond it, ResGen, MaskGIT, autoregression and flow, unguided.

    Equal tokens, widths, depths and operations of training. RDPM's codes are of its own tokenizer, as many of as many
    bits: it draws from their noise."""
    steps = f"quantizer.steps={RVQ_DEPTH}"
    sin = ("schedule.kind=sin", steps, "quantizer.codes=256")
    noisy = ("--recipe", scale.tokenizer, *scale.tokenizers, *TOKENIZER, *sin)
    plain = ("--recipe", scale.resgen, *scale.tokenizers, steps)
    prefix, *sizes = scale.baselines
    maskgit, flow, flat = (("--recipe", f"{prefix}-{family}", *sizes) for family in ("maskgit", "flow", "ar"))
    passes: dict[str, tuple[Words, Sequence[str]]] = {
        "ResGen": (("--recipe", scale.resgen), ("8", "16", "63")),
        "MaskGIT": (maskgit, ("8", "16", "32")),
        "flow": (flow, ("5", "10", "25", "100", "250")),
    }
    unguided = replace(Cell("", plain, ("--keep", "latents"), sampling=UNGUIDED), flops=scale.flops)
    noisy_cell = replace(unguided, tokenizer=noisy, tokenize=scale.tokenize)
    rdpm: dict[str, Words] = {"RDPM": GENERATOR, "RDPM, plus": ()}
    return [
        *(replace(noisy_cell, name=name, generator=("--recipe", scale.plus, *words)) for name, words in rdpm.items()),
        *(
            replace(unguided, name=f"{name} in {n}", generator=words, sampling=(*UNGUIDED, f"steps={n}"))
            for name, (words, counts) in passes.items()
            for n in counts
        ),
        replace(unguided, name="AR", generator=flat),
        replace(unguided, name="AR, a transformer over depths", generator=(*flat, "network.depth_layers=1")),
    ]


def targets(scale: Scale) -> list[Cell]:
    """ResGen's sum of masked depths against each depth's token, over depths; and the number of its components.

    Losses of the two have other units, and so have their gradients' norms."""
    kinds = {"cumulative": (), "direct": ("network.target=direct",)}
    return [
        *(resgen_cell(scale, f"{k}, depth {d}", *words, depth=d) for d in (4, 8, 16) for k, words in kinds.items()),
        *(resgen_cell(scale, f"components: {n}", f"network.mixtures={n}") for n in ("1", "16", "256", "1024")),
    ]


def guidance(scale: Scale) -> list[Cell]:
    """Guidance by a second pass, learnt in training, or by an earlier step of the run; and steps without a pass.

    Equal operations of training, of which the learnt one spends a third on its second forward pass."""
    lambdas = ("0.25", "0.5", "1", "2")
    guides = {"CFG": (), "step 100": ("guide=RUN@100",), "step 400": ("guide=RUN@400",)}
    two = {"unguided in 10 passes": UNGUIDED}
    two |= {
        f"{name} in two passes, lambda {v}": (f"cfg={v}", *words) for name, words in guides.items() for v in lambdas
    }
    one = {"learnt in one pass, lambda 0": UNGUIDED}
    one |= {f"learnt in one pass, lambda {value}": (f"cfg={value}",) for value in lambdas}
    for k in (2, 4, 5, 7):
        two[f"unguided in {10 - k} passes"] = (*UNGUIDED, f"skip_steps={k}")
        one[f"learnt, lambda 0.5 in {10 - k} passes"] = ("cfg=0.5", f"skip_steps={k}")
    return [
        replace(generator_cell(scale, name, (), words, recipe=scale.plus, sampling=sampling), flops=scale.flops)
        for words, cells in ((("train.keep=100",), two), (("network.guidance=2",), one))
        for name, sampling in cells.items()
    ]


# L_quant with the total of the family's recipe, whatever T and the schedule; the sum over t of sin's alpha_t at T = 8.
SPOKEN_EQUAL: dict[str, Words] = {
    "RDPM": ("loss.quant_reduce=mean", f"loss.quant={0.25 * sum(math.sin(math.pi * t / 16) for t in range(1, 9)):.4f}"),
    "ResGen": ("loss.quant_reduce=mean", f"loss.quant={0.03 * 8:.4f}"),
}


def spoken_cell(
    scale: Scale, family: str, name: str, tokenizer: Words = (), generator: Words = (), *, sampling: Words = (),
    timed: bool = False,
) -> Cell:  # fmt: skip
    """A cell of sound: the family's recipe with these changes. Plain codes have no draws of noise, so one view."""
    recipe, views = {"RDPM": (scale.generator, ("--views", "2")), "ResGen": (scale.resgen, ())}[family]
    words = ("--recipe", recipe, *generator)
    return Cell(name, ("--recipe", recipe, *tokenizer), (*scale.tokenize, *views), words, sampling, timed=timed)


def speech_families(scale: Scale) -> list[Cell]:
    """RDPM and ResGen as their recipes have them, at equal time of the generator's training."""
    return [spoken_cell(scale, family, family, timed=True) for family in SPOKEN_EQUAL]


def speech_depths(scale: Scale) -> list[Cell]:
    """Steps of RDPM and depths of ResGen, at an equal total of L_quant a family; 8 are the recipes'."""
    return [
        spoken_cell(scale, family, f"{family}, {T}", () if T == 8 else (f"quantizer.steps={T}", *equal))
        for family, equal in SPOKEN_EQUAL.items()
        for T in (4, 8, 16)
    ]


def speech_guidance(scale: Scale) -> list[Cell]:
    """Guidance of both families."""
    pairs = product(SPOKEN_EQUAL, ("0", "0.5", "1", "2", "4"))
    return [spoken_cell(scale, family, f"{family}, cfg {cfg}", sampling=(f"cfg={cfg}",)) for family, cfg in pairs]


def speech_steps(scale: Scale) -> list[Cell]:
    """ResGen in 1 to 25 passes."""
    passes = ("1", "4", "8", "16", "25")
    return [spoken_cell(scale, "ResGen", f"{n} passes", sampling=(f"steps={n}",)) for n in passes]


def speech_collapse(scale: Scale) -> list[Cell]:
    """ResGen's tokenizer without its three remedies for a first book that takes all, with each alone and with all."""
    without = {
        "little commitment": "loss.quant=0.25", "noise on z": "autoencoder.noise=0", "dropout": "quantizer.dropout=0",
    }  # fmt: skip
    remedies = {"plain": (), **{name: (name,) for name in without}, "all": tuple(without)}
    return [
        spoken_cell(scale, "ResGen", name, tuple(word for key, word in without.items() if key not in used))
        for name, used in remedies.items()
    ]


def speech_noise(scale: Scale) -> list[Cell]:
    """`noise` for sound: one network of RDPM on noisy and on plain codes of equal bits and total of L_quant."""
    blind = ("network.eps_input=false",)
    rows = {"sin": ("sin", ()), "pow": ("pow", ()), "linear": ("linear", ()), "rvq": ("rvq", blind)}
    return [
        spoken_cell(
            scale, "RDPM", name, (f"schedule.kind={kind}", *SPOKEN_EQUAL["RDPM"]),
            ("objective.t_weights=uniform", *words),
        )
        for name, (kind, words) in {**rows, "rvq, eps an input": ("rvq", ())}.items()
    ]  # fmt: skip


def voices(scale: Scale) -> list[Cell]:
    """Voices that no training heard: both families, direct tokens, fewer training voices, and cross-attention."""
    cross = ("network.align=cross", "train.steps=4000")
    cells = [
        *(spoken_cell(scale, family, family) for family in SPOKEN_EQUAL),
        spoken_cell(scale, "ResGen", "direct tokens", (), ("network.target=direct",)),
        *(replace(spoken_cell(scale, "RDPM", f"RDPM, {n} voices"), images=n) for n in (10, 25)),
        *(spoken_cell(scale, family, f"{family}, cross-attention", (), cross) for family in SPOKEN_EQUAL),
    ]
    return cells


_RECON = (
    "psnr", "ssim", "rfid/frechet_distance", "latent_mse", "continuous.psnr",
    "continuous.rfid/continuous.frechet_distance",
)  # fmt: skip
_SAMPLES = (
    "fid/frechet_distance", "sfid", "inception_score/classifier_score", "precision", "recall", "class_accuracy",
    "validity", *(f"factor_coverage.{name}" for name in ("x", "y", "size", "angle", "hue")), "recon.psnr", "n",
)  # fmt: skip
_TRAINED = (*_SAMPLES, "heldout.ce", "heldout.gap")
_COST = (*_SAMPLES, "parameters", "train_steps", "passes", "seconds_an_image")
_COPIES = (
    "recalled", "recalled_unseen", "near_copies", "near_copies_features", "authpct", "nearest_pixels",
    "heldout.authpct", "heldout.nearest_pixels",
)  # fmt: skip
_GUIDED = (*_SAMPLES[:7], "passes", "gflops_a_sample", "heldout.ce", "heldout.gap")
_STABILITY = ("images_per_second", "grad_norm", "clipped", "loss_jumps")
_FAMILIES = (
    "fid/frechet_distance", "inception_score/classifier_score", "precision", "recall", "class_accuracy", "validity",
    "heldout.nats", "heldout.bound", "passes", "gflops_a_sample", "seconds_a_sample", "memory_mib_a_sample",
    "parameters", "train_steps", "images", *_STABILITY,
)  # fmt: skip
_SPOKEN = (
    "word_accuracy", "speaker_accuracy", "another.word_accuracy", "sim_o", "recon.word_accuracy",
    "recon.mel_distance/mel_distance", "rho", "parameters", "train_steps", "seconds_a_sample",
)  # fmt: skip
_VOICES = (
    "seen.wer", "seen.shuffled.wer", "seen.speaker_accuracy", "seen.sim_o", "seen.other.sim_o", "unseen.wer",
    "unseen.shuffled.wer", "unseen.sim_o", "unseen.other.sim_o", "parameters", "train_steps",
)  # fmt: skip
TABLES = {
    "ruler": Table("What the scores tell apart", (*_TRAINED, "train_steps"), ruler),
    "table2": Table("Tokenizers", _RECON, table2, "2"),
    "noise": Table("Noisy and plain codes", _TRAINED, noise),
    "table3": Table("Sampling", _SAMPLES, table3, "3", plot="curves"),
    "table4": Table("Noise schedules", _TRAINED, table4, "4"),
    "table4-early": Table("Early steps of pow", _TRAINED, table4_early),
    "figure5": Table("Base of pow", _TRAINED, figure5),
    "table5": Table("Sizes", _COST, table5, "5"),
    "families": Table("Five families at equal operations of training", _FAMILIES, families, plot="costs"),
    "guidance": Table("Guidance and its cost", (*_GUIDED, "parameters", "train_steps"), guidance, plot="costs"),
    "targets": Table("What ResGen predicts", (*_COST, *_STABILITY), targets),
    "views": Table("Cached and fresh noise", (*_SAMPLES, *_COPIES, "heldout.ce"), views),
    "bits": Table("Steps and codes", _TRAINED, bits),
    "paper-vs-plus": Table("Generators at equal time", (*_TRAINED, "train_steps"), paper_vs_plus),
    "resgen": Table("ResGen and RDPM", _COST, resgen_families),
    "resgen-steps": Table("Passes of ResGen", _COST, resgen_steps),
    "resgen-switches": Table("Choices of ResGen", _COST, resgen_switches),
    "resgen-nucleus": Table("Components that ResGen draws from", _COST, resgen_nucleus),
    "resgen-schedules": Table("Masking schedules of ResGen", _COST, resgen_schedules),
    "speech-families": Table("RDPM and ResGen at equal time", _SPOKEN, speech_families, chain="strings"),
    "speech-depths": Table("Steps and depths", _SPOKEN, speech_depths, chain="strings"),
    "speech-guidance": Table("Guidance", _SPOKEN, speech_guidance, chain="strings"),
    "speech-steps": Table("Passes of ResGen", _SPOKEN, speech_steps, chain="strings"),
    "speech-collapse": Table("A first book that takes all", _SPOKEN, speech_collapse, chain="strings"),
    "speech-noise": Table("Noisy and plain codes of sound", _SPOKEN, speech_noise, chain="strings"),
    "voices": Table("Voices heard in training, and others", _VOICES, voices, chain="voices"),
}

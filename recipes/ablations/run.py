"""Run one of the papers' experiments: cells over seeds, each a chain of `rdpm` commands, then a table and a plot.

    python recipes/ablations/run.py table2                                    # built-in digits, minutes on a CPU
    python recipes/ablations/run.py table2 --scale cifar10 --images cifar10-train.zip
    python recipes/ablations/run.py table5 --scale imagenet256 --images imagenet/train --heldout imagenet/val --gpus 8

A cell's score is OUT/NAME.SEED.json and is written last, so a finished cell is not run again and an interrupted one
goes on where its commands resume. A cell that was run with other options than it has now stops the program: name
another --out. The table is OUT/table.md (mean ± standard deviation over seeds), table.csv (each seed) and plot.png.
"""

import argparse
import csv
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Words = tuple[str, ...]
Scores = dict[str, dict[int, dict[str, Any]]]  # cell -> seed -> score

# The paper's generator: every option beyond the paper off.
PAPER: Words = (
    "network.positions=rope", "network.class_latents=false", "network.head=linear", "objective.t_weights=uniform",
    "objective.perturb=0",
)  # fmt: skip
FRECHET = "fid/frechet_distance"  # the first for Inception, the second for any other extractor
RVQ_DEPTH = 8


@dataclass(frozen=True)
class Scale:
    """What an experiment is run on. seconds: training time of a generator cell, None for the recipe's own length."""

    tokenizer: str
    generator: str
    plus: str
    resgen: str
    seeds: Words
    recon: Words  # options of `eval recon`
    views: Words  # options of `tokenize`
    judge: Words | None  # options of `eval judge`; None: Inception scores the samples
    seconds: float | None
    depths: Words
    tokenizer_steps: Words = ()  # overrides of a tokenizer that a generator cell learns from
    generator_steps: Words = ()


SCALES = {
    "digits": Scale(
        "digits", "digits", "digits", "resgen-digits", ("0", "1", "2"), ("--seeds", "2"), ("--views", "8"),
        ("--heldout", "digits:heldout", "--recipe", "digits"), 20, ("2", "3", "4"),
        ("train.steps=200", "train.eval_every=0", "quantizer.steps=10"), ("train.steps=1500", "train.eval_every=0"),
    ),
    "cifar10": Scale(
        "cifar10-smoke", "cifar10-smoke", "cifar10-smoke", "resgen-cifar10", ("0",), ("--seeds", "2", "--limit", "500"),
        ("--views", "2", "--flip"), ("train.epochs=6",), 180, ("2", "4", "6"),
        ("train.steps=2000", "train.eval_every=0", "quantizer.bias=add", "quantizer.steps=10"),
        ("train.steps=3000", "train.eval_every=0"),
    ),
    "imagenet256": Scale(
        "imagenet256-tokenizer", "imagenet256-d12", "imagenet256-d12-plus", "imagenet256-resgen-rvq8", ("0",),
        ("--seeds", "4"), ("--keep", "latents"), None, None, (),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One row of a table.

    kind: `tokenizer` (train, reconstruct), `pipeline` (a tokenizer of its own, codes, generator, samples), `generator`
    (train on shared codes, samples) or `samples` (of another cell's generator). options: overrides of what the cell
    trains, or options of `sample`. depth: of plain residual codes, for a ResGen generator. timed: train for the
    scale's seconds rather than for the recipe's steps. paper: what the paper says of this row.
    """

    name: str
    kind: str
    options: Words = ()
    recipe: str = ""
    depth: int | None = None
    timed: bool = False
    source: str = ""  # of `samples`: the cell whose generator is sampled; empty: the demo's
    paper: str = ""


@dataclass(frozen=True)
class Table:
    """The cells of an experiment and the columns of its table; a column `a/b` shows a, or b where a is absent."""

    title: str
    columns: Words
    cells: Callable[[Scale, argparse.Namespace], list[Cell]]
    seeds: Words | None = None


# ---- the experiments ---------------------------------------------------------------------------------------------


def table2(scale: Scale, options: argparse.Namespace) -> list[Cell]:
    """Parts of the tokenizer, one factor at a time around the paper's setting (bias `blend` for its `add`)."""
    base: Words = (
        "schedule.kind=pow",
        "schedule.base=0.75",
        "quantizer.steps=10",
        "loss.weight=true",
        "quantizer.bias=blend",
    )
    if options.scale != "imagenet256":
        steps = "300" if options.scale == "digits" else "400"
        small = ("autoencoder.channels=32", "autoencoder.width=16", "train.batch=32", "train.save_every=1000")
        base = (f"train.steps={steps}", "train.eval_every=0", *small, *base)
    rows: list[tuple[str, Words, str]] = [
        ("default", (), ""),
        ("T2", ("quantizer.steps=2",), "worse (rows 1-6, without weight and bias)"),
        ("T5", ("quantizer.steps=5",), "worse (rows 1-6)"),
        ("T20", ("quantizer.steps=20",), "better (rows 1-6)"),
        ("no-weight", ("loss.weight=false",), "worse (row 8)"),
        ("no-bias", ("quantizer.bias=none",), "worse (row 7)"),
        ("no-weight-no-bias", ("loss.weight=false", "quantizer.bias=none"), "worst of rows 3, 7-9"),
        ("bias-add", ("quantizer.bias=add",), "best (row 9)"),
        ("linear", ("schedule.kind=linear",), ""),
        ("linear-T5", ("schedule.kind=linear", "quantizer.steps=5"), ""),
        ("linear-T20", ("schedule.kind=linear", "quantizer.steps=20"), ""),
        ("sin", ("schedule.kind=sin",), ""),
    ]
    return [Cell(name, "tokenizer", (*base, *changes), paper=paper) for name, changes, paper in rows]


def table3(scale: Scale, options: argparse.Namespace) -> list[Cell]:
    """Ways of sampling one generator; on digits also a weak one, which guidance should help more."""
    strength = ("--cfg", options.cfg)
    rows: list[tuple[str, Words, str]] = [
        ("raw", ("--preset", "raw"), "worst"),
        ("cfg", ("--preset", "cfg", *strength), ""),
        ("cfg-linear", ("--preset", "cfg-linear", *strength), "better than cfg"),
        ("gumbel", ("--preset", "gumbel", *strength, "--tau", options.tau), "best"),
        ("gumbel-alone", ("--preset", "gumbel", "--cfg", "0", "--tau", options.tau), ""),
    ]
    if options.scale != "digits":
        trained = Cell("generator", "generator", recipe=scale.plus)
        return [
            trained,
            *(Cell(name, "samples", words, source="generator", paper=paper) for name, words, paper in rows),
        ]
    weak = Cell("weak", "generator", (*PAPER, "train.steps=4000", "train.eval_every=0"), scale.generator)
    demo = [Cell(name, "samples", words, paper=paper) for name, words, paper in rows]
    return [*demo, weak, *(Cell(f"weak-{name}", "samples", words, source="weak") for name, words, _ in rows)]


def table4(scale: Scale, options: argparse.Namespace) -> list[Cell]:
    """Noise schedules, each with a tokenizer, a store and a generator of its own."""
    rows = (("sin", "worst"), ("linear", "between"), ("pow", "best"))
    return [Cell(kind, "pipeline", (f"schedule.kind={kind}",), paper=paper) for kind, paper in rows]


def table4_early(scale: Scale, options: argparse.Namespace) -> list[Cell]:
    """The use of pow's early steps: T = 5, and sampling without the first 2, 4 or 6 of 10."""
    pow_, short = ("schedule.kind=pow",), ("schedule.kind=pow", "quantizer.steps=5")
    skipped = [Cell(f"pow-skip-{k}", "samples", ("--skip-steps", k), source="pow") for k in ("2", "4", "6")]
    return [Cell("pow", "pipeline", pow_), Cell("pow-T5", "pipeline", short), *skipped]


def table5(scale: Scale, options: argparse.Namespace) -> list[Cell]:
    """The paper's three sizes, and ResGen. At the small scales as many heads as layers, of width 24 instead of 64."""
    resgen = Cell("resgen", "generator", scale.generator_steps, scale.resgen, RVQ_DEPTH)
    if options.scale == "imagenet256":
        sizes = (("12", "133M parameters (Table 1)"), ("16", "310M"), ("20", "602M"))
        return [*(Cell(f"d{d}", "generator", recipe=f"imagenet256-d{d}", paper=paper) for d, paper in sizes), resgen]
    sized = [
        (f"network.depth={d}", f"network.width={24 * int(d)}", f"network.heads={d}", *scale.generator_steps)
        for d in scale.depths
    ]
    cells = [Cell(f"d{d}", "generator", words, scale.generator) for d, words in zip(scale.depths, sized, strict=True)]
    return [*cells, resgen]


def figure5(scale: Scale, options: argparse.Namespace) -> list[Cell]:
    """The base of the pow schedule, alpha_t = base^(T - t)."""
    bases = ("0.5", "0.65", "0.75", "0.85", "0.95")
    return [
        Cell(f"base-{b}", "pipeline", ("schedule.kind=pow", f"schedule.base={b}"), paper="best" if b == "0.75" else "")
        for b in bases
    ]


def paper_vs_plus(scale: Scale, options: argparse.Namespace) -> list[Cell]:
    """The options beyond the paper at equal time: all of them, each removed, each alone."""
    parts: dict[str, Words] = {
        "positions": ("network.positions=both",),
        "latents": ("network.class_latents=true",),
        "geometric": ("network.head=geometric",),
        "t-weights": ("objective.t_weights=alpha",),
        "perturb": ("objective.perturb=0.3",),
    }
    # At the paper's size the noise is one of the options; elsewhere all cells learn from the same cached views.
    large = options.scale == "imagenet256"
    cached, fresh = (("objective.noise=cached",), ("objective.noise=fresh",)) if large else ((), ())

    def cell(name: str, names: Sequence[str], noise: Words) -> Cell:
        return Cell(name, "generator", (*PAPER, *(w for n in names for w in parts[n]), *noise), scale.plus, timed=True)

    removed = [cell(f"plus-without-{n}", [m for m in parts if m != n], fresh) for n in parts]
    single = [cell(f"paper-with-{n}", [n], cached) for n in parts]
    return [cell("paper", [], cached), cell("plus", list(parts), fresh), *removed, *single]


def resgen_families(scale: Scale, options: argparse.Namespace) -> list[Cell]:
    """RDPM, the paper's and with the options beyond it, and ResGen at several depths, at equal time."""
    rdpm = [
        Cell("rdpm-paper", "generator", PAPER, scale.generator, timed=True),
        Cell("rdpm-plus", "generator", (), scale.plus, timed=True),
    ]
    return [*rdpm, *(Cell(f"resgen-depth-{d}", "generator", (), scale.resgen, d, timed=True) for d in (4, 8, 16))]


def resgen_steps(scale: Scale, options: argparse.Namespace) -> list[Cell]:
    """ResGen at several depths, sampled in 2 to 32 passes."""
    trained = [Cell(f"resgen-depth-{d}", "generator", (), scale.resgen, d, timed=True) for d in (4, 8, 16)]
    return trained + [
        Cell(f"depth-{d}-in-{steps}", "samples", ("--steps", steps), source=f"resgen-depth-{d}")
        for d in (4, 8, 16)
        for steps in ("2", "4", "8", "16", "32")
    ]


def _resgen_budget(scale: Scale, options: argparse.Namespace) -> Words:
    """Equal steps for ResGen's switches; top_p = 1, so that the whole distribution shows."""
    steps = {"digits": ("train.steps=700",), "cifar10": ("train.steps=2000",)}.get(options.scale)
    return (*steps, "train.eval_every=0", "sampling.top_p=1") if steps else ()


def _resgen_cell(scale: Scale, options: argparse.Namespace, name: str, *changes: str) -> Cell:
    return Cell(name, "generator", (*_resgen_budget(scale, options), *changes), scale.resgen, RVQ_DEPTH)


def resgen_switches(scale: Scale, options: argparse.Namespace) -> list[Cell]:
    """ResGen's own choices at equal steps: random depths, direct tokens, the number of components."""
    changes = {"default": (), "random-depths": ("objective.order=random",), "direct-tokens": ("network.target=direct",)}
    changes |= {f"components-{n}": (f"network.mixtures={n}",) for n in ("1", "16", "256", "1024")}
    return [_resgen_cell(scale, options, name, *words) for name, words in changes.items()]


def resgen_nucleus(scale: Scale, options: argparse.Namespace) -> list[Cell]:
    """Sampling from the smallest set of components of probability top_p, for two orders of the depths."""
    orders = {"default": (), "random-depths": ("objective.order=random",)}
    trained = [_resgen_cell(scale, options, name, *words) for name, words in orders.items()]
    return trained + [
        Cell(f"{order}-top-p-{p}", "samples", ("--top-p", p), source=order)
        for p in ("0.9", "0.8", "0.7", "0.5")
        for order in orders
    ]


def resgen_schedules(scale: Scale, options: argparse.Namespace) -> list[Cell]:
    """Masking schedules: each trained with, and each sampled with. The trained cells are sampled with `square`."""
    cells = []
    for trained in ("square", "cosine", "circle", "exp", "linear"):
        name = f"trained-{trained}"
        cells.append(_resgen_cell(scale, options, name, f"objective.schedule={trained}"))
        for sampled in ("cosine", "circle", "exp", "linear"):
            cells.append(Cell(f"{name}-sampled-{sampled}", "samples", (f"schedule={sampled}",), source=name))
    return cells


_SCORES = ("class_accuracy", FRECHET, "precision", "recall", "parameters", "passes", "seconds_an_image", "steps")
_CHAIN = (FRECHET, "class_accuracy", "recon_psnr", "heldout_ce", "accuracy_gap")
TABLES = {
    "table2": Table("Tokenizer ablation", ("psnr", "ssim", "mse", "rfid", "lpips_vgg"), table2),
    "table3": Table(
        "Sampling",
        (FRECHET, "sfid/spatial_frechet_distance", "inception_score/classifier_score", "precision", "recall",
         "class_accuracy"), table3,
    ),
    "table4": Table("Noise schedules", _CHAIN, table4),
    "table4-early": Table("Early steps of pow", _CHAIN, table4_early),
    "table5": Table(
        "Sizes",
        (FRECHET, "inception_score/classifier_score", "class_accuracy", "parameters", "steps", "passes",
         "seconds_an_image"), table5,
    ),
    "figure5": Table("Base of pow", _CHAIN, figure5, seeds=("0", "1")),
    "paper-vs-plus": Table(
        "Generators at equal time",
        ("class_accuracy", FRECHET, "heldout_ce", "accuracy_gap", "gap_at_T", "steps"), paper_vs_plus,
    ),
    "resgen": Table("ResGen and RDPM", _SCORES, resgen_families),
    "resgen-steps": Table("Passes of ResGen", _SCORES, resgen_steps),
    "resgen-switches": Table("Choices of ResGen", _SCORES, resgen_switches),
    "resgen-nucleus": Table("Components that ResGen draws from", _SCORES, resgen_nucleus),
    "resgen-schedules": Table("Masking schedules of ResGen", _SCORES, resgen_schedules),
}  # fmt: skip


# ---- running a cell ----------------------------------------------------------------------------------------------


class Failure(SystemExit):
    """One line on stderr and exit code 2."""

    def __init__(self, message: str) -> None:
        print(f"run.py: error: {message}", file=sys.stderr)
        super().__init__(2)


@dataclass
class Experiment:
    """The commands that cells are made of, under OUT. What several cells share is made once."""

    options: argparse.Namespace
    scale: Scale
    out: Path
    images: str
    heldout: str
    log: list[str] = field(default_factory=list)  # of the last command, its lines on stderr

    def rdpm(self, *words: str | Path, gpus: bool = True) -> dict[str, Any]:
        """Run a command and return its JSON. A failing command ends the program with the command's exit code."""
        several = ("--gpus", str(self.options.gpus)) if gpus and self.options.gpus else ()
        command = ["rdpm", "--log-format", "json", *map(str, words), "--json", *several]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        self.log = done.stderr.splitlines()
        if done.returncode:
            print(f"run.py: {' '.join(command)}\n{done.stderr[-2000:]}", file=sys.stderr)
            raise SystemExit(done.returncode)
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    # what cells share

    def demo(self, seed: str) -> Path:
        """On digits the codes, the judge and a generator come from the demo of the same seed."""
        folder = self.out.parent / f"demo.{seed}"
        if not (folder / "result.json").is_file():
            self.rdpm("demo", "--out", folder, "--seed", seed, gpus=False)
        return folder

    def judge(self, seed: str) -> Words:
        """Options of `eval` that name the extractor and the reference."""
        reference = ("--ref", self.options.ref) if self.options.ref else ()
        if self.scale.judge is None:
            return reference
        folder = self.out / "judge"
        if not (folder / "judge.pt").is_file():
            self.rdpm("eval", "judge", self.images, folder, *self.scale.judge, gpus=False)
        return ("--extractor", str(folder / "judge.pt"), *reference)

    def codes(self, seed: str) -> Path:
        """The codes that RDPM learns from."""
        if self.options.scale == "digits":
            return self.demo(seed) / "codes"
        run, store = self.out / "tokenizer", self.out / "codes"
        short = ("train.steps=2000", "train.eval_every=1000", "quantizer.bias=add")
        changes: Words = short if self.options.scale == "cifar10" else ()
        self.rdpm("train-tokenizer", self.images, "--recipe", self.scale.tokenizer, "--out", run, *changes)
        self.rdpm("tokenize", self.images, store, "--tokenizer", run / "tokenizer.pt", *self.scale.views)
        return store

    def rvq_codes(self, seed: str, depth: int) -> Path:
        """Plain residual codes for ResGen; on digits those of a tokenizer a seed, else of one for all seeds."""
        number = seed if self.options.scale == "digits" else "0"
        run, store = self.out / f"rvq-{depth}.{number}" / "tokenizer", self.out / f"rvq-{depth}.{number}" / "codes"
        changes = (f"quantizer.steps={depth}", *(("train.steps=2000",) if self.options.scale == "cifar10" else ()))
        recipe: tuple[str | Path, ...] = ("--recipe", self.scale.resgen, "--out", run, "--seed", number)
        self.rdpm("train-tokenizer", self.images, *recipe, *changes)
        self.rdpm("tokenize", self.images, store, "--tokenizer", run / "tokenizer.pt", "--keep", "latents")
        return store

    # the parts of a cell

    def train(self, codes: Path, run: Path, recipe: str, seed: str, changes: Words, timed: bool) -> dict[str, Any]:
        """Train a generator; timed: for as many steps as fit into the scale's seconds, by the rate of a short run."""
        words = ("train-gen", codes, "--recipe", recipe, "--seed", seed)
        seconds = self.scale.seconds if self.options.seconds is None else self.options.seconds
        if timed and seconds:
            probe = run.with_name(f"{run.name}.probe")
            self.rdpm(*words, "--out", probe, *changes, "train.steps=80", "train.log_every=40")
            changes = (*changes, f"train.steps={steps_in(probe, seconds)}", "train.eval_every=0")
        result = self.rdpm(*words, "--out", run, *changes)
        return {"parameters": result["parameters"], **held_out_gap(run)}

    def draw(self, checkpoint: Path, folder: Path, seed: str, words: Words) -> dict[str, Any]:
        """Draw samples and score them in one pass, with network passes and seconds an image."""
        per_class = ("--per-class", str(self.options.per_class))
        result = self.rdpm("sample", "--ckpt", checkpoint, "--out", folder, "--seed", seed, *per_class, *words)
        speed = {"passes": result["passes"], "seconds_an_image": seconds_an_image(self.log)}
        return {**self.rdpm("eval", "all", folder, *self.judge(seed)), **speed}

    def score(self, cell: Cell, seed: str) -> dict[str, Any]:
        """Run a cell for one seed."""
        run = self.out / f"{cell.name}.{seed}"
        if cell.kind == "tokenizer":
            words = ("--recipe", self.scale.tokenizer, "--out", run, "--seed", seed, *cell.options)
            self.rdpm("train-tokenizer", self.images, *words)
            return self.rdpm("eval", "recon", self.heldout, "--tokenizer", run / "tokenizer.pt", *self.scale.recon)
        if cell.kind == "pipeline":
            return self.pipeline(cell, run, seed)
        if cell.kind == "generator":
            codes = self.codes(seed) if cell.depth is None else self.rvq_codes(seed, cell.depth)
            trained = self.train(codes, run, cell.recipe, seed, cell.options, cell.timed)
            return {**self.draw(run / "generator.pt", self.out / f"{run.name}.samples", seed, ()), **trained}
        return self.draw(self.checkpoint(cell.source, seed), run, seed, cell.options)

    def checkpoint(self, source: str, seed: str) -> Path:
        """The generator that a `samples` cell draws from."""
        if not source:
            return Path(self.options.ckpt) if self.options.ckpt else self.demo(seed) / "generator.pt"
        trained = self.out / f"{source}.{seed}"
        generator = trained / "generator.pt"
        return generator if generator.is_file() else trained / "generator" / "generator.pt"

    def pipeline(self, cell: Cell, run: Path, seed: str) -> dict[str, Any]:
        """A tokenizer of the cell's own, its codes, a generator on them, and samples."""
        tokenizer = run / "tokenizer" / "tokenizer.pt"
        words = ("--recipe", self.scale.tokenizer, "--out", tokenizer.parent, "--seed", seed)
        self.rdpm("train-tokenizer", self.images, *words, *self.scale.tokenizer_steps, *cell.options)
        self.rdpm("tokenize", self.images, run / "codes", "--tokenizer", tokenizer, "--seed", seed, *self.scale.views)
        steps = self.scale.generator_steps
        trained = self.train(run / "codes", run / "generator", self.scale.generator, seed, steps, timed=False)
        recon = self.rdpm("eval", "recon", self.heldout, "--tokenizer", tokenizer, *self.scale.recon)
        samples = self.draw(run / "generator" / "generator.pt", run / "samples", seed, ())
        return {**samples, **trained, **{f"recon_{name}": recon[name] for name in ("mse", "psnr", "ssim", "rfid")}}

    def scored(self, cell: Cell, seed: str) -> dict[str, Any]:
        """The cell's score, from its file where it was run before with the same options."""
        path, record = self.out / f"{cell.name}.{seed}.json", {**asdict(cell), "per_class": self.options.per_class}
        record = json.loads(json.dumps({**record, "scale": self.options.scale, "seconds": self.options.seconds}))
        if path.is_file():
            score: dict[str, Any] = json.loads(path.read_text())
            if score["cell"] != record:
                raise Failure(f"{path} was made with other options: {score['cell']}\nchoose another --out")
            return score
        print(f"run.py: {cell.name}, seed {seed}", file=sys.stderr)
        score = {**self.score(cell, seed), "cell": record}
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(score))
        partial.rename(path)
        return score


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps_in(run: Path, seconds: float) -> int:
    """Steps that fit into the seconds, at the rate between a run's first and last logged step, start-up left out."""
    logged = [row for row in metrics(run) if "images_per_second" in row]
    batch = json.loads((run / "run.json").read_text())["settings"]["recipe"]["generator"]["train"]["batch"]
    start, end = (row["step"] * batch / row["images_per_second"] for row in (logged[0], logged[-1]))
    return round(seconds * (logged[-1]["step"] - logged[0]["step"]) / (end - start))


def held_out_gap(run: Path) -> dict[str, Any]:
    """Steps, and how far the held-out measure is ahead of the model-free baseline: mean over t, and at t = T.

    RDPM: cross-entropy and accuracy. ResGen: NLL by the number of masked depths.
    """
    rows = metrics(run)
    steps = rows[-1]["step"]
    if likelihoods := [row for row in rows if "heldout/nll" in row]:
        pairs = zip(likelihoods[-1]["heldout/nll"], likelihoods[-1]["heldout/baseline"], strict=True)
        known = [(nll, baseline) for nll, baseline in pairs if nll is not None]
        nll = statistics.mean(value for value, _ in known)
        return {"steps": steps, "heldout_nll": nll, "nll_gap": statistics.mean(b for _, b in known) - nll}
    last = [row for row in rows if "heldout/accuracy" in row][-1]
    gaps = [a - b for a, b in zip(last["heldout/accuracy"], last["heldout/baseline"], strict=True)]
    heldout_ce = statistics.mean(last["heldout/ce"])
    return {"steps": steps, "heldout_ce": heldout_ce, "accuracy_gap": statistics.mean(gaps), "gap_at_T": gaps[-1]}


def seconds_an_image(log: Sequence[str]) -> float | None:
    """From the log of a `sample` that drew something; None where it found all samples finished."""
    lines = [line for line in map(json.loads, log) if line["kind"] == "finished" and line["job"] == "sample"]
    rates = [line["seconds"] / (line["done"] - line["before"]) for line in lines if line["done"] > line["before"]]
    return rates[-1] if rates else None


# ---- the table ---------------------------------------------------------------------------------------------------


def value_of(score: dict[str, Any], column: str) -> int | float | None:
    """The first of the column's names that the score has."""
    return next((score[name] for name in column.split("/") if name in score), None)


def summary(scores: dict[int, dict[str, Any]], column: str) -> tuple[float, float] | None:
    """Mean and standard deviation over seeds, None where a seed lacks the score."""
    values = [value_of(score, column) for score in scores.values()]
    numbers = [float(value) for value in values if value is not None]
    if len(numbers) < len(values):
        return None
    return statistics.mean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def cell_text(scores: dict[int, dict[str, Any]], column: str) -> str:
    """`12.34 ± 0.05`; a count that all seeds share as it is; n/a."""
    values = {value_of(score, column) for score in scores.values()}
    if len(values) == 1 and isinstance(count := next(iter(values)), int):
        return str(count)
    if (both := summary(scores, column)) is None:
        return "n/a"
    mean, spread = both
    digits = 4 if abs(mean) < 10 else 2 if abs(mean) < 100 else 1
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if len(scores) > 1 else "")


def write_table(out: Path, table: Table, cells: Sequence[Cell], scores: Scores, title: str) -> str:
    """table.md, table.csv and plot.png. -> the Markdown."""
    papers = {cell.name: cell.paper for cell in cells}
    with_paper = any(papers.values())
    header = ["cell", "seeds", *table.columns, *(["paper"] if with_paper else [])]
    lines = [header, ["---"] * len(header)]
    for name, by_seed in scores.items():
        texts = [cell_text(by_seed, column) for column in table.columns]
        lines.append([name, str(len(by_seed)), *texts, *([papers[name]] if with_paper else [])])
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    (out / "table.md").write_text(text)
    with (out / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["cell", "seed", *table.columns])
        for name, by_seed in scores.items():
            for seed, score in by_seed.items():
                writer.writerow([name, seed, *(value_of(score, column) for column in table.columns)])
    plot(out / "plot.png", scores, table.columns[0], title)
    return text


def plot(path: Path, scores: Scores, column: str, title: str) -> None:
    """One point a cell with its spread over seeds; points rather than bars, since the axis need not start at 0."""
    points = {name: both for name, by_seed in scores.items() if (both := summary(by_seed, column))}
    figure = Figure(figsize=(7, 0.32 * len(points) + 1.5), dpi=120, layout="constrained")
    axis = figure.add_subplot()
    means, spreads = [mean for mean, _ in points.values()], [spread for _, spread in points.values()]
    axis.errorbar(means, list(points), xerr=spreads, fmt="o", color="#2f5d8c", ecolor="#333333", capsize=3)
    axis.grid(axis="x", color="#dddddd")
    axis.set_ylim(len(points) - 0.5, -0.5)
    seeds = max(map(len, scores.values()))
    axis.set_xlabel(f"{column}\n" + (f"mean and standard deviation over {seeds} seeds" if seeds > 1 else "one seed"))
    axis.set_title(title)
    FigureCanvasAgg(figure).print_png(str(path))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=list(TABLES))
    parser.add_argument("--scale", choices=list(SCALES), default="digits")
    parser.add_argument("--images", help="training images; needed but for digits")
    parser.add_argument("--heldout", help="held-out images; default: the training images")
    parser.add_argument("--out", type=Path, help="default: runs/ablations/TABLE-SCALE")
    parser.add_argument("--seeds", nargs="+", metavar="SEED", help="default: by scale")
    parser.add_argument("--cells", nargs="+", metavar="CELL", help="only these rows")
    parser.add_argument("--per-class", type=int, default=80, help="samples a class")
    parser.add_argument("--seconds", type=float, help="of cells at equal time; 0: as the recipe says")
    parser.add_argument("--gpus", type=int, help="processes of each command, one a GPU")
    parser.add_argument("--ref", help="reference of the scores; default: the images that the chain recorded")
    parser.add_argument("--ckpt", help="of table3: a trained generator")
    parser.add_argument("--cfg", default="1.0", help="of table3: lambda")
    parser.add_argument("--tau", default="1.0", help="of table3: inverse temperature")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    table, scale = TABLES[options.table], SCALES[options.scale]
    if options.scale != "digits" and not options.images:
        raise Failure(f"--scale {options.scale} needs --images, a folder or .zip of class folders")
    if shutil.which("rdpm") is None:
        raise Failure("rdpm is not on the PATH: activate the environment that it is installed in")
    images = options.images or "digits:train"
    heldout = options.heldout or ("digits:heldout" if options.scale == "digits" else images)
    cells = table.cells(scale, options)
    if options.cells:
        if unknown := set(options.cells) - {cell.name for cell in cells}:
            raise Failure(f"{options.table} has no cell {sorted(unknown)[0]}")
        cells = [cell for cell in cells if cell.name in options.cells]
    out = options.out or Path("runs/ablations") / f"{options.table}-{options.scale}"
    out.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(options, scale, out, images, heldout)
    seeds = options.seeds or (options.scale == "digits" and table.seeds) or scale.seeds
    scores = {cell.name: {int(seed): experiment.scored(cell, seed) for seed in seeds} for cell in cells}
    print(write_table(out, table, cells, scores, f"{table.title}, {options.scale}"), end="")


if __name__ == "__main__":
    main()

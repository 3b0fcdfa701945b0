"""Run experiments of the papers: cells over training seeds, each a chain of `rdpm` commands, then a table and a plot.

    python recipes/ablations/run.py table2                                  # built-in digits, minutes on a CPU
    python recipes/ablations/run.py noise views --scale shapes --jobs 2     # built-in shapes, hours
    python recipes/ablations/run.py table2 --scale cifar10 --images cifar10-train.zip
    python recipes/ablations/run.py speech-families --scale speech --images fsdd.zip
    python recipes/ablations/run.py table5 --scale imagenet256 --images imagenet/train --heldout imagenet/val --gpus 8

What the commands write is in --work, where cells with equal options share it. The scores of each finished cell are a
line of OUT/cells.jsonl: the same command again runs only what is not there, and goes on where a command was stopped.
After a change of a recipe name another --out and --work.
OUT/table.md has the mean over training seeds ± its standard deviation, and in brackets the standard deviation over
sample seeds; then the rows that need no generator, and the paper's. OUT/plot.png draws its first column.
"""

import argparse
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import speech
import voices
from experiments import OUT, SCALES, TABLES, Cell, Command, Scale, Table, Words
from tables import Record, Score, costs, curves, dots, markdown, numbers, rows_of

from rdpm_cli import files
from rdpm_cli.errors import RdpmError

SECONDS = ("seconds_a_sample", "seconds_an_image", "images_per_second")


class Failure(SystemExit):
    """One line on stderr and an exit code."""

    def __init__(self, message: str, code: int = 2) -> None:
        print(f"run.py: error: {message}", file=sys.stderr)
        super().__init__(code)


@dataclass
class Experiment:
    """The commands that cells are made of. What several cells share is made once."""

    options: argparse.Namespace
    scale: Scale
    work: Path
    parts: tuple[str, str]  # training and held-out images, or strings of words
    made: set[str] = field(default_factory=set)
    locks: defaultdict[str, threading.Lock] = field(default_factory=lambda: defaultdict(threading.Lock))

    def rdpm(self, words: Sequence[str]) -> Score:
        """Run a command and return its JSON, with the seconds an item of its jobs. Its failure ends the program."""
        several = ("--gpus", str(self.options.gpus)) if self.options.gpus and "judge" not in words else ()
        command = ["rdpm", "--log-format", "json", *words, "--json", *several]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failure(f"{shlex.join(command)}\n{done.stderr[-2000:]}", done.returncode)
        result: Score = json.loads(done.stdout)
        for text in done.stderr.splitlines():
            line = json.loads(text) if text.startswith("{") else {}  # else a warning of a library
            if line.get("kind") == "finished" and line["done"] > line["before"]:
                result[f"{line['job']}_seconds"] = line["seconds"] / (line["done"] - line["before"])
        return result

    def stage(self, kind: str, *words: str | Path) -> tuple[Path, Score]:
        """Run a command unless a cell has. -> the path that replaces OUT among its words, and the JSON that it printed.

        A command with an OUT is run once a process: it resumes, and refuses a folder of other settings."""
        named = [str(word).removeprefix(f"{self.work}{os.sep}") for word in words]
        path = self.work / f"{kind}-{short_hash(json.dumps(named))}"
        note = path.with_suffix(".json")
        with self.locks[path.name]:
            result: Score = files.read_json(note) if note.is_file() else {}
            if path.name not in self.made and (OUT in words or not result):
                result |= self.rdpm([re.sub(rf"^{OUT}\b", str(path), str(word)) for word in words])
                files.write_json(note, result)
            self.made.add(path.name)
        return path, result

    def subset(self, count: int | None) -> str:
        """Evenly spaced training images, as a .zip; None: all of them."""
        train, _ = self.parts
        if count is None:
            return train
        from rdpm_cli.data.open import open_source  # seconds to import
        from rdpm_cli.data.source import spread

        path = self.work / f"train-{count}-{short_hash(train)}.zip"
        with self.locks[path.name]:
            if not path.is_file():
                source = open_source(train)
                write_zip(source, spread(len(source), count), path)
        return str(path)

    def judge(self) -> str:
        train, heldout = self.parts
        words = ("eval", "judge", train, OUT, "--heldout", heldout, *(self.scale.judge or ()))
        return str(self.stage("judge", *words)[0] / "judge.pt")

    def extractor(self) -> Words:
        """Options of `eval` that name the extractor."""
        return () if self.scale.judge is None else ("--extractor", self.judge())

    def reference(self) -> Words:
        """Options of `eval` that name the extractor and the reference: --ref, or the training images."""
        extractor = self.extractor()
        if self.options.ref:
            return (*extractor, "--ref", self.options.ref)
        words = ("eval", "reference", self.parts[0], f"{OUT}.npz", *self.scale.crop, *extractor)
        return (*extractor, "--ref", f"{self.stage('reference', *words)[0]}.npz")

    def tokenizer(self, cell: Cell, seed: str, data: str) -> Path:
        words = ("train-tokenizer", data, *cell.tokenizer, "--seed", seed, "--out", OUT)
        return self.stage("tokenizer", *words)[0] / "tokenizer.pt"

    def codes(self, cell: Cell, tokenizer: Path, seed: str, data: str) -> Path:
        words = ("tokenize", data, OUT, "--tokenizer", tokenizer, "--seed", seed)
        return self.stage("codes", *words, *cell.tokenize)[0]

    def score(self, cell: Cell, seed: str) -> Record:
        """Run a cell for one seed. -> its scores as `cell`, and the rows that need no generator, by name."""
        if self.scale.chain != "images":
            return (speech if self.scale.chain == "strings" else voices).score(self, cell, seed)
        images, heldout = self.parts
        tokenizer = self.tokenizer(cell, seed, images)
        words: Command = ("eval", "recon", heldout, "--tokenizer", tokenizer, "--seeds", "2")
        recon = numbers(self.stage("recon", *words, *self.extractor())[1])
        if not cell.generator:
            return {"cell": recon}
        codes = self.codes(cell, tokenizer, seed, self.subset(cell.images))
        run, trained = self.train(cell, codes, seed)
        sampling = tuple(word.replace("RUN@", f"{run}@") for word in cell.sampling)
        draw: Command = ("--ckpt", run / "generator.pt", *sampling)
        drawn = self.stage("samples", "sample", *draw, "--classes", "0-9", "--out", OUT)[1]
        per_class, seeds = (str(getattr(self.options, name)) for name in ("per_class", "sample_seeds"))
        many = ("--per-class", per_class, "--seeds", seeds, *self.reference())
        scores = numbers(self.stage("scores", "eval", "all", *draw, *many)[1])
        scores |= {f"recon.{name}": value for name, value in recon.items()}
        scores |= numbers({"seconds_an_image": drawn.get("sample_seconds"), "passes": drawn["passes"], **trained})
        if cell.images:  # few: are they copied?
            subset = self.subset(cell.images)
            among: Command = ("--ref", subset, "--heldout", heldout, "--codes", codes, *self.extractor())
            scores |= numbers(self.stage("memory", "eval", "memory", *draw, "--per-class", per_class, *among)[1])
        if cell.flops:
            scores |= numbers(cost(run / "generator.pt", sampling))
            if self.options.jobs > 1:  # seconds beside other jobs are no measurement
                scores = {name: value for name, value in scores.items() if name not in SECONDS}
        words = ("eval", "baselines", images, "--heldout", heldout, "--codes", codes, *self.scale.crop, *many)
        rows = self.stage("baselines", *words)[1]["rows"]
        return {"cell": scores, **{name: numbers(row) for name, row in rows.items()}}

    def train(self, cell: Cell, codes: Path, seed: str) -> tuple[Path, Score]:
        """A generator on these codes. -> its run; parameters, steps, and means over t of the last measurement.

        A timed cell has as many steps as fit into its seconds, by the rate of a short run."""
        words: Command = ("train-gen", codes, *cell.generator, "--seed", seed)
        words += () if self.scale.chain != "images" else ("--heldout", self.parts[1])
        seconds = self.options.seconds
        length: Words = ()
        if cell.timed and seconds:
            probe, _ = self.stage("probe", *words, "train.steps=80", "train.log_every=40", "--out", OUT)
            length = (f"train.steps={steps_in(probe, seconds)}", "train.eval_every=0")
        if cell.flops:
            operations = self.stage("plan", *words, "--dry-run")[1]["flops"]["step"]
            length = (f"train.steps={round(cell.flops / operations)}", "train.eval_every=0", "train.save_every=100")
        run, result = self.stage("generator", *words, *length, "--out", OUT)
        prefix = "heldout_images/"
        measured = {name.removeprefix(prefix): value for name, value in result.items() if name.startswith(prefix)}
        means = {
            f"heldout.{name}": statistics.mean(v for v in value if v is not None) if isinstance(value, list) else value
            for name, value in measured.items()
        }
        lines, training = metrics(run), recorded_training(run)
        steps = lines[-1]["step"]
        sizes = {"parameters": result["parameters"], "train_steps": steps, "images": steps * training["batch"]}
        return run, {**sizes, **means, **stability(lines, training.get("clip") or math.inf)}


def parts_of(options: argparse.Namespace, scale: Scale, work: Path) -> tuple[str, str]:
    """Training and held-out images. Where none are held out, the judge's rule does it, into two .zip, or strings."""
    train, heldout = options.images or scale.images, options.heldout or scale.heldout
    if scale.chain == "strings":
        return speech.strings(train, work / f"strings-{short_hash(train)}")
    if scale.chain == "voices":
        return voices.write(work / "voices")
    if heldout:
        return train, heldout
    from rdpm_cli.data.open import open_source  # seconds to import
    from rdpm_cli.evaluation import judge

    paths = [work / f"{part}-{short_hash(train)}.zip" for part in ("train", "heldout")]
    if not paths[1].is_file():
        for source, path in zip(judge.split(open_source(train)), paths, strict=True):
            write_zip(source, range(len(source)), path)
    return str(paths[0]), str(paths[1])


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def write_zip(source: Any, indices: Iterable[int], path: Path) -> None:
    """Images of an rdpm_cli.data.source.Source as PNG files in class folders."""
    labels = source.need_labels()

    def write(file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            for index in indices:
                content = io.BytesIO()
                source.image(index).save(content, "PNG")
                archive.writestr(f"{source.class_names[labels[index]]}/{index:07d}.png", content.getvalue())

    files.write_atomic(path, write)


def metrics(run: Path) -> list[Score]:
    """The lines of RUN/metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def recorded_training(run: Path) -> Score:
    """The section `train` of a run's recipe."""
    record: Score = json.loads((run / "run.json").read_text())["settings"]["recipe"]["generator"]["train"]
    return record


def stability(lines: Sequence[Score], clip: float) -> Score:
    """Of the second half of a training's log: images a second, gradient norms, the share of them that was clipped.

    loss_jumps: standard deviation of the loss about its trend, by the differences between lines, in the loss's unit."""
    logged = [row for row in lines if "grad_norm" in row]
    half = logged[len(logged) // 2 :]
    norms, losses = ([row[name] for row in half] for name in ("grad_norm", "loss"))
    jumps = [b - a for a, b in itertools.pairwise(losses)]
    return {
        "images_per_second": statistics.median(row["images_per_second"] for row in half),
        "grad_norm": statistics.mean(norms), "clipped": statistics.mean(norm > clip for norm in norms),
        "loss_jumps": math.sqrt(statistics.mean(jump**2 for jump in jumps) / 2) if jumps else None,
    }  # fmt: skip


def cost(ckpt: Path, sampling: Words) -> Score:
    """What cost.py prints, in a process of its own, whose memory is that of this generator alone."""
    script = Path(__file__).parent / "cost.py"
    command = ["python", str(script), str(ckpt), *sampling]  # of the environment that has the rdpm on the PATH
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"{script}: {done.stderr[-2000:]}", done.returncode)
    result: Score = json.loads(done.stdout)
    return result


def steps_in(run: Path, seconds: float) -> int:
    """Steps that fit into the seconds, at the rate between a run's first and last logged step, start-up left out."""
    logged = [row for row in metrics(run) if "images_per_second" in row]
    batch = recorded_training(run)["batch"]
    start, end = (row["step"] * batch / row["images_per_second"] for row in (logged[0], logged[-1]))
    return round(seconds * (logged[-1]["step"] - logged[0]["step"]) / (end - start))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", choices=list(TABLES), metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--scale", choices=list(SCALES), default="digits")
    parser.add_argument("--images", help="training images, or recordings; needed for cifar10, imagenet256 and speech")
    parser.add_argument("--heldout", help="needed for imagenet256; default for cifar10: a tenth of --images")
    parser.add_argument("--out", type=Path, help="folder of one folder a table; default: runs/ablations")
    parser.add_argument("--work", type=Path, help="what the commands write; default: runs/ablations/SCALE")
    parser.add_argument("--seeds", nargs="+", metavar="SEED", help="training seeds; default: by scale")
    parser.add_argument("--cells", nargs="+", metavar="CELL", help="only these rows")
    parser.add_argument("--per-class", type=int, help="samples a class and sample seed; default: by scale")
    parser.add_argument("--sample-seeds", type=int, help="default: by scale")
    parser.add_argument("--seconds", type=float, help="of cells at equal time; 0: as the recipe says")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time; with several, `families` has no seconds")
    parser.add_argument("--gpus", type=int, help="processes of each command, one a GPU")
    parser.add_argument("--ref", help="reference of the scores; default: the training images")
    options = parser.parse_args()
    scale = SCALES[options.scale]
    if scale.chain != "images" and (options.heldout or options.ref or options.per_class or options.gpus):
        raise Failure("--heldout, --ref, --per-class and --gpus are for images")
    options.per_class = options.per_class or scale.per_class
    options.sample_seeds = options.sample_seeds or scale.sample_seeds
    options.seconds = scale.seconds if options.seconds is None else options.seconds
    return options


def run(experiment: Experiment, name: str, table: Table) -> str:
    """Run the cells of a table that have no scores yet. -> the table."""
    options, scale, lock = experiment.options, experiment.scale, threading.Lock()
    cells = table.cells(scale)
    if options.cells:
        if unknown := set(options.cells) - {cell.name for cell in cells}:
            raise Failure(f"{name} has no cell '{sorted(unknown)[0]}'; it has {', '.join(cell.name for cell in cells)}")
        cells = [cell for cell in cells if cell.name in options.cells]
    out = (options.out or Path("runs/ablations")) / f"{name}-{options.scale}"
    out.mkdir(parents=True, exist_ok=True)
    log, records = out / "cells.jsonl", dict[str, dict[str, Record]]()
    named = ("images", "heldout", "ref", "per_class", "sample_seeds", "seconds")
    setting = {option: getattr(options, option) for option in named}
    if options.jobs > 1 and any(cell.timed for cell in cells):
        raise Failure(f"{name} has cells of equal time, which other jobs would slow down; leave --jobs out")
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    finished = {json.dumps([line["made_by"], line["seed"]]): line["scores"] for line in lines}

    def score(pair: tuple[Cell, str]) -> None:
        cell, seed = pair
        made_by = {**json.loads(json.dumps(asdict(cell))), **setting}
        if cell.flops is None:  # lines of earlier tables do not have it
            del made_by["flops"]
        if (scores := finished.get(json.dumps([made_by, seed]))) is None:
            scores = experiment.score(cell, seed)
            with lock, log.open("a") as file:
                file.write(json.dumps({"made_by": made_by, "seed": seed, "scores": scores}) + "\n")
            print(f"run.py: {name}: {cell.name}, seed {seed}", file=sys.stderr)
        records.setdefault(cell.name, {})[seed] = scores

    seeds = options.seeds or scale.seeds
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(score, [(cell, seed) for seed in seeds for cell in cells]))
    rows = rows_of(cells, {cell.name: {seed: records[cell.name][seed] for seed in seeds} for cell in cells})
    title, plot = f"{table.title}, {options.scale}", out / "plot.png"
    text = markdown(table, rows, title)
    files.write_atomic(out / "table.md", lambda file: file.write(text.encode()))
    if table.plot == "curves":
        curves(plot, rows[: len(cells)], table.columns[0], title)
    elif table.plot == "costs":
        costs(plot, rows[: len(cells)], table.columns[0], title)
    else:
        dots(plot, rows, table.columns[0], title)
    return text


def main() -> None:
    options = arguments()
    scale = SCALES[options.scale]
    if not (options.images or scale.images):
        kind = "recordings of single words" if scale.chain == "strings" else "a folder or .zip of class folders"
        raise Failure(f"--scale {options.scale} needs --images, {kind}")
    if foreign := [name for name in options.tables if TABLES[name].chain != scale.chain]:
        names = ", ".join(name for name, table in TABLES.items() if table.chain == scale.chain)
        raise Failure(f"{foreign[0]} is not for --scale {options.scale}, which has {names}")
    if scale.flops is None and (costly := [name for name in options.tables if TABLES[name].plot == "costs"]):
        named = ", ".join(name for name, other in SCALES.items() if other.flops)
        raise Failure(f"{costly[0]} is not for --scale {options.scale}, but for {named}")
    if options.scale == "imagenet256" and not options.heldout:
        raise Failure("--scale imagenet256 needs --heldout, its validation images")
    if shutil.which("rdpm") is None:
        raise Failure("rdpm is not on the PATH: activate the environment that it is installed in")
    work = options.work or Path("runs/ablations") / options.scale
    work.mkdir(parents=True, exist_ok=True)
    try:
        parts = parts_of(options, scale, work.resolve())
    except RdpmError as error:
        raise Failure(f"{error}; {error.hint}", error.exit_code) from error
    experiment = Experiment(options, scale, work.resolve(), parts)
    for name in options.tables:
        print(run(experiment, name, TABLES[name]))


if __name__ == "__main__":
    main()

"""The chain of sound: strings of spoken words, and the commands of a cell on them.

Strings, held-out strings, the lines to be said and the judge are those of seed 0, made as `rdpm demo speech` makes
them; a training seed changes tokenizer, codes and generator."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import OUT, Cell, Command
from tables import Record, Score, numbers

if TYPE_CHECKING:
    from run import Experiment

LISTS = {"": "samples", "another.": "another text"}  # beginning of the names of scores -> list of lines


def strings(recordings: str, out: Path) -> tuple[str, str]:
    """Manifests of training and of held-out strings of these recordings of single words; next to them the lists."""
    from rdpm_cli.data.audio import open_audio  # seconds to import
    from rdpm_cli.engine import speech_demo

    paths = speech_demo.write_data(open_audio(recordings), out, seed=0)
    return str(paths["train"]), str(paths["heldout"])


def score(experiment: "Experiment", cell: Cell, seed: str) -> Record:
    """Run a cell for one seed. -> its scores as `cell`, and those of real strings and of reconstructions.

    rho: of ResGen's codes, the RMS of the sum of all books but the first, as a share of that of all books."""
    from rdpm_cli.engine import speech_demo

    stage, data = experiment.stage, Path(experiment.parts[1]).parents[1]

    def heard(target: str | Path, *options: str | Path) -> Score:
        return numbers(stage("scores", "eval", "speech", target, "--judge", experiment.judge(), *options)[1])

    train = experiment.parts[0]
    tokenizer = experiment.tokenizer(cell, seed, train)
    recon = heard(experiment.parts[1], "--tokenizer", tokenizer)
    run, trained = experiment.train(cell, experiment.codes(cell, tokenizer, seed, train), seed)
    scores = numbers(trained) | {f"recon.{name}": value for name, value in recon.items()}
    for beginning, title in LISTS.items():
        rows = []
        for sample_seed in range(experiment.options.sample_seeds):
            draw: Command = ("--ckpt", run / "generator.pt", *cell.sampling, "--list", data / speech_demo.LISTS[title])
            folder, drawn = stage("samples", "sample", *draw, "--seed", str(sample_seed), "--out", OUT)
            rows.append(heard(folder) | numbers({"seconds_a_sample": drawn.get("sample_seconds")}))
        scores |= {beginning + name: value for name, value in over_seeds(rows).items()}
    rho = stage("inspect", "inspect", run / "generator.pt")[1]["provenance"].get("rho")
    scores |= numbers({"rho": rho[-2] / rho[-1]} if rho else {})
    rebuilt = {name: value for name, value in recon.items() if not name.startswith("sim")}  # to no prompt, but itself
    return {"cell": scores, "real strings": heard(data / "real"), "reconstructions": rebuilt}


def over_seeds(scores: Sequence[Score]) -> Score:
    """Mean and standard deviation over sample seeds of each score that all have."""
    names = [name for name in scores[0] if all(name in score for score in scores)]
    values = {name: [score[name][0] for score in scores] for name in names}
    return {name: [statistics.mean(v), statistics.stdev(v) if len(v) > 1 else None] for name, v in values.items()}

"""What a cell's score file lacks: its generator's size, its gap to the model-free baseline, passes, seconds.

Also how many steps of a run fit into some seconds, and whether weights are there.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any


def rows(run: Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps_in(run: Path, seconds: float) -> int:
    """At the rate between the first and the last logged step, without the start."""
    logged = [row for row in rows(run) if "images_per_second" in row]
    batch = json.loads((run / "run.json").read_text())["settings"]["recipe"]["generator"]["train"]["batch"]
    ends = [
        row["step"] * batch / row["images_per_second"] for row in (logged[0], logged[-1])
    ]  # seconds since the start
    return round(seconds * (logged[-1]["step"] - logged[0]["step"]) / (ends[1] - ends[0]))


def gap(run: Path) -> dict[str, Any]:
    """steps; cross-entropy and (accuracy - baseline), means over t; the gap of the last t alone.

    Of ResGen the NLL and (baseline - NLL), means over the number of masked depths.
    """
    log = rows(run)
    if held := [row for row in log if "heldout/nll" in row]:
        pairs = zip(held[-1]["heldout/nll"], held[-1]["heldout/baseline"], strict=True)
        known = [(nll, baseline) for nll, baseline in pairs if nll is not None]
        nll = statistics.mean(nll for nll, _ in known)
        return {"steps": log[-1]["step"], "heldout_nll": nll, "nll_gap": statistics.mean(b for _, b in known) - nll}
    last = [row for row in log if "heldout/accuracy" in row][-1]
    gaps = [a - b for a, b in zip(last["heldout/accuracy"], last["heldout/baseline"], strict=True)]
    ce = statistics.mean(last["heldout/ce"])
    return {"steps": log[-1]["step"], "heldout_ce": ce, "accuracy_gap": statistics.mean(gaps), "gap_at_T": gaps[-1]}


def drawn(said: dict[str, Any], log: list[str]) -> dict[str, Any]:
    """Of what `rdpm --log-format json sample --json` said: network passes, and seconds an image without the start.

    The seconds are those of the last call that drew any; none where the log has no such call.
    """
    told = [line for line in map(json.loads, log) if line["kind"] == "finished" and line["job"] == "sample"]
    rates = [line["seconds"] / (line["done"] - line["before"]) for line in told if line["done"] > line["before"]]
    return {"passes": said["passes"], "seconds_an_image": rates[-1] if rates else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", help="a generator's run")
    parser.add_argument("--steps-in", type=float, metavar="SECONDS", help="print how many of the run's steps fit")
    parser.add_argument("--into", type=Path, metavar="JSON", help="add what is found to this file")
    parser.add_argument("--trained", type=Path, metavar="JSON", help="what train-gen said")
    parser.add_argument("--drawn", type=Path, metavar="JSON", help="what sample said")
    parser.add_argument("--log", type=Path, metavar="JSONL", help="and its log")
    parser.add_argument("--weights", metavar="NAME", help="exit 0 if what doctor said, on stdin, has found them")
    parser.add_argument("--recon", type=Path, metavar="JSON", help="scores of reconstructions")
    options = parser.parse_args()
    if options.weights:
        sys.exit(json.load(sys.stdin)["weights"][options.weights]["state"] != "found")
    if options.steps_in is not None:
        print(steps_in(options.run, options.steps_in))
    if options.into is None:
        return
    found = gap(options.run) if options.run else {}
    if options.trained:
        found |= {"parameters": json.loads(options.trained.read_text())["parameters"]}
    if options.drawn:
        found |= drawn(json.loads(options.drawn.read_text()), options.log.read_text().splitlines())
    if options.recon:
        recon = json.loads(options.recon.read_text())
        found |= {f"recon_{name}": recon[name] for name in ("mse", "psnr", "ssim", "rfid")}
    options.into.write_text(json.dumps({**json.loads(options.into.read_text()), **found}))


if __name__ == "__main__":
    main()

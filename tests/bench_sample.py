"""Speed of sampling at 256×256 (T = 10, 256 tokens). By hand: python tests/bench_sample.py --help

Transformer and decoder apart, with random weights and codes: neither changes the work. Times are thread CPU seconds of
one core (on CUDA: wall seconds between synchronisations), medians of rounds in which all competitors take turns, after
one warm-up each.

The floor of the transformer is the time of its matrix products' operations at the rate of one large product (2048³ on a
CPU, 8192³ in bf16 on CUDA), that of the decoder the time of its convolutions alone; all in the same rounds. (The same
products called one by one are no floor: attention's fused kernel beats them.) With --steps the loop takes fewer steps,
and its time is that times T / steps; the passes are counted over all T.
"""

import argparse
from typing import Any

import torch
from bench_train import CLASSES, SIDE, C, K, make_generator
from benches import Job, convolutions, race, table, verdict
from torch.utils.flop_counter import FlopCounterMode

from rdpm_cli.cli.app import tune_allocator
from rdpm_cli.generator.config import RDPMSampling
from rdpm_cli.generator.contract import SampleOptions
from rdpm_cli.generator.rdpm import RDPM
from rdpm_cli.recipes import load_recipe
from rdpm_cli.tokenizer.model import Tokenizer

T = 10
TARGET_FLOORS, TARGET_GAIN = 1.25, 1.6
PLAIN = {"cfg": 1.5, "cfg_schedule": "constant"}
WAYS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "gated": {"cfg": 1.5, "cfg_schedule": "linear"},
    "gated, skip_steps 4": {"cfg": 1.5, "cfg_schedule": "linear", "skip_steps": 4},
    "no guidance": {"cfg": 0.0},
}


def options(way: dict[str, Any], draw: str) -> SampleOptions:
    return SampleOptions(RDPMSampling(**way, draw=draw))


def sampled(generator: RDPM, count: int, sampling: SampleOptions) -> Job:
    """One micro-batch of samples, with the embedding of its classes."""
    device = next(generator.network.parameters()).device
    labels, indices = torch.arange(count, device=device) % CLASSES, torch.arange(count)
    return lambda: generator.sample(generator.condition({"labels": labels}), indices, sampling)


def operations(job: Job) -> int:
    """Multiplications and additions in the matrix products of a job."""
    with FlopCounterMode(display=False) as counter:
        job()
    return counter.get_total_flops()


def product(side: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Job:
    """One large product of 2 side³ operations: the rate that the machine reaches."""
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    return lambda: torch.mm(a, b)


@torch.no_grad()
def bench_transformer(depth: int, batches: list[int], rounds: int, steps: int, draw: str) -> None:
    device = torch.device("cpu")
    generator = make_generator(depth, device)
    generator.network.eval().requires_grad_(False)
    counted = {name: generator.passes(options(way, draw)) for name, way in WAYS.items()}
    generator.quantizer.steps = steps  # all steps of a kind cost the same
    rows = []
    for count in batches:
        ways = WAYS if steps == T else {"plain": PLAIN}
        jobs = {name: sampled(generator, count, options(way, draw)) for name, way in ways.items()}
        flops = operations(jobs["plain"])
        seconds = race({"product": product(2048, device), **jobs}, rounds, device)
        rate = 2 * 2048**3 / seconds.pop("product")
        seconds = {name: value * T / steps for name, value in {"floor": flops / rate, **seconds}.items()}
        work = flops * T / steps / count / 1e9
        print(f"a product of 2048³: {rate / 1e9:.0f} GF/s; the plain loop: {work:.0f} GF an image")
        for name, value in seconds.items():
            share = counted.get(name, counted["plain"]) / counted["plain"]
            floors, gain = value / (seconds["floor"] * share), seconds["plain"] / value
            met = {"plain": floors <= TARGET_FLOORS, "gated, skip_steps 4": gain >= TARGET_GAIN}
            goal = verdict(met[name]) if name in met else ""
            passes = str(counted.get(name, ""))
            rows.append([f"B = {count}, {name}", passes, f"{value / count:.2f}", f"{floors:.2f}", f"{gain:.2f}", goal])
    note = "" if steps == T else f", from {steps} of {T} steps"
    print(f"d{depth}, {draw}, fp32, {rounds} rounds{note}; goals: plain <= {TARGET_FLOORS} floors, "
          f"gated with skip_steps 4 >= {TARGET_GAIN} times as fast")  # fmt: skip
    table(["transformer", "passes", "s/image", "floors", "x plain", "goal"], rows)


def make_tokenizer(width: int) -> Tokenizer:
    cfg = load_recipe("imagenet256-tokenizer", [f"autoencoder.width={width}"], "tokenizer").tokenizer
    assert cfg is not None
    return Tokenizer(cfg).eval().requires_grad_(False)


@torch.no_grad()
def bench_decoder(width: int, batches: list[int], rounds: int) -> None:
    rows = []
    for count in batches:
        jobs: dict[str, Job] = {}
        for form, layout in (("NCHW", torch.contiguous_format), ("channels_last", torch.channels_last)):
            tokenizer, z = make_tokenizer(width), torch.randn(count, C, SIDE * SIDE)
            for part in (tokenizer.post_quant_conv, tokenizer.decoder):
                part.to(memory_format=layout)
            jobs[form] = lambda tokenizer=tokenizer, z=z: tokenizer.decode_latents(z)  # type: ignore[misc]
            jobs[f"its convolutions, {form}"] = convolutions(tokenizer, jobs[form])
        seconds = race(jobs, rounds, torch.device("cpu"))
        best = min(seconds["its convolutions, NCHW"], seconds["its convolutions, channels_last"])
        for name, value in seconds.items():
            goal = verdict(value / best <= TARGET_FLOORS) if name == "channels_last" else ""
            rows.append([f"B = {count}, {name}", f"{value / count:.2f}", f"{value / best:.2f}", goal])
    print(f"decoder, width {width}, fp32, {rounds} rounds; goal: <= {TARGET_FLOORS} times its convolutions")
    table(["decoder", "s/image", "floors", "goal"], rows)


@torch.no_grad()
def bench_cuda(depth: int, batches: list[int], rounds: int, compiled: str) -> None:
    """bf16, with the noise drawn by one uniform a position; seconds an image of transformer and decoder."""
    device = torch.device("cuda")
    generator, tokenizer = make_generator(depth, device), make_tokenizer(160).to(device)
    generator.network.eval().requires_grad_(False)
    flops = operations(sampled(generator, 1, options(PLAIN, "inverse")))
    for part in (tokenizer.post_quant_conv, tokenizer.decoder):
        part.to(memory_format=torch.channels_last)
    if compiled != "eager":
        generator.network.compile(mode="reduce-overhead" if compiled == "graphs" else "default")
    rows = []
    with torch.autocast("cuda", torch.bfloat16):
        for count in batches:
            z = torch.randn(count, C, SIDE * SIDE, device=device)
            jobs: dict[str, Job] = {"decoder": lambda z=z: tokenizer.decode_latents(z)}  # type: ignore[misc]
            jobs |= {name: sampled(generator, count, options(way, "inverse")) for name, way in WAYS.items()}
            jobs["product"] = product(8192, device, torch.bfloat16)
            seconds = race(jobs, rounds, device)
            rate = 2 * 8192**3 / seconds.pop("product")
            floor = flops * count / rate
            for name, value in seconds.items():
                floors = f"{value / floor:.2f}" if name == "plain" else ""
                rows.append([f"B = {count}, {name}", f"{1e3 * value / count:.2f}", floors])
    print(f"d{depth}, bf16, {compiled}, {rounds} rounds, K = {K}")
    table(["CUDA", "ms/image", "floors"], rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 16, 20], choices=[12, 16, 20])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="images a pass on the CPU")
    parser.add_argument("--steps", type=int, default=T, choices=range(1, T + 1), help="of the loop, on the CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draw", default="gumbel", choices=["gumbel", "inverse", "argmax"])
    parser.add_argument("--decoder-width", type=int, default=160)
    parser.add_argument("--no-decoder", action="store_true")
    parser.add_argument("--no-transformer", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    tune_allocator()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, 1 thread\n")
    if not args.no_decoder:
        bench_decoder(args.decoder_width, args.batches, args.rounds)
    for depth in () if args.no_transformer else args.depths:
        bench_transformer(depth, args.batches, args.rounds, args.steps, args.draw)
    if not torch.cuda.is_available():
        print("no CUDA device: its runs were not made")
        return
    for depth in args.depths:
        for compiled in ("eager", "default", "graphs"):
            bench_cuda(depth, [1, 64, 256], args.rounds, compiled)


if __name__ == "__main__":
    main()

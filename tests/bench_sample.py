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
from torch import Tensor, nn

from rdpm_cli.config import RDPMSampling
from rdpm_cli.generator import transformer
from rdpm_cli.generator.contract import SampleOptions
from rdpm_cli.generator.rdpm import RDPM
from rdpm_cli.recipe_files import load_recipe
from rdpm_cli.threads import tune_allocator
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


def sampled(generator: RDPM, count: int, how: SampleOptions) -> Job:
    """One micro-batch of samples, the conditions of its classes remembered from the round before."""
    device = next(generator.network.parameters()).device
    labels, indices = torch.arange(count, device=device) % CLASSES, torch.arange(count)
    return lambda: generator.sample(labels, indices, how)


def operations(network: nn.Module, forward: Job) -> int:
    """Multiplications and additions in the matrix products of `forward`: linear layers, attention's two.

    Counted on the network's own calls. Conditions, computed once a job, are not among them.
    """
    count = 0

    def linear(layer: nn.Module, given: tuple[Tensor, ...], _: Tensor) -> None:
        nonlocal count
        assert isinstance(layer, nn.Linear)
        count += 2 * given[0].numel() * layer.out_features

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal count
        count += 4 * q.numel() * q.shape[-2]
        return transformer.sdpa(q, k, v)

    inner = [m for name, m in network.named_modules() if isinstance(m, nn.Linear) and "modulation" not in name]
    hooks = [layer.register_forward_hook(linear) for layer in inner]
    trunk = network.get_submodule("trunk")
    assert isinstance(trunk, transformer.Transformer)
    trunk.use(attend)
    forward()
    trunk.use(transformer.sdpa)
    for hook in hooks:
        hook.remove()
    return count


def product(side: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Job:
    """One large product of 2 side³ operations: the rate that the machine reaches."""
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    return lambda: torch.mm(a, b)


def shorten(generator: RDPM, steps: int) -> None:
    """Let the loop take so many steps: all steps of a kind cost the same."""
    generator.quantizer.steps = steps


def bench_transformer(depth: int, batches: list[int], rounds: int, steps: int, draw: str) -> None:
    device = torch.device("cpu")
    generator = make_generator(depth, device)
    generator.network.eval().requires_grad_(False)
    trunk = generator.network.get_submodule("trunk")
    assert isinstance(trunk, transformer.Transformer)
    counted = {name: generator.passes(options(way, draw)) for name, way in WAYS.items()}
    rows = []
    with transformer.remembering(trunk):
        for count in batches:
            plain = options(PLAIN, draw)
            shorten(generator, steps)
            flops = operations(generator.network, sampled(generator, count, plain))
            jobs = {"product": product(2048, device)}
            if steps == T:
                jobs |= {name: sampled(generator, count, options(way, draw)) for name, way in WAYS.items()}
            else:
                jobs["plain"] = sampled(generator, count, plain)
            found = race(jobs, rounds, device)
            rate = 2 * 2048**3 / found.pop("product")
            seconds = {"floor": flops / rate, **found}
            seconds = {name: value * T / steps for name, value in seconds.items()}
            shorten(generator, T)
            work = flops * T / steps / count / 1e9
            print(f"a product of 2048³: {rate / 1e9:.0f} GF/s; the plain loop: {work:.0f} GF an image")
            for name, value in seconds.items():
                rows.append(_row(f"B = {count}, {name}", name, value, seconds, counted, count))
    note = "" if steps == T else f", from {steps} of {T} steps"
    print(f"d{depth}, {draw}, fp32, {rounds} rounds{note}; goals: plain <= {TARGET_FLOORS} floors, "
          f"gated with skip_steps 4 >= {TARGET_GAIN} times as fast")  # fmt: skip
    table(["transformer", "passes", "s/image", "floors", "x plain", "goal"], rows)


def _row(
    title: str, name: str, value: float, seconds: dict[str, float], counted: dict[str, int], count: int
) -> list[str]:
    share = counted.get(name, counted["plain"]) / counted["plain"]
    floors, gain = value / (seconds["floor"] * share), seconds["plain"] / value
    met = {"plain": floors <= TARGET_FLOORS, "gated, skip_steps 4": gain >= TARGET_GAIN}
    goal = verdict(met[name]) if name in met else ""
    return [title, str(counted.get(name, "")), f"{value / count:.2f}", f"{floors:.2f}", f"{gain:.2f}", goal]


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
            tokenizer, z = make_tokenizer(width), torch.randn(count, C, SIDE, SIDE)
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


def bench_cuda(depth: int, batches: list[int], rounds: int, compiled: str) -> None:
    """bf16, with the noise drawn by one uniform a position; seconds an image of transformer and decoder."""
    device = torch.device("cuda")
    generator, tokenizer = make_generator(depth, device), make_tokenizer(160).to(device)
    generator.network.eval().requires_grad_(False)
    flops = operations(generator.network, sampled(generator, 1, options(PLAIN, "inverse")))
    for part in (tokenizer.post_quant_conv, tokenizer.decoder):
        part.to(memory_format=torch.channels_last)
    if compiled != "eager":
        generator.network.compile(mode="reduce-overhead" if compiled == "graphs" else "default")
    trunk = generator.network.get_submodule("trunk")
    assert isinstance(trunk, transformer.Transformer)
    rows = []
    with transformer.remembering(trunk), torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        for count in batches:
            z = torch.randn(count, C, SIDE, SIDE, device=device)
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
    chosen = arguments()
    tune_allocator()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, 1 thread\n")
    if not chosen.no_decoder:
        bench_decoder(chosen.decoder_width, chosen.batches, chosen.rounds)
    for depth in () if chosen.no_transformer else chosen.depths:
        bench_transformer(depth, chosen.batches, chosen.rounds, chosen.steps, chosen.draw)
    if not torch.cuda.is_available():
        print("no CUDA device: its runs were not made")
        return
    for depth in chosen.depths:
        for compiled in ("eager", "default", "graphs"):
            bench_cuda(depth, [1, 64, 256], chosen.rounds, compiled)


if __name__ == "__main__":
    main()

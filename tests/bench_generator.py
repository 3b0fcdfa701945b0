"""Speed of training and sampling at 256×256 (T = 10, 256 tokens). By hand: python tests/bench_generator.py --help

Times are thread CPU seconds of one core (on CUDA: wall seconds between synchronisations), medians of rounds in which
all competitors take turns, after one warm-up each. Weights and codes are random: neither changes the work. Floors:
train, the matrix products alone, of the same shapes; sample, their operations at the rate of one large product (2048³
on a CPU, 8192³ in bf16 on CUDA). With --steps the sampling loop takes fewer, and its time is multiplied."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from benches import Job, race, table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rdpm_cli.cli.app import tune_allocator
from rdpm_cli.distributed import TrainStep
from rdpm_cli.generator import registry, transformer
from rdpm_cli.generator.config import RDPMConfig, RDPMSampling
from rdpm_cli.generator.contract import SampleOptions
from rdpm_cli.generator.rdpm import RDPM, CodeBatch
from rdpm_cli.recipes import load_recipe
from rdpm_cli.tokenizer.config import QuantizerConfig, ScheduleConfig
from rdpm_cli.tokenizer.quantizer import Quantizer
from rdpm_cli.training.ema import Ema
from rdpm_cli.training.loop import make_optimizer

T, K, C, SIDE, CLASSES = 10, 4096, 32, 16, 1000
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"cfg": 1.5, "cfg_schedule": "constant"},
    "gated": {"cfg": 1.5, "cfg_schedule": "linear"},
    "gated, skip_steps 4": {"cfg": 1.5, "cfg_schedule": "linear", "skip_steps": 4},
    "no guidance": {"cfg": 0.0},
}


def recipe(depth: int) -> RDPMConfig:
    cfg = load_recipe(f"imagenet256-d{depth}").generator
    assert isinstance(cfg, RDPMConfig)
    return cfg


def make_generator(depth: int, device: torch.device) -> RDPM:
    quantizer = Quantizer(QuantizerConfig(codes=K, steps=T, bias="add"), ScheduleConfig(), C, (SIDE, SIDE)).eval()
    generator = RDPM(recipe(depth).network, quantizer.requires_grad_(False).to(device), CLASSES)
    generator.network.to(device).train()
    for parameter in generator.network.parameters():  # AdaLN-Zero's zeros may be multiplied faster
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.02)
    return generator


def losses(generator: RDPM, count: int, device: torch.device) -> Callable[[], Tensor]:
    """The loss of one batch of random codes."""
    codes, labels = (
        torch.randint(K, (count, T, SIDE**2), device=device),
        torch.randint(CLASSES, (count,), device=device),
    )
    t_BJ, eps = torch.randint(1, T + 1, (count, 1), device=device), torch.randn(count, 1, C, SIDE**2, device=device)
    batch, step = CodeBatch(codes, {"labels": labels}, t_BJ, eps), TrainStep(0, 0, range(count), count, device)
    return lambda: generator.loss(batch, step)[0]


def samples(generator: RDPM, count: int, way: str, draw: str) -> Job:
    """One micro-batch of samples, with the embedding of its classes."""
    labels = torch.arange(count, device=next(generator.network.parameters()).device) % CLASSES
    options = SampleOptions(RDPMSampling(**WAYS[way], draw=draw))
    return lambda: generator.sample({"labels": labels}, torch.arange(count), options)


def operations(job: Job) -> int:
    """Multiplications and additions in the matrix products of a job."""
    with FlopCounterMode(display=False) as counter:
        job()
    return counter.get_total_flops()


def product(side: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Job:
    """One large product of 2 side³ operations: the rate that the machine reaches."""
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    return lambda: torch.mm(a, b)


def products(network: Any, forward: Job) -> Job:
    """The matrix products of one forward and backward pass, as the network's own layers are called by `forward`."""
    calls: list[Job] = []

    def linear(layer: Any, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        x = torch.randn(inputs[0].numel() // layer.in_features, layer.in_features, device=inputs[0].device)
        y, weight = torch.randn(len(x), layer.out_features, device=x.device), layer.weight.detach().clone()
        calls.append(lambda: (torch.mm(x, weight.t()), torch.mm(y, weight), torch.mm(y.t(), x)))

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        a, b = torch.randn(2, *q.shape, device=q.device)
        scores = torch.randn(*q.shape[:-1], q.shape[-2], device=q.device)
        calls.append(lambda: [(a @ b.transpose(-1, -2), scores @ a) for _ in range(3)])  # 2 forward, 4 backward
        return transformer.sdpa(q, k, v, mask)

    hooks = [m.register_forward_hook(linear) for m in network.modules() if isinstance(m, nn.Linear)]
    for block in network.trunk.blocks:
        block.attn.kernel = attend
    forward()
    for block in network.trunk.blocks:
        block.attn.kernel = transformer.sdpa
    for hook in hooks:
        hook.remove()
    return lambda: [call() for call in calls]


def timm_blocks(depth: int, count: int) -> Job:
    """timm's ViT of the same width and depth, without AdaLN, rotary positions or a head: forward and backward."""
    from timm.models.vision_transformer import Block

    blocks = nn.Sequential(*(Block(64 * depth, depth, qkv_bias=False) for _ in range(depth)))
    x = torch.randn(count, SIDE * SIDE, 64 * depth)
    return lambda: blocks(x).square().mean().backward()


def train_cpu(depth: int, batches: list[int], rounds: int) -> None:
    """Forward and backward next to the products alone and a plain ViT; then the update."""
    generator, rows = make_generator(depth, CPU), []
    for count in batches:
        loss = losses(generator, count, CPU)
        jobs = {"floor": products(generator.network, loss), "timm": timm_blocks(depth, count)}
        seconds = race({**jobs, "rdpm": lambda loss=loss: loss().backward()}, rounds, CPU)  # type: ignore[misc]
        rows += [[f"B = {count}, {n}", f"{v:.2f}", f"{v / seconds['floor']:.2f}"] for n, v in seconds.items()]
    table([f"d{depth}, forward and backward, fp32", "s", "floors (goal: 1.4)"], rows)
    cfg, parameters = recipe(depth).train, list(generator.network.parameters())
    for parameter in parameters:
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    optimizer, ema = make_optimizer(generator.network, cfg), Ema(generator.network, cfg.ema)
    clip = lambda: nn.utils.clip_grad_norm_(parameters, cfg.clip)  # noqa: E731
    updates: dict[str, Job] = {"clip": clip, "AdamW": optimizer.step, "EMA": lambda: ema.update(generator.network)}
    seconds = race(updates, rounds, CPU)
    seconds["together (goal: 0.35 at 133M)"] = sum(seconds.values())
    table(["update", "s"], [[name, f"{value:.3f}"] for name, value in seconds.items()])


def train_cuda(depth: int, count: int, steps: int, compiled: bool, attention: str) -> None:
    """The paper's step in bf16 on random codes: images/s, share of the measured product rate, memory."""
    cfg, generator = recipe(depth).model_copy(update={"attention": attention}), make_generator(depth, CUDA)
    registry.prepare(generator, cfg, registry.find_kernel(cfg, "cuda"))
    loss, network = losses(generator, count, CUDA), generator.network
    optimizer, ema = make_optimizer(network, cfg.train), Ema(network, cfg.train.ema)

    def train() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), cfg.train.clip)
        optimizer.step()
        ema.update(network)

    flops = operations(train)
    if compiled:
        network.compile()
        train()
    torch.cuda.reset_peak_memory_stats()
    seconds = race({"product": product(8192, CUDA, torch.bfloat16), "step": train}, steps, CUDA)
    rate, memory = 2 * 8192**3 / seconds["product"], torch.cuda.max_memory_allocated() / 2**30
    share = flops / seconds["step"] / rate
    name = f"d{depth}, B = {count}, {attention}, {'torch.compile' if compiled else 'eager'}"
    row = [name, f"{count / seconds['step']:.0f}", f"{share:.0%}", f"{memory:.1f}"]
    table([f"product: {rate / 1e12:.0f} TF/s", "images/s", "of product (goal: 45%)", "GiB"], [row])


@torch.no_grad()
def sample(depth: int, batches: list[int], rounds: int, steps: int, draw: str, device: torch.device = CPU) -> None:
    generator, rows = make_generator(depth, device), []
    generator.network.eval().requires_grad_(False)
    passes = {name: generator.passes(SampleOptions(RDPMSampling(**way))) for name, way in WAYS.items()}
    generator.quantizer.steps = steps  # all steps of a kind cost the same
    side, dtype = (2048, torch.float32) if device == CPU else (8192, torch.bfloat16)
    for compiled in ("eager",) if device == CPU else ("eager", "default", "reduce-overhead"):
        flops = operations(samples(generator, 1, "plain", draw))
        if compiled != "eager":
            generator.network.compile(mode=compiled)
        for count in batches:
            ways = {name: samples(generator, count, name, draw) for name in (WAYS if steps == T else ["plain"])}
            with torch.autocast("cuda", torch.bfloat16, enabled=device == CUDA):
                seconds = race({"product": product(side, device, dtype), **ways}, rounds, device)
            floor = flops * count * seconds.pop("product") / (2 * side**3)
            for name, value in seconds.items():
                numbers = value * T / steps / count, value / floor * passes["plain"] / passes[name]
                gain = seconds["plain"] / value
                cells = [str(passes[name]), *(f"{number:.3g}" for number in (*numbers, gain))]
                rows.append([f"{compiled}, B = {count}, {name}", *cells])
    print(f"d{depth}, {draw}, {steps} of {T} steps; goals: plain <= 1.25 floors, with skip_steps 4 1.6 times as fast")
    table(["transformer", "passes", "s/image", "floors", "x plain"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "sample"])
    parser.add_argument("--depths", type=int, nargs="+", default=[12], choices=[12, 16, 20])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 8], help="images a step or pass")
    parser.add_argument("--steps", type=int, default=T, choices=range(1, T + 1), help="of the sampling loop")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draw", default="gumbel", choices=["gumbel", "inverse", "argmax"])
    parser.add_argument("--cuda", action="store_true")
    args = parser.parse_args()
    tune_allocator()
    torch.set_num_threads(1)
    for depth in args.depths:
        if args.what == "sample":
            sample(depth, args.batches, args.rounds, args.steps, args.draw, CUDA if args.cuda else CPU)
        elif args.cuda:
            for count in args.batches:
                for attention in ("sdpa", "flash"):
                    for compiled in (False, True):
                        train_cuda(depth, count, args.rounds, compiled, attention)
        else:
            train_cpu(depth, args.batches, args.rounds)


if __name__ == "__main__":
    main()

"""Speed of a generator's training step at 256×256 (256 tokens). By hand: python tests/bench_train.py --help

Times are thread CPU seconds of one core (on CUDA: wall seconds between synchronisations), medians of rounds in which
all competitors take turns, after one warm-up each. Weights and codes are random: neither changes the work.

The floor is the time of the matrix products alone (linear layers forward, and twice backward; attention's two forward,
and four backward), of the same shapes, in the same rounds.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from benches import Job, race, table, verdict
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rdpm_cli.cli.app import tune_allocator
from rdpm_cli.distributed import TrainStep
from rdpm_cli.generator import registry, transformer
from rdpm_cli.generator.config import RDPMConfig
from rdpm_cli.generator.rdpm import RDPM, CodeBatch
from rdpm_cli.recipes import load_recipe
from rdpm_cli.tokenizer.config import QuantizerConfig, ScheduleConfig
from rdpm_cli.tokenizer.quantizer import Quantizer
from rdpm_cli.training.optim import Ema, make_optimizer

T, K, C, SIDE, CLASSES = 10, 4096, 32, 16, 1000
TARGET_FLOORS, TARGET_UPDATE, TARGET_UTILISATION = 1.4, 0.35, 0.45


def recipe(depth: int) -> RDPMConfig:
    cfg = load_recipe(f"imagenet256-d{depth}").generator
    assert isinstance(cfg, RDPMConfig)
    return cfg


def make_generator(depth: int, device: torch.device) -> RDPM:
    quantizer = Quantizer(QuantizerConfig(codes=K, steps=T, bias="add"), ScheduleConfig(), C, (SIDE, SIDE)).eval()
    generator = RDPM(recipe(depth), quantizer.requires_grad_(False).to(device), CLASSES)
    generator.network.to(device).train()
    for parameter in generator.network.parameters():  # AdaLN-Zero's zeros may be multiplied faster
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.02)
    return generator


def make_batch(count: int, device: torch.device) -> CodeBatch:
    return CodeBatch(
        codes_BTS=torch.randint(K, (count, T, SIDE**2), device=device),
        columns={"labels": torch.randint(CLASSES, (count,), device=device)},
        t_BJ=torch.randint(1, T + 1, (count, 1), device=device),
        eps_BJCS=torch.randn(count, 1, C, SIDE**2, device=device),
    )


def products(network: nn.Module, forward: Job) -> Job:
    """The matrix products of one forward and backward pass, as the network's own layers are called by `forward`."""
    calls: list[Callable[[], Any]] = []

    def linear(layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        x = torch.randn(inputs[0].numel() // layer.in_features, layer.in_features, device=inputs[0].device)
        y, weight = torch.randn(len(x), layer.out_features, device=x.device), layer.weight.detach().clone()
        calls.append(lambda: (torch.mm(x, weight.t()), torch.mm(y, weight), torch.mm(y.t(), x)))

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        a, b = torch.randn(2, *q.shape, device=q.device)
        scores = torch.randn(*q.shape[:-1], q.shape[-2], device=q.device)
        calls.append(lambda: [(a @ b.transpose(-1, -2), scores @ a) for _ in range(3)])  # 2 forward, 4 backward
        return transformer.sdpa(q, k, v, mask)

    hooks = [m.register_forward_hook(linear) for m in network.modules() if isinstance(m, nn.Linear)]
    trunk = network.get_submodule("trunk")
    assert isinstance(trunk, transformer.Transformer)
    trunk.use(attend)
    forward()
    trunk.use(transformer.sdpa)
    for hook in hooks:
        hook.remove()
    return lambda: [call() for call in calls]


def timm_blocks(depth: int, count: int, device: torch.device) -> Job:
    """A ViT of the same width and depth from timm, without AdaLN, rotary positions or a head: forward and backward."""
    from timm.models.vision_transformer import Block

    blocks = nn.Sequential(*(Block(64 * depth, depth, qkv_bias=False) for _ in range(depth))).to(device)
    x = torch.randn(count, SIDE * SIDE, 64 * depth, device=device)
    return lambda: blocks(x).square().mean().backward()


def bench_cpu(depth: int, batches: list[int], rounds: int) -> None:
    """Forward and backward beside the products alone and a plain ViT; then the update."""
    device = torch.device("cpu")
    generator = make_generator(depth, device)
    rows = []
    for count in batches:
        batch, step = make_batch(count, device), TrainStep(0, 0, range(count), count, device)

        def train(batch: CodeBatch = batch, step: TrainStep = step) -> None:
            generator.loss(batch, step)[0].backward()

        with FlopCounterMode(display=False) as counter:
            train()
        jobs = {
            "floor": products(generator.network, lambda batch=batch, step=step: generator.loss(batch, step)),  # type: ignore[misc]
            "rdpm": train,
            "timm": timm_blocks(depth, count, device),
        }
        seconds = race(jobs, rounds, device)
        flops, floor = counter.get_total_flops(), seconds["floor"]
        for name, value in seconds.items():
            goal = verdict(value / floor <= TARGET_FLOORS) if name == "rdpm" and count == 2 else ""
            rate = f"{flops / value / 1e9:.0f}" if name == "rdpm" else ""
            rows.append([f"B = {count}, {name}", f"{value:.2f}", f"{value / floor:.2f}", rate, goal])
    print(f"d{depth}, forward and backward, fp32, {rounds} rounds; goal: <= {TARGET_FLOORS} floors at B = 2")
    table(["", "s", "floors", "GF/s", "goal"], rows)
    bench_update(generator, depth, rounds)


def bench_update(generator: RDPM, depth: int, rounds: int) -> None:
    """Clip, fused AdamW and the average of the weights."""
    cfg = recipe(depth).train
    parameters = list(generator.network.parameters())
    for parameter in parameters:
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    optimizer, ema = make_optimizer(generator.network, cfg), Ema(generator.network, cfg.ema)
    jobs: dict[str, Job] = {
        "clip": lambda: nn.utils.clip_grad_norm_(parameters, cfg.clip),
        "fused AdamW": optimizer.step,
        "EMA": lambda: ema.update(generator.network),
    }
    seconds = race(jobs, rounds, torch.device("cpu"))
    whole, count = sum(seconds.values()), sum(p.numel() for p in parameters)
    print(f"the update of {count / 1e6:.0f}M parameters; goal: <= {TARGET_UPDATE} s at 133M")
    rows = [[name, f"{value:.3f}", ""] for name, value in seconds.items()]
    table(["", "s", "goal"], [*rows, ["together", f"{whole:.3f}", verdict(whole <= TARGET_UPDATE)]])


def bench_cuda(depth: int, count: int, steps: int, compiled: bool, attention: str) -> None:
    """The paper's step in bf16 on random codes: images/s, share of the measured product rate, memory."""
    device = torch.device("cuda")
    cfg = recipe(depth).model_copy(update={"attention": attention})
    generator = make_generator(depth, device)
    registry.prepare(generator, cfg, registry.find_kernel(cfg, "cuda"))
    batch, step = make_batch(count, device), TrainStep(0, 0, range(count), count, device)
    optimizer, ema = make_optimizer(generator.network, cfg.train), Ema(generator.network, cfg.train.ema)
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)

    def train() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = generator.loss(batch, step)
        loss.backward()
        nn.utils.clip_grad_norm_(generator.network.parameters(), cfg.train.clip)
        optimizer.step()
        ema.update(generator.network)

    with FlopCounterMode(display=False) as counter:
        train()
    if compiled:
        generator.network.compile()
        for _ in range(3):
            train()
    torch.cuda.reset_peak_memory_stats()
    seconds = race({"product": lambda: torch.mm(a, b), "step": train}, steps, device)
    rate = 2 * 8192**3 / seconds["product"]
    share = counter.get_total_flops() / seconds["step"] / rate
    memory = torch.cuda.max_memory_allocated() / 2**30
    goal = verdict(share >= TARGET_UTILISATION) if compiled else ""
    row = [f"{count / seconds['step']:.0f}", f"{share:.0%}", f"{memory:.1f}", goal]
    name = f"d{depth}, B = {count}, {attention}, {'torch.compile' if compiled else 'eager'}"
    table([f"product: {rate / 1e12:.0f} TF/s", "images/s", "of product", "GiB", "goal"], [[name, *row]])


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=12, choices=[12, 16, 20], help="on the CPU")
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 4], help="images a step on the CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cuda-batch", type=int, default=128)
    parser.add_argument("--cuda-steps", type=int, default=100)
    return parser.parse_args()


def main() -> None:
    arguments = options()
    tune_allocator()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, 1 thread\n")
    bench_cpu(arguments.depth, arguments.batch, arguments.rounds)
    if not torch.cuda.is_available():
        print("no CUDA device: its runs were not made")
        return
    for depth in (12, 16):
        for attention in ("sdpa", "flash"):
            for compiled in (False, True):
                bench_cuda(depth, arguments.cuda_batch, arguments.cuda_steps, compiled, attention)


if __name__ == "__main__":
    main()

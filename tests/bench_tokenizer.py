"""Speed of the tokenizer at 256×256 (recipe imagenet256-tokenizer). By hand: python tests/bench_tokenizer.py --help

Times are thread CPU seconds of one core (on CUDA: wall seconds between synchronisations), medians of rounds in which
all competitors take turns, after one warm-up each. Weights are random, images are noise: neither changes the work.

Legend: B batch, T steps, C code width, S positions, N vectors, K codebook entries. A floor is the time of the matrix
products or convolutions only, on tensors of the same shapes, in the same rounds."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from benches import Job, convolutions, race, table, verdict
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from vector_quantize_pytorch import ResidualVQ

from rdpm_cli.cli.app import tune_allocator
from rdpm_cli.data.pixels import to_model
from rdpm_cli.distributed import TrainStep
from rdpm_cli.recipes import load_recipe
from rdpm_cli.tokenizer.config import QuantizerConfig, ScheduleConfig, TokenizerConfig
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.tokenizer.quantizer import Quantizer, Search
from rdpm_cli.tokenizer.training import TokenizerTask
from rdpm_cli.training.loop import make_optimizer

T, K, C, SIDE, S = 10, 4096, 32, 16, 256
TARGET_RATIO, TARGET_FLOORS = 8.0, 3.0
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def make_quantizer(kind: str, bias: str, device: torch.device) -> Quantizer:
    """An untrained quantiser of the recipe's size, in evaluation."""
    cfg = QuantizerConfig.model_validate({"codes": K, "steps": T, "bias": bias})
    return Quantizer(cfg, ScheduleConfig.model_validate({"kind": kind}), C, (SIDE, SIDE)).to(device).eval()


def products(v_NC: Tensor, book_KC: Tensor) -> Job:
    """Only the T matrix products, in the same blocks of rows, into one buffer."""
    rows, keys_CK = Search(book_KC).rows, book_KC.T.contiguous()
    buffer_NK = torch.empty(min(rows, len(v_NC)), K, device=v_NC.device)
    return lambda: [torch.mm(v, keys_CK, out=buffer_NK[: len(v)]) for _ in range(T) for v in v_NC.split(rows)]


@torch.no_grad()
def bench_quantizer(batches: list[int], rounds: int, device: torch.device, compiled: bool) -> None:
    """T = 10, K = 4096, C = 32, 256 vectors an image, against ResidualVQ and against the products."""
    print(
        f"quantiser, fp32, {rounds} rounds, {'torch.compile' if compiled else 'eager'}; goals: "
        f">= {TARGET_RATIO:g}x ResidualVQ at B = 1 and 4, <= {TARGET_FLOORS:g} floors (same work: rvq, no bias)"
    )
    plain, recipe = make_quantizer("rvq", "none", device), make_quantizer("pow", "add", device)
    library_vq: Any = ResidualVQ(dim=C, num_quantizers=T, codebook_size=K, shared_codebook=True).to(device).eval()
    library_vq.layers[0]._codebook.embed.data.copy_(plain.books[0])
    calls: list[Callable[..., Any]] = [library_vq, plain.encode, recipe.encode]
    vq, rvq, noisy = [torch.compile(call) for call in calls] if compiled else calls
    rows = []
    for batch in batches:
        z, eps = torch.randn(batch, C, S, device=device), torch.randn(batch, T, C, S, device=device)
        v_BSC = z.transpose(1, 2).contiguous()
        jobs: dict[str, Job] = {
            f"{T} products (floor)": products(v_BSC.reshape(-1, C), plain.books[0]),
            "ResidualVQ": lambda v=v_BSC: vq(v),  # type: ignore[misc]
            "rdpm, rvq, no bias": lambda z=z, eps=eps: rvq(z, eps),  # type: ignore[misc]
            "rdpm, pow, bias add": lambda z=z, eps=eps: noisy(z, eps),  # type: ignore[misc]
        }
        seconds = race(jobs, rounds, device)
        floor, library = list(seconds.values())[:2]
        for name, value in seconds.items():
            goals = f"{verdict(library / value >= TARGET_RATIO)}, {verdict(value / floor <= TARGET_FLOORS)}"
            cells = [f"{1e3 * value:.1f}", f"{value / floor:.2f}", f"{library / value:.1f}"]
            rows.append([f"B={batch} {name}", *cells, goals if name.startswith("rdpm") else ""])
    table(["", "ms", "floors", "x ResidualVQ", "goals"], rows)


class Subject:
    """The recipe's tokenizer in one memory layout, with and without its quantiser."""

    def __init__(self, cfg: TokenizerConfig, batch: int, layout: str, device: torch.device) -> None:
        torch.manual_seed(0)
        channels_last = cfg.train.model_copy(update={"channels_last": layout != "NCHW"})
        self.model = Tokenizer(cfg, cfg.loss.weight).to(device).to(memory_format=LAYOUTS[layout])
        side = cfg.autoencoder.resolution
        self.pixels = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=device)
        self.x = to_model(self.pixels).contiguous(memory_format=LAYOUTS[layout])
        self.eps = torch.randn(batch, cfg.quantizer.steps, *self.model.latent_shape, device=device)
        self.z = torch.randn(batch, *self.model.latent_shape, device=device)
        self.codes = self.model.quantizer.encode(self.z, self.eps)
        self.task = TokenizerTask(self.model, cfg.model_copy(update={"train": channels_last}))
        self.step, self.device, self.optimizer = 0, device, make_optimizer(self.model, cfg.train)

    def jobs(self) -> dict[str, Job]:
        """The timed jobs by name: each part, the same without quantisation, and its convolutions only."""
        encode, decode = (lambda: self.model.latents(self.x)), (lambda: self.model.decode_latents(self.z))
        jobs: dict[str, Job] = {
            "encode": lambda: self.model.encode(self.x, self.eps),
            "encode, plain": encode,
            "encode, floor": convolutions(self.model, encode),
            "quantise": lambda: self.model.quantizer.encode(self.z, self.eps),
            "decode": lambda: self.model.decode(self.codes),
            "decode, plain": decode,
            "decode, floor": convolutions(self.model, decode),
        }
        frozen = {name: lambda job=job: self.frozen(job) for name, job in jobs.items()}
        return frozen | {"training step": lambda: self.train(True), "training step, plain": lambda: self.train(False)}

    def frozen(self, call: Job) -> None:
        self.model.eval()
        with torch.no_grad():
            call()

    def train(self, quantised: bool) -> None:
        """One optimiser step of the recipe's task; without quantisation: E, D and the squared error."""
        self.model.train()
        self.optimizer.zero_grad()
        step = TrainStep(0, self.step, range(len(self.x)), len(self.x), self.device)
        self.step += 1
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            if quantised:
                loss = self.task.loss(self.pixels, step)[0]
            else:
                loss = F.mse_loss(self.model.decode_latents(self.model.latents(self.x)).float(), self.x)
        loss.backward()
        self.optimizer.step()
        if quantised:
            self.task.after_step(step)


def flops(call: Job) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def bench_network(batch: int, rounds: int, device: torch.device, compiled: bool, resolution: int) -> None:
    """Encode, quantise, decode, training step: images/s, with and without quantisation, against the convolutions."""
    overrides = ["tokenizer.loss.perceptual=none", "tokenizer.loss.adversarial=none"]
    cfg = load_recipe("imagenet256-tokenizer", [*overrides, f"tokenizer.autoencoder.resolution={resolution}"]).tokenizer
    assert cfg is not None
    subjects = {layout: Subject(cfg, batch, layout, device) for layout in LAYOUTS}
    work = {part: flops(job) for part, job in subjects["NCHW"].jobs().items() if "," not in part}
    square = torch.randn(2048, 2048, device=device)
    jobs: dict[str, Job] = {"product": lambda: square @ square}
    for layout, subject in subjects.items():
        jobs |= {f"{layout}: {name}": job for name, job in subject.jobs().items()}
        for network in subject.task.networks() if compiled else []:
            network.compile()
    seconds = race(jobs, rounds, device)
    rate = 2 * 2048**3 / seconds["product"]
    print(
        f"network at {resolution}×{resolution}, B = {batch}, {'bf16 training' if device.type == 'cuda' else 'fp32'}, "
        f"{'torch.compile' if compiled else 'eager'}, {rounds} rounds, without LPIPS and discriminator; "
        f"product of 2048³: {rate / 1e9:.0f} GF/s"
    )
    rows = []
    for part, layout in [(part, layout) for part in work for layout in LAYOUTS]:
        value = seconds[f"{layout}: {part}"]
        floor, plain = (seconds.get(f"{layout}: {part}, {variant}") for variant in ("floor", "plain"))
        cells = [f"{batch / value:.3f}", f"{work[part] / value / 1e9:.0f}", f"{work[part] / value / rate:.0%}"]
        cells += [f"{floor / value:.0%}" if floor else "", f"{batch / plain:.3f}" if plain else ""]
        rows.append([f"{part}, {layout}", *cells])
    table(["", "images/s", "GF/s", "of product", "of convs", "unquantised, images/s"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["quantizer", "network"], help="one half (default: both)")
    parser.add_argument("--rounds", type=int, default=31, help="timed rounds of the quantiser")
    parser.add_argument("--network-rounds", type=int, default=3, help="timed rounds of the network")
    parser.add_argument("--batch", type=int, default=1, help="images a call of the network")
    parser.add_argument("--resolution", type=int, default=256, help="pixels a side, for a quick look")
    arguments = parser.parse_args()
    tune_allocator()
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # as rdpm sets it
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, 1 thread\n")
    devices = [("cpu", False), *([("cuda", False), ("cuda", True)] if torch.cuda.is_available() else [])]
    for device, compiled in ((torch.device(name), compiled) for name, compiled in devices):
        print(f"== {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'one CPU core'}")
        if arguments.only != "network":
            bench_quantizer([1, 4, 8], arguments.rounds, device, compiled)
        if arguments.only != "quantizer":
            bench_network(arguments.batch, arguments.network_rounds, device, compiled, arguments.resolution)


if __name__ == "__main__":
    main()

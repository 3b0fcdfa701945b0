"""Speed of the tokenizer at 256×256 (recipe imagenet256-tokenizer). By hand: python tests/bench_tokenizer.py --help

Times are thread CPU seconds of one core (on CUDA: wall seconds between synchronisations), medians of rounds in which
all competitors take turns, after one warm-up each. Weights are random, images are noise: neither changes the work.

Legend: B batch, T steps, C code width, S positions, N vectors, K codebook entries. A floor is the time of the matrix
products or convolutions only, on tensors of the same shapes, in the same rounds.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from benches import Job, convolutions, race, table, verdict
from torch import Tensor, nn
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
from rdpm_cli.training.optim import make_optimizer

T, K, C, SIDE = 10, 4096, 32, 16
S = SIDE * SIDE
TARGET_RATIO, TARGET_FLOORS = 8.0, 3.0
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


# ---- the quantiser -------------------------------------------------------------------------------------------------


def make_quantizer(kind: str, bias: str, device: torch.device) -> Quantizer:
    """An untrained quantiser of the recipe's size, in evaluation."""
    cfg = QuantizerConfig.model_validate({"codes": K, "steps": T, "bias": bias})
    return Quantizer(cfg, ScheduleConfig.model_validate({"kind": kind}), C, (SIDE, SIDE)).to(device).eval()


def residual_vq(books_KC: Tensor) -> nn.Module:
    """vector-quantize-pytorch's ResidualVQ over the same shared codebook, in evaluation."""
    module: nn.Module = ResidualVQ(dim=C, num_quantizers=T, codebook_size=K, shared_codebook=True)
    module = module.to(books_KC.device).eval()
    module.layers[0]._codebook.embed.data.copy_(books_KC)  # type: ignore[index, union-attr]
    return module


def products(v_NC: Tensor, book_KC: Tensor) -> Job:
    """Only the T matrix products, in the same blocks of rows, into one buffer."""
    search, keys_CK = Search(book_KC), book_KC.T.contiguous()
    buffer_NK = torch.empty(min(search.rows, len(v_NC)), K, device=v_NC.device)

    def run() -> None:
        for _ in range(T):
            for v in v_NC.split(search.rows):
                torch.mm(v, keys_CK, out=buffer_NK[: len(v)])

    return run


@torch.no_grad()
def bench_quantizer(batches: list[int], rounds: int, device: torch.device, compiled: bool) -> None:
    """T = 10, K = 4096, C = 32, 256 vectors an image, against ResidualVQ and against the products."""
    print(
        f"quantiser, fp32, {rounds} rounds, {'torch.compile' if compiled else 'eager'}; goals: "
        f">= {TARGET_RATIO:g}x ResidualVQ at B = 1 and 4, <= {TARGET_FLOORS:g} floors (same work: rvq, no bias)"
    )
    plain, recipe = make_quantizer("rvq", "none", device), make_quantizer("pow", "add", device)
    calls: list[Callable[..., Any]] = [residual_vq(plain.books[0]), plain.encode, recipe.encode]
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


@torch.no_grad()
def check_codes(device: torch.device) -> None:
    """Every v_t of a chain of 8 images against a float64 search; the share that bf16 scores would change."""
    quantizer = make_quantizer("pow", "add", device).train()
    z, eps = torch.randn(8, C, S, device=device), torch.randn(8, T, C, S, device=device)
    chain, book = quantizer(z, eps), quantizer.books[0]
    wrong = ties = flipped = 0
    vectors_NC, codes_N = chain.usage.vectors_TBSC.reshape(-1, C), chain.codes_BTS.transpose(0, 1).flatten()
    for v, codes in zip(vectors_NC.split(256), codes_N.split(256), strict=True):
        scores = 0.5 * book.double().pow(2).sum(1) - v.double() @ book.double().T
        two = scores.topk(2, largest=False)
        tie = 2 * (two.values[:, 1] - two.values[:, 0]) <= 1e-6 * (1 + v.double().pow(2).sum(1))
        wrong += int(((two.indices[:, 0] != codes) & ~tie).sum())
        ties += int(tie.sum())
        half = torch.addmm(0.5 * book.pow(2).sum(1).bfloat16(), v.bfloat16(), book.bfloat16().T, alpha=-1)
        flipped += int((half.argmin(1) != codes).sum())
    print(
        f"codes against float64: {wrong} of {len(codes_N)} differ, {ties} ties to 1e-6 left out; bf16 scores would "
        f"change {flipped / len(codes_N):.1%} of them\n"
    )


# ---- the network ---------------------------------------------------------------------------------------------------


class Subject:
    """The recipe's tokenizer in one memory layout, with and without its quantiser."""

    def __init__(self, cfg: TokenizerConfig, batch: int, layout: str, device: torch.device) -> None:
        torch.manual_seed(0)
        channels_last = cfg.train.model_copy(update={"channels_last": layout != "NCHW"})
        self.cfg, self.device = cfg.model_copy(update={"train": channels_last}), device
        self.model = Tokenizer(cfg, cfg.loss.weight).to(device).to(memory_format=LAYOUTS[layout])
        side = cfg.autoencoder.resolution
        self.pixels = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=device)
        self.x = to_model(self.pixels).contiguous(memory_format=LAYOUTS[layout])
        self.eps = torch.randn(batch, cfg.quantizer.steps, *self.model.latent_shape, device=device)
        self.z = torch.randn(batch, *self.model.latent_shape, device=device)
        self.codes = self.model.quantizer.encode(self.z, self.eps)
        self.task, self.step = TokenizerTask(self.model, self.cfg), 0
        self.optimizer = make_optimizer(self.model, cfg.train)

    def jobs(self) -> dict[str, Job]:
        """The timed jobs by name: each part, the same without quantisation, and its convolutions only."""
        encode, decode = (lambda: self.model.latents(self.x)), (lambda: self.model.decode_latents(self.z))
        return {
            "encode": self._frozen(lambda: self.model.encode(self.x, self.eps)),
            "encode, plain": self._frozen(encode),
            "encode, floor": self._frozen(convolutions(self.model, self._frozen(encode))),
            "quantise": self._frozen(lambda: self.model.quantizer.encode(self.z, self.eps)),
            "decode": self._frozen(lambda: self.model.decode(self.codes)),
            "decode, plain": self._frozen(decode),
            "decode, floor": self._frozen(convolutions(self.model, self._frozen(decode))),
            "training step": lambda: self._train(True),
            "training step, plain": lambda: self._train(False),
        }

    def _frozen(self, call: Job) -> Job:
        def run() -> None:
            self.model.eval()
            with torch.no_grad():
                call()

        return run

    def _train(self, quantised: bool) -> None:
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
    for part in work:
        for layout in LAYOUTS:
            value = seconds[f"{layout}: {part}"]
            floor, plain = (seconds.get(f"{layout}: {part}, {variant}") for variant in ("floor", "plain"))
            cells = [f"{batch / value:.3f}", f"{work[part] / value / 1e9:.0f}", f"{work[part] / value / rate:.0%}"]
            cells += [f"{floor / value:.0%}" if floor else "", f"{batch / plain:.3f}" if plain else ""]
            rows.append([f"{part}, {layout}", *cells])
    table(["", "images/s", "GF/s", "of product", "of convs", "unquantised, images/s"], rows)


# ---- by hand -------------------------------------------------------------------------------------------------------


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["quantizer", "network"], help="one half (default: both)")
    parser.add_argument("--rounds", type=int, default=31, help="timed rounds of the quantiser")
    parser.add_argument("--network-rounds", type=int, default=3, help="timed rounds of the network")
    parser.add_argument("--batch", type=int, default=1, help="images a call of the network")
    parser.add_argument("--resolution", type=int, default=256, help="pixels a side, for a quick look")
    parser.add_argument("--compile", action="store_true", help="torch.compile on the CPU as well")
    return parser.parse_args()


def variants(compile_cpu: bool) -> Iterator[tuple[torch.device, bool]]:
    """(device, compiled): the CPU, and eager and compiled CUDA where there is one."""
    yield torch.device("cpu"), False
    if compile_cpu:
        yield torch.device("cpu"), True
    if torch.cuda.is_available():
        yield torch.device("cuda"), False
        yield torch.device("cuda"), True


def main() -> None:
    arguments = options()
    tune_allocator()
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # as rdpm sets it
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, 1 thread\n")
    for device, compiled in variants(arguments.compile):
        print(f"== {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'one CPU core'}")
        if arguments.only != "network":
            check_codes(device)
            bench_quantizer([1, 4, 8], arguments.rounds, device, compiled)
        if arguments.only != "quantizer":
            bench_network(arguments.batch, arguments.network_rounds, device, compiled, arguments.resolution)


if __name__ == "__main__":
    main()

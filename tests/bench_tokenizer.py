"""Speed of the tokenizer at 256×256 (recipe imagenet256-tokenizer). By hand: python tests/bench_tokenizer.py --help

Times are thread CPU seconds of one core (on CUDA: wall seconds between synchronisations), medians of rounds in which
all competitors take turns, after one warm-up each. Weights are random, images are noise: neither changes the work.

Legend: B batch, T steps, C code width, N vectors, K codebook entries. A floor is the time of the matrix products or
convolutions alone, on tensors of the same shapes, in the same rounds.
"""

import argparse
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from benches import Job, race, table, verdict
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rdpm_cli.config import QuantizerConfig, ScheduleConfig, TokenizerConfig
from rdpm_cli.images.tensors import to_model
from rdpm_cli.recipe_files import load_recipe
from rdpm_cli.step import TrainStep
from rdpm_cli.threads import tune_allocator
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.tokenizer.quantizer import Quantizer, Search
from rdpm_cli.tokenizer.task import TokenizerTask
from rdpm_cli.training.loop import make_optimizer

T, K, C, SIDE = 10, 4096, 32, 16
TARGET_RATIO, TARGET_FLOORS = 8.0, 3.0
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


# ---- the quantiser alone -----------------------------------------------------------------------------------------


def make_quantizer(kind: str, bias: str, device: torch.device) -> Quantizer:
    """An untrained quantiser of the recipe's size, in evaluation."""
    cfg = QuantizerConfig.model_validate({"codes": K, "steps": T, "bias": bias})
    return Quantizer(cfg, ScheduleConfig.model_validate({"kind": kind}), C).to(device).eval()


def residual_vq(books_KC: Tensor) -> nn.Module:
    """vector-quantize-pytorch's ResidualVQ over the same shared codebook, in evaluation."""
    from vector_quantize_pytorch import ResidualVQ

    module: nn.Module = ResidualVQ(dim=C, num_quantizers=T, codebook_size=K, shared_codebook=True)
    module = module.to(books_KC.device).eval()
    module.layers[0]._codebook.embed.data.copy_(books_KC)  # type: ignore[index, union-attr]
    return module


def products(v_NC: Tensor, book_KC: Tensor) -> Job:
    """The T matrix products alone, in the same blocks of rows, into one buffer."""
    search, keys_CK = Search(book_KC), book_KC.T.contiguous()
    buffer_NK = torch.empty(min(search.rows, len(v_NC)), K, device=v_NC.device)

    def run() -> None:
        for _ in range(T):
            for v in v_NC.split(search.rows):
                torch.mm(v, keys_CK, out=buffer_NK[: len(v)])

    return run


@torch.no_grad()
def bench_quantizer(batches: list[int], rounds: int, device: torch.device, compiled: bool) -> None:
    """T = 10, K = 4096, C = 32, 256 vectors an image, against ResidualVQ and against the products alone."""
    print(
        f"quantiser alone, fp32, {rounds} rounds, {'torch.compile' if compiled else 'eager'}; goals: "
        f">= {TARGET_RATIO:g}x ResidualVQ at B = 1 and 4, <= {TARGET_FLOORS:g} floors (same work: rvq, no bias)"
    )
    rows = []
    for batch in batches:
        z, eps = torch.randn(batch, C, SIDE, SIDE, device=device), torch.randn(batch, T, C, SIDE, SIDE, device=device)
        plain, recipe = make_quantizer("rvq", "none", device), make_quantizer("pow", "add", device)
        v_BNC = z.flatten(2).transpose(1, 2).contiguous()
        theirs = residual_vq(plain.books[0])
        calls: list[Callable[..., Any]] = [theirs, plain.encode, recipe.encode]
        vq, rvq, pow_ = [torch.compile(call) for call in calls] if compiled else calls
        jobs: dict[str, Job] = {
            f"{T} products alone (floor)": products(v_BNC.reshape(-1, C), plain.books[0]),
            "ResidualVQ": lambda vq=vq, v=v_BNC: vq(v),  # type: ignore[misc]
            "rdpm, rvq, no bias": lambda rvq=rvq, z=z, eps=eps: rvq(z, eps),  # type: ignore[misc]
            "rdpm, pow, bias add": lambda pow_=pow_, z=z, eps=eps: pow_(z, eps),  # type: ignore[misc]
        }
        seconds = race(jobs, rounds, device)
        floor, other = list(seconds.values())[:2]
        for name, value in seconds.items():
            ours = name.startswith("rdpm")
            goals = (
                f"{verdict(other / value >= TARGET_RATIO)}, {verdict(value / floor <= TARGET_FLOORS)}" if ours else ""
            )
            rows.append(
                [f"B={batch} {name}", f"{1e3 * value:.1f}", f"{value / floor:.2f}", f"{other / value:.1f}", goals]
            )
    table(["", "ms", "floors", "x ResidualVQ", "goals"], rows)


@torch.no_grad()
def check_codes(device: torch.device) -> None:
    """Every v_t of a chain of 8 images against a float64 search; the share that bf16 scores would change."""
    quantizer = make_quantizer("pow", "add", device).train()
    z, eps = torch.randn(8, C, SIDE, SIDE, device=device), torch.randn(8, T, C, SIDE, SIDE, device=device)
    chain, book = quantizer(z, eps), quantizer.books[0]
    with torch.autocast(device.type, torch.bfloat16):
        same = torch.equal(quantizer.encode(z, eps), chain.codes_BTHW)
    wrong = ties = flipped = 0
    vectors_NC, codes_N = chain.usage.vectors_TBNC.reshape(-1, C), chain.codes_BTHW.transpose(0, 1).flatten()
    for v, codes in zip(vectors_NC.split(256), codes_N.split(256), strict=True):
        scores = 0.5 * book.double().pow(2).sum(1) - v.double() @ book.double().T
        two = scores.topk(2, largest=False)
        tie = 2 * (two.values[:, 1] - two.values[:, 0]) <= 1e-6 * (1 + v.double().pow(2).sum(1))
        wrong += int(((two.indices[:, 0] != codes) & ~tie).sum())
        ties += int(tie.sum())
        half = torch.addmm(0.5 * book.pow(2).sum(1).bfloat16(), v.bfloat16(), book.bfloat16().T, alpha=-1)
        flipped += int((half.argmin(1) != codes).sum())
    print(
        f"codes against float64: {wrong} of {len(codes_N)} differ, {ties} ties to 1e-6 left out; inside bf16 autocast "
        f"{'the same' if same else 'OTHERS'}; bf16 scores would change {flipped / len(codes_N):.1%} of them\n"
    )


# ---- the network -------------------------------------------------------------------------------------------------


class Conv(NamedTuple):
    """One convolution of the network, as it was called."""

    inputs: tuple[int, ...]
    weights: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]


def convolutions(network: nn.Module, call: Job) -> Counter[Conv]:
    """Every convolution that a call makes, and how often."""
    seen: Counter[Conv] = Counter()

    def note(module: Any, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        seen[Conv(tuple(inputs[0].shape), tuple(module.weight.shape), module.stride, module.padding)] += 1

    hooks = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, nn.Conv2d)]
    call()
    for hook in hooks:
        hook.remove()
    return seen


def convolve(convs: Counter[Conv], layout: torch.memory_format, device: torch.device, backward: bool) -> Job:
    """These convolutions alone, forward or forward and backward (without a gradient for the image), in a layout."""
    made = []
    for (inputs, weights, stride, padding), count in convs.items():
        x = torch.randn(inputs, device=device).to(memory_format=layout).requires_grad_(backward and inputs[1] > 3)
        w = torch.randn(weights, device=device).to(memory_format=layout).requires_grad_(backward)
        call = functools.partial(F.conv2d, x, w, stride=stride, padding=padding)
        made += count * [(call, [w, x] if x.requires_grad else [w], torch.ones_like(call(), requires_grad=False))]

    def run() -> None:
        for call, leaves, ones in made:
            y = call()
            if backward:
                torch.autograd.grad(y, leaves, ones)

    return run


class Subject:
    """The recipe's tokenizer in one memory layout, with and without its quantiser."""

    def __init__(self, cfg: TokenizerConfig, batch: int, layout: str, device: torch.device) -> None:
        torch.manual_seed(0)
        self.cfg, self.device = cfg, device
        form = LAYOUTS[layout]
        self.model = Tokenizer(cfg, cfg.loss.weight).to(device).to(memory_format=form)
        side = cfg.autoencoder.resolution
        self.pixels = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=device)
        self.x = to_model(self.pixels).contiguous(memory_format=form)
        self.eps = torch.randn(batch, cfg.quantizer.steps, *self.model.latent_shape, device=device)
        self.z = torch.randn(batch, *self.model.latent_shape, device=device)
        self.codes = self.model.quantizer.encode(self.z, self.eps)
        self.task = TokenizerTask(self.model, cfg)
        self.optimizer = make_optimizer(self.model, cfg.train)
        self.step = 0

    def jobs(self) -> dict[str, Job]:
        """What is timed, by name: each part, and the same without quantisation."""
        return {
            "encode": self._still(lambda: self.model.encode(self.x, self.eps)),
            "encode, plain": self._still(lambda: self.model.latents(self.x)),
            "quantise": self._still(lambda: self.model.quantizer.encode(self.z, self.eps)),
            "decode": self._still(lambda: self.model.decode(self.codes)),
            "decode, plain": self._still(lambda: self.model.decode_latents(self.z)),
            "training step": lambda: self._train(True),
            "training step, plain": lambda: self._train(False),
        }

    def _still(self, call: Job) -> Job:
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


def network_jobs(subjects: dict[str, Subject], device: torch.device) -> tuple[dict[str, Job], dict[str, int]]:
    """All timed jobs by 'layout: name', floors and a matrix product beside them; and the flops of each part."""
    first = next(iter(subjects.values()))
    plain = first.jobs()
    convs = {part: convolutions(first.model, plain[f"{part}, plain"]) for part in ("encode", "decode")}
    convs["training step"] = convs["encode"] + convs["decode"]
    square = torch.randn(2048, 2048, device=device)
    jobs: dict[str, Job] = {"product": lambda: square @ square}
    for layout, subject in subjects.items():
        jobs |= {f"{layout}: {name}": job for name, job in subject.jobs().items()}
        for part, found in convs.items():
            jobs[f"{layout}: {part}, floor"] = convolve(found, LAYOUTS[layout], device, part == "training step")
    return jobs, {part: _flops(plain[part]) for part in ("encode", "quantise", "decode", "training step")}


def _flops(call: Job) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def bench_network(batch: int, rounds: int, device: torch.device, compiled: bool, resolution: int) -> None:
    """Encode, quantise, decode, training step: images/s, beside no quantisation, and against the convolutions alone."""
    overrides = ["tokenizer.loss.perceptual=none", f"tokenizer.autoencoder.resolution={resolution}"]
    cfg = load_recipe("imagenet256-tokenizer", overrides).tokenizer
    assert cfg is not None
    subjects = {
        name: Subject(
            cfg.model_copy(update={"train": cfg.train.model_copy(update={"channels_last": name != "NCHW"})}),
            batch,
            name,
            device,
        )
        for name in LAYOUTS
    }
    jobs, flops = network_jobs(subjects, device)
    if compiled:
        for subject in subjects.values():
            for network in subject.task.networks():
                network.compile()
    seconds = race(jobs, rounds, device)
    rate = 2 * 2048**3 / seconds["product"]
    print(
        f"network at {resolution}×{resolution}, B = {batch}, {'bf16 training' if device.type == 'cuda' else 'fp32'}, "
        f"{'torch.compile' if compiled else 'eager'}, {rounds} rounds, without LPIPS and discriminator; "
        f"product of 2048³: {rate / 1e9:.0f} GF/s"
    )
    rows = [_network_row(layout, part, seconds, flops, batch, rate) for part in flops for layout in LAYOUTS]
    table(["", "images/s", "GF/s", "of product", "of convs", "unquantised, images/s"], rows)


def _network_row(
    layout: str, part: str, seconds: dict[str, float], flops: dict[str, int], batch: int, rate: float
) -> list[str]:
    """of product: of the rate of a 2048³ product. of convs: the time of the same convolutions alone over this time."""
    value = seconds[f"{layout}: {part}"]
    floor, plain = (seconds.get(f"{layout}: {part}, {what}") for what in ("floor", "plain"))
    share = flops[part] / value
    return [
        f"{part}, {layout}", f"{batch / value:.3f}", f"{share / 1e9:.0f}", f"{share / rate:.0%}",
        f"{floor / value:.0%}" if floor else "", f"{batch / plain:.3f}" if plain else "",
    ]  # fmt: skip


# ---- by hand -----------------------------------------------------------------------------------------------------


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["quantizer", "network"], help="one half (default: both)")
    parser.add_argument("--rounds", type=int, default=31, help="timed rounds of the quantiser")
    parser.add_argument("--network-rounds", type=int, default=3, help="timed rounds of the network")
    parser.add_argument("--batch", type=int, default=1, help="images a call of the network")
    parser.add_argument("--resolution", type=int, default=256, help="pixels a side, for a quick look")
    parser.add_argument("--plain-malloc", action="store_true", help="without the allocator settings that rdpm makes")
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
    chosen = options()
    tuned = not chosen.plain_malloc and tune_allocator()
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # as rdpm sets it
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, 1 thread, "
        f"allocator {'tuned as rdpm does' if tuned else 'as it comes'}\n"
    )
    for device, compiled in variants(chosen.compile):
        print(f"== {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'one CPU core'}")
        if chosen.only != "network":
            check_codes(device)
            bench_quantizer([1, 4, 8], chosen.rounds, device, compiled)
        if chosen.only != "quantizer":
            bench_network(chosen.batch, chosen.network_rounds, device, compiled, chosen.resolution)
    if not torch.cuda.is_available():
        print("no CUDA device: its eager and compiled runs were not made")


if __name__ == "__main__":
    main()

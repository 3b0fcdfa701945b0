"""A codebook's start and its health."""

from collections.abc import Callable

import torch
from torch import Tensor

from rdpm_cli import noise
from rdpm_cli.images.tensors import to_model
from rdpm_cli.step import TrainStep
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.tokenizer.quantizer import Chain

VECTORS_PER_CODE = 64  # that k-means sees at most
KMEANS_PASSES = 10  # over them


@torch.no_grad()
def initialise(
    tokenizer: Tokenizer, pixels_BCHW: Tensor, seed: int, between: Callable[[], None] = lambda: None
) -> None:
    """Place the codes on vectors v_t of these images: K drawn ones (`init: data`) or K centres (`kmeans`).

    between: called between two pieces of the work, to stop on a signal.
    Every process that is given the same images and seed finds the same. A book of its own a step gets its step's
    vectors. `init: normal` changes nothing. The recipe has seen to it that there are as many vectors as codes.
    """
    quantizer, cfg = tokenizer.quantizer, tokenizer.cfg.quantizer
    if cfg.init == "normal":
        return
    vectors_TMC = _vectors(tokenizer, pixels_BCHW, seed).flatten(1, 2).cpu()
    books = []
    for t in range(len(quantizer.books)):
        pool_MC = vectors_TMC[t] if len(quantizer.books) > 1 else vectors_TMC.flatten(0, 1)
        order = torch.randperm(len(pool_MC), generator=torch.Generator().manual_seed(seed + t))
        few_MC = pool_MC[order[: VECTORS_PER_CODE * cfg.codes]]
        books.append(few_MC[: cfg.codes] if cfg.init == "data" else _centres(few_MC, cfg.codes, seed, between))
    quantizer.place(torch.stack(books))


def _vectors(tokenizer: Tokenizer, pixels_BCHW: Tensor, seed: int) -> Tensor:
    """v_t (T, B, N, C) of the chain over the codebook as it is."""
    device, count = tokenizer.quantizer.books.device, len(pixels_BCHW)
    parts = []
    for start in range(0, count, noise.BLOCK):
        step = TrainStep(seed, 0, range(start, min(start + noise.BLOCK, count)), count, device)
        eps = step.normal(tokenizer.quantizer.steps, *tokenizer.latent_shape)
        z = tokenizer.latents(to_model(pixels_BCHW[start : start + noise.BLOCK].to(device)))
        chain: Chain = tokenizer.quantizer(z, eps)
        assert chain.usage is not None, "the tokenizer is in training mode"
        parts.append(chain.usage.vectors_TBNC)
    return torch.cat(parts, 1)


def _centres(vectors_MC: Tensor, count: int, seed: int, between: Callable[[], None]) -> Tensor:
    """Centres of mini-batch k-means, (count, C)."""
    from sklearn.cluster import MiniBatchKMeans

    found = MiniBatchKMeans(count, n_init=1, random_state=seed)
    parts = [part.numpy() for part in vectors_MC.split(max(1024, 2 * count)) if len(part) >= count]
    for _ in range(KMEANS_PASSES):
        for part in parts:
            found.partial_fit(part)
            between()
    return torch.from_numpy(found.cluster_centers_).float()


def health(used_TK: Tensor, shared: bool) -> dict[str, Tensor]:
    """Share of codes used, perplexity and dead codes, per t, from counts; and the share used of the book as a whole.

    Of a shared book the last steps use few codes by nature: only what no step uses is wasted. With a book a step,
    the worst one counts.
    """
    share_TK = used_TK / used_TK.sum(1, keepdim=True).clamp_min(1)
    perplexity_T = torch.exp(-(share_TK * share_TK.clamp_min(1e-12).log()).sum(1))
    used_T = (used_TK > 0).float().sum(1)
    whole = (used_TK.sum(0) > 0).float().mean() if shared else used_T.min() / used_TK.shape[1]
    logs = {"usage/book": whole}
    for t, (used, perplexity) in enumerate(zip(used_T, perplexity_T, strict=True), 1):
        logs[f"usage/t{t:02d}"] = used / used_TK.shape[1]
        logs[f"perplexity/t{t:02d}"] = perplexity
        logs[f"dead/t{t:02d}"] = used_TK.shape[1] - used
    return logs

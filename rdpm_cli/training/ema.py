"""Averages of a network's parameters: one by a decay, or two by power functions, from which any other length is made.

Power functions, their snapshots and the reconstruction are of EDM2, arXiv 2312.02696 section 3 and appendix C. The
average of exponent gamma after step t weighs the parameters of step s by s^(gamma + 1) - (s - 1)^(gamma + 1), so its
width grows with t. Its length, sigma_rel, is the standard deviation of these steps over t."""

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rdpm_cli import checkpoint

FOLDER = "ema"  # of the snapshots, in the run folder
LENGTHS = {"model": 0.10, "short": 0.05}  # sigma_rel of the averages of `power`; `model` is the one in use
SNAPSHOTS = 32  # of a training


class Ema:
    """Averages of a model's parameters, with its buffers as they are. `model`: the one that a run measures and keeps.

    kind: the decay of the only average, or "power" for those of LENGTHS. updates: steps averaged so far."""

    def __init__(self, model: nn.Module, kind: float | str) -> None:
        self.kind, self.updates = kind, 0
        names = LENGTHS if kind == "power" else ["model"]
        self.averages = {name: copy.deepcopy(model).requires_grad_(False) for name in names}

    @property
    def model(self) -> nn.Module:
        return self.averages["model"]

    def decay(self, name: str) -> float:
        """The share of the average in the update of this number; Eq. 127 for power functions."""
        if isinstance(self.kind, str):
            return (1 - 1 / self.updates) ** (exponent(LENGTHS[name]) + 1)
        # Early decays are smaller, so that the average forgets the random start.
        return min(self.kind, self.updates / (9 + self.updates))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the averages towards the model's parameters; copy its buffers."""
        self.updates += 1
        for name, average in self.averages.items():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - self.decay(name))
            for copied, buffer in zip(average.buffers(), model.buffers(), strict=True):
                copied.copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {"updates": self.updates, **{name: average.state_dict() for name, average in self.averages.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.updates = state["updates"]
        for name, average in self.averages.items():
            average.load_state_dict(state[name])

    def keep(self, run: Path, step: int, steps: int) -> None:
        """After SNAPSHOTS evenly spaced ones of a run's steps, write the parameters of both power functions, in fp16.

        The steps depend on the run's length alone: a resumed run writes the same files again."""
        if self.kind != "power" or step not in snapshot_steps(steps):
            return
        averages = {
            LENGTHS[name]: {key: value.half() for key, value in average.named_parameters()}
            for name, average in self.averages.items()
        }
        checkpoint.save_state(run / FOLDER, step, {"updates": self.updates, "averages": averages}, keep=steps)


def snapshot_steps(steps: int) -> list[int]:
    """The steps after which a run of this length keeps a snapshot: SNAPSHOTS, evenly spaced; of shorter ones all."""
    return sorted({-(-steps * number // SNAPSHOTS) for number in range(1, SNAPSHOTS + 1)})


def exponent(length: float) -> float:
    """gamma of a length sigma_rel, up to 12^-0.5: the root of (g + 2)² (g + 3) = (g + 1) / sigma_rel², Algorithm 2."""
    t = length**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def correlation(t_a: Any, gamma_a: Any, t_b: Any, gamma_b: Any) -> Any:
    """Inner products of the weights over time of averages after t_a and t_b steps, Algorithm 3."""
    ratio, power = t_a / t_b, np.where(t_a < t_b, gamma_b, -gamma_a)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return scale * ratio**power / np.maximum(t_a, t_b)


def coefficients(updates: Sequence[int], lengths: Sequence[float], length: float) -> tuple[np.ndarray, float]:
    """Least-squares coefficients of averages for that of `length` after the last update, with sum 1: Algorithm 3.

    updates, lengths: of each average. -> also the relative error of the weights over time, a norm over a norm."""
    t_I, gamma_I = np.array(updates, float), np.array([exponent(each) for each in lengths])
    t, gamma = t_I.max(), exponent(length)
    A_II = correlation(t_I[:, None], gamma_I[:, None], t_I[None], gamma_I[None])
    b_I = correlation(t_I, gamma_I, t, gamma)
    x_I = np.linalg.lstsq(A_II, b_I, rcond=None)[0]
    x_I /= x_I.sum()  # as the authors' code: parameters that do not change stay as they are
    norm = float(correlation(t, gamma, t, gamma))
    return x_I, float(np.sqrt(max(0.0, norm - 2 * x_I @ b_I + x_I @ A_II @ x_I) / norm))


def reconstruct(snapshots: Iterable[Path], length: float) -> tuple[dict[str, Tensor], int, float]:
    """The parameters averaged over `length` after the last snapshot, that snapshot's updates, and the error of the fit.

    Raises CheckpointError for a damaged snapshot."""
    paths = list(snapshots)
    states = ((path, checkpoint.load_state(path)) for path in paths)
    known = [(path, state["updates"], each) for path, state in states for each in state["averages"]]
    x_I, error = coefficients([t for _, t, _ in known], [each for *_, each in known], length)
    total: dict[str, Tensor] = {}
    factors = {(path, each): float(x) for (path, _, each), x in zip(known, x_I, strict=True)}
    for path in paths:  # read again, since all of them at once may not fit into memory
        for each, parameters in checkpoint.read_tensors(path)["averages"].items():
            for name, value in parameters.items():
                total[name] = total.get(name, 0.0) + factors[path, each] * value.float()
    return total, max(t for _, t, _ in known), error

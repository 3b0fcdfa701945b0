"""Judges of single images: how much an image looks like the class it was drawn for. For best-of-n sampling."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from rdpm_cli import files, weights
from rdpm_cli.errors import CheckpointError, UsageError
from rdpm_cli.evaluation import judge as judge_file
from rdpm_cli.images.tensors import chw, to_model
from rdpm_cli.images.transform import Pixels

HOW = "give our judge's file (judge.pt), or a torchvision classifier and its weights: resnet50:resnet50.pth"
SIDE = 224  # of torchvision's classifiers
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as they were trained
AT_ONCE = 64  # images


class ClassJudge:
    """log p(class | image) of a classifier. name and sha256 go into the record."""

    def __init__(self, name: str, sha256: str, logits: Callable[[Tensor], Tensor], place: Sequence[int]) -> None:
        """place: the classifier's number of each of our classes."""
        self.name, self.sha256, self.logits, self.place = name, sha256, logits, torch.tensor(place)

    @torch.no_grad()
    def __call__(self, pixels_BHWC: Pixels, labels: list[int]) -> NDArray[np.float64]:
        """(B, H, W, 3) uint8 and the labels they were drawn for -> (B,), larger is better."""
        found = []
        for start in range(0, len(labels), AT_ONCE):
            log_p = self.logits(chw(pixels_BHWC[start : start + AT_ONCE])).double().log_softmax(1).cpu()
            wanted = self.place[torch.tensor(labels[start : start + AT_ONCE])]
            found.append(log_p.gather(1, wanted.view(-1, 1)).squeeze(1).numpy())
        return np.concatenate(found)


def open_judge(spec: str, class_names: Sequence[str], device: torch.device) -> ClassJudge:
    """The judge of `--judge`. class_names: the checkpoint's, which our judge must know by name; a torchvision
    classifier must have as many, in the same order (ImageNet's: sorted wnids). Raises CheckpointError, UsageError.
    """
    name, mark, file = spec.partition(":")
    if mark and not Path(spec).is_file():
        return _torchvision(name, Path(file), class_names, device)
    judge, content = judge_file.load(Path(spec))
    known = list(content["class_names"])
    if unknown := [c for c in class_names if c not in known]:
        raise CheckpointError(f"{spec} does not know class '{unknown[0]}' of this checkpoint", HOW)
    judge.to(device)

    def logits(pixels_BCHW: Tensor) -> Tensor:
        found: Tensor = judge(to_model(pixels_BCHW).to(device))[1]
        return found

    return ClassJudge(f"judge {Path(spec).name}", content["digest"], logits, [known.index(c) for c in class_names])


def _torchvision(name: str, path: Path, class_names: Sequence[str], device: torch.device) -> ClassJudge:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise UsageError(f"--judge {name}: torchvision has no such classifier", HOW)
    if not path.is_file():
        raise CheckpointError(files.no_file(path), HOW)
    network: nn.Module = models.get_model(name, weights=None)
    try:
        network.load_state_dict(weights.read(path, name, HOW))
    except RuntimeError as error:
        raise weights.misfit(path, name, HOW, error) from error
    network.eval().requires_grad_(False).to(device)
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))

    def logits(pixels_BCHW: Tensor) -> Tensor:
        x = F.interpolate(pixels_BCHW.to(device).float() / 255, (SIDE, SIDE), mode="bilinear", antialias=True)
        found: Tensor = network((x - mean) / std)
        return found

    with torch.no_grad():
        count = logits(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape[1]
    if count != len(class_names):
        raise CheckpointError(f"--judge {name} has {count} classes, this checkpoint {len(class_names)}", HOW)
    return ClassJudge(f"torchvision {name} {path.name}", files.sha256_file(path), logits, range(count))

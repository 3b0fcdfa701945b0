"""`rdpm inspect`, `rdpm verify`, `rdpm doctor` and --print-config: looking at files, recipes and the installation."""

import contextlib
import importlib
import math
import os
import platform
import re
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import features as pillow

from rdpm_cli import __version__, checkpoint, files, hub, launcher, recipes
from rdpm_cli.codes import store
from rdpm_cli.data import folder as samples
from rdpm_cli.data import pictures, text
from rdpm_cli.data.audio import AudioSource, open_audio
from rdpm_cli.data.open import ARCHIVES, expand, is_builtin, open_source
from rdpm_cli.data.pixels import image_errors
from rdpm_cli.data.source import Source, spread
from rdpm_cli.engine.speech_scores import drawn_sounds
from rdpm_cli.errors import AbsentWeightsError, AudioError, CheckpointError, DataError, ImageError, RdpmError
from rdpm_cli.evaluation import backbones, features, judge, speech_judge
from rdpm_cli.generator import registry
from rdpm_cli.runs import Result, read_run
from rdpm_cli.tokenizer import losses
from rdpm_cli.tokenizer import model as tokenizer_model
from rdpm_cli.tokenizer.config import TokenizerArchitecture
from rdpm_cli.tokenizer.model import parameters

HINT = "name a code store, a folder of samples, a tokenizer.pt, generator.pt, judge.pt or checkpoints/step-*.pt"
MODULES = {
    "pillow": "PIL",
    "scikit-learn": "sklearn",
    "pyyaml": "yaml",
    "mlflow-skinny": "mlflow",
}  # of packages whose module has another name
LOOKED_AT = 1000  # images whose sizes `inspect` reads
FAILED = "cannot be imported"
DRIVER = Path("/proc/driver/nvidia/version")
SETTINGS = ("RDPM_", "CUDA_", "OMP_", "PYTORCH_", "TORCH_")  # beginnings of environment variables

Values = dict[str, Any]


def inspect(target: str, reading: dict[str, Any] | None = None) -> Result:
    """The kind, config, digests and provenance of a checkpoint, run, store, folder of samples, source or recipe."""
    path, built_in = Path(target), is_builtin(target) and target not in recipes.recipe_names()
    is_images = built_in or files.is_url(target)
    if path.suffix == ".pt" or hub.is_exported(path):
        kind, values = _model_file(path)
    elif path.is_dir() and (record := _folder(path)):
        kind, values = record
    elif path.is_dir() or path.suffix.lower() in ARCHIVES or is_images or len(expand(target)) > 1:
        return _items(target, reading or {})
    elif path.is_file() and path.suffix not in {".yaml", ".yml"}:
        raise DataError(f"{path} is not a checkpoint, store, recipe or image archive", "name the folder it is in")
    else:
        kind, values = "recipe", _recipe(target)
    return Result(kind, {"kind": kind, **values})


def _items(target: str, reading: dict[str, Any]) -> Result:
    """Images, or where there are none, recordings."""
    try:
        return _images(open_source(target, **reading))
    except DataError as error:
        try:
            return _recordings(open_audio(target))
        except RdpmError:
            raise error from None


def _recordings(source: AudioSource) -> Result:
    """Counts, speakers, words and durations of recordings."""
    looked_at = spread(len(source), LOOKED_AT)
    seconds, bad = list[float](), list[str]()
    for index in looked_at:
        try:
            seconds.append(source.seconds(index))
        except AudioError as error:
            bad.append(f"{error.name}: {error.reason}")
    words = Counter(word for line in source.texts or () for word in text.normalise(line).split())
    values = {
        "kind": "recordings", **source.record(), "recordings": len(source), "classes": len(source.class_names),
        "speakers": len(set(source.speakers or ())), "words": dict(words.most_common(20)),
        "durations": source.word_seconds is not None, "not_taken": dict(source.not_taken), "seconds": sum(seconds),
        "seconds_of": len(looked_at), "unreadable": bad, "first": source.names[0],
    }  # fmt: skip
    return Result("recordings", values)


def _images(source: Source) -> Result:
    """Counts, classes and sizes of images, what was not taken, and the first image as a picture for terminals."""
    counts = np.bincount(source.labels or [], minlength=len(source.class_names)).tolist()
    sizes, bad = Counter[str](), []
    looked_at = spread(len(source), LOOKED_AT)
    for index in looked_at:
        try:
            with image_errors(source.spec, source.names[index]), source.open(index) as image:
                sizes[f"{image.width}×{image.height}"] += 1
        except ImageError as error:
            bad.append(f"{error.name}: {error.reason}")
    numbers, size_of = range(len(counts)), counts.__getitem__
    ends = (
        {"smallest_class": min(numbers, key=size_of), "largest_class": max(numbers[::-1], key=size_of)}
        if counts
        else {}
    )
    values = {
        "kind": "images", **source.record(), "images": len(source), "classes": len(source.class_names),
        **{end: f"{source.class_names[number]} ({counts[number]})" for end, number in ends.items()},
        "class_names": source.class_names, "class_counts": counts, "not_taken": dict(source.not_taken),
        "sizes": dict(sizes.most_common(20)), "sizes_of": len(looked_at), "unreadable": bad,
        "first": source.names[0],
    }  # fmt: skip
    with contextlib.suppress(ImageError):
        image = source.image(0)
        return Result("images", {**values, "first_size": list(image.size)}, picture=pictures.for_terminal(image))
    return Result("images", values)


def resolve(recipe: str, overrides: Sequence[str], section: str) -> Result:
    """--print-config: the recipe as the command with this section would use it, as YAML and as values."""
    resolved = recipes.load_recipe(recipe, overrides, section)
    return Result("recipe", resolved.model_dump(mode="json"), text=recipes.to_yaml(resolved))


def _folder(path: Path) -> tuple[str, Values] | None:
    """A folder by the record in it; None for one without, which may hold images."""
    if (path / "result.json").is_file():
        return "demo", files.read_json(path / "result.json")
    if (path / "manifest.json").is_file():
        manifest = store.Manifest.load(path)
        of_images = {"images", "resolution"} if manifest.speech else set[str]()
        values = manifest.model_dump(mode="json", exclude=of_images)
        return "code store", {"digest": manifest.digest(), **manifest.facts(), **values}
    if (path / samples.RECORD).is_file():
        record = files.read_json(path / samples.RECORD)
        return "samples", {**record, "samples": len(record["samples"])}
    if not (run := read_run(path)):
        return None
    if "plan" in run or "pictures" in run:
        return "unfinished code store" if "plan" in run else "unfinished samples", run
    states = [file.name for _, file in checkpoint.states(path / "checkpoints")]
    return "run", {**run, "checkpoints": states, "finished": sorted(p.name for p in path.glob("*.pt"))}


def _recipe(target: str) -> Values:
    """parameters: of the generator where the recipe has one, else of the tokenizer."""
    recipe = recipes.load_recipe(target)
    values: Values = {"name": recipe.name, "digest": recipe.digest()}
    architecture = recipe.tokenizer or TokenizerArchitecture()
    with torch.device("meta"):  # shapes without content, so that the largest networks take no memory
        tokenizer = tokenizer_model.Tokenizer(architecture)
        if recipe.tokenizer:
            values["tokenizer_parameters"] = values["parameters"] = parameters(tokenizer)
        if recipe.generator:
            values["parameters"] = parameters(registry.build(recipe.generator, tokenizer, recipe.classes).network)
            assumed = {"classes": recipe.classes, "positions": math.prod(tokenizer.grid)}
            assumed |= {"codes": architecture.quantizer.codes, "channels": architecture.autoencoder.channels}
            values["parameters_assume"] = assumed
    return {**values, "recipe": recipe.model_dump(mode="json", exclude_none=True)}


def _model_file(path: Path) -> tuple[str, Values]:
    content = checkpoint.load(path)
    values = {"file": str(path), "bytes": hub.weights_file(path).stat().st_size, **described(content, str(path))}
    return checkpoint.FORMATS[content["format"]], values


def described(content: dict[str, Any], path: str) -> Values:
    """The facts of a model file's content. Raises CheckpointError where it does not fit its own config."""
    kind = checkpoint.FORMATS[content["format"]]
    values = {key: content[key] for key in ("digest", "config", "class_names", "provenance")}
    if kind == "generator":
        loaded = registry.unpack(content, path)
        if loaded.text:
            values |= {"text": loaded.text, "units": len(loaded.class_names), "unit_names": values.pop("class_names")}
        values["parameters"] = parameters(loaded.generator.network)
        values["sampling"] = loaded.sampling.model_dump(mode="json")
        values["tokenizer"] = {key: content["tokenizer"][key] for key in ("digest", "config")}
    elif kind == "tokenizer":
        values["parameters"] = parameters(tokenizer_model.unpack(content, path))
    else:
        values["parameters"] = sum(weight.numel() for weight in content["weights"].values())
    return values


def verify(path: Path) -> Result:
    """Read every byte of a store, model file, training state or folder of samples. Raises DataError for damage."""
    if path.is_file() or hub.is_exported(path):
        file = hub.weights_file(path)
        values = {"file": str(file), "bytes": file.stat().st_size, "sha256": files.sha256_file(file)}
        if step := checkpoint.STATE_NAME.fullmatch(path.name):
            checkpoint.load_state(path)
            return Result("the training state is intact", {**values, "kind": "training state", "step": int(step[1])})
        content = checkpoint.load(path)  # compares the weights with their digest
        kind = checkpoint.FORMATS[content["format"]]
        loaders = {"generator": registry.load, "tokenizer": tokenizer_model.load, "judge": judge.load}
        {**loaders, "speech judge": speech_judge.load}[kind](path)
        return Result("the checkpoint is intact", {**values, "kind": kind, "digest": content["digest"]})
    if (path / samples.RECORD).is_file():
        if files.read_json(path / samples.RECORD).get("format") == samples.SPEECH:
            sounds = drawn_sounds(path, None)  # raises DataError for the first file that is damaged
            return Result("the samples are intact", {"folder": str(path), "samples": len(sounds)})
        images = samples.open_samples(path)
        for _ in images.read([range(i, min(i + 64, images.count)) for i in range(0, images.count, 64)]):
            pass  # reading raises DataError for the first file that is damaged
        return Result("the samples are intact", {"folder": str(path), "samples": images.count})
    if not (path / "manifest.json").is_file() and "plan" not in read_run(path):
        raise DataError(f"{path} is not a code store or a finished folder of samples", HINT)
    manifest = store.verify(path)
    names = [*manifest.files, *(name for shard in manifest.shards for name in shard.sha256)]
    values = {"store": str(path), "digest": manifest.digest()}
    values |= {"tokenizer": manifest.tokenizer, **manifest.facts(), "bad": manifest.bad, "rows": manifest.rows}
    values |= {"shards": len(manifest.shards), "files": len(names) + 1}
    return Result("the code store is intact", {**values, "bytes": sum((path / n).stat().st_size for n in names)})


def doctor() -> Result:
    """Versions, devices, weights, disk and launcher. fix: a line for each thing that is missing.

    broken: those among them that stop commands: a package that cannot be imported, a GPU that torch cannot use, a
    damaged weight file, an incomplete launcher. Missing extras and weights only limit some options."""
    fix: dict[str, str] = {}
    broken: dict[str, str] = {}
    versions: Values = {"rdpm": __version__, "python": platform.python_version()}
    versions["libjpeg-turbo"] = pillow.version_feature("libjpeg_turbo")  # another one may give other pixels
    extras: Values = {}
    for requirement in metadata.requires("rdpm") or []:
        name, extra = re.split(r"[^\w-]", requirement)[0], re.search(r"extra == .(\w+)", requirement)
        try:
            importlib.import_module(MODULES.get(name, name.replace("-", "_")))
            version = metadata.version(name)
        except (ImportError, OSError, RuntimeError) as error:  # absent; a library is absent; built for another torch
            version = f"{FAILED}: {str(error)[:200]}"
            if extra:  # flash-attn is built here, against the installed torch
                option = " --no-build-isolation" if extra[1] == "flash" else ""
                fix[f"extras.{extra[1]}"] = f"uv pip install 'rdpm[{extra[1]}]'{option}"
            else:
                broken[f"versions.{name}"] = f"uv pip install --reinstall {name}"
        if not extra:
            versions[name] = version
        elif FAILED not in extras.get(extra[1], ""):  # of several packages the one that is missing counts
            extras[extra[1]] = version
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    driver = re.search(r"\d+\.\d+[.\d]*", DRIVER.read_text("utf-8")) if DRIVER.is_file() else None
    if not gpus and driver and os.environ.get("CUDA_VISIBLE_DEVICES") not in {"", "-1"}:
        broken["devices.gpus"] = "install a torch that was built for this driver's CUDA, or a newer driver"
    elif not gpus:
        fix["devices.gpus"] = "commands run on the CPU; use a machine with a GPU for more than the digits"
    if launcher.fault():
        broken["launcher"] = launcher.remedy()
    devices = {
        "torch_built_for": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU",
        "driver": driver[0] if driver else "absent", "cpu_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1), "gpus": gpus,
        "names": [torch.cuda.get_device_name(number) for number in range(gpus)],
    }  # fmt: skip
    disk = {"folder": str(Path.cwd()), "free_gib": round(files.free_bytes(Path.cwd()) / 2**30, 1)}
    settings = {name: value for name, value in os.environ.items() if name.startswith(SETTINGS)}
    values: Values = {"versions": versions, "extras": extras, "devices": devices, "weights": _weights(fix, broken)}
    values |= {"disk": disk, "launcher": launcher.variables(), "settings": settings}
    values |= {"ready": not broken, "broken": list(broken), "fix": fix | broken}
    return Result("not ready" if broken else "ready", values, "" if broken else "rdpm demo")


def _weights(fix: dict[str, str], broken: dict[str, str]) -> Values:
    """Published weight files, by the lookup that scores and losses use."""
    options = {
        "inception": (features.INCEPTION, features.OPTION),
        **{name: (named.published, backbones.OPTION) for name, named in backbones.NAMED.items()},
        "vgg16": (losses.BACKBONES["vgg"].published, "loss.perceptual_weights=FILE"),
        "alexnet": (losses.BACKBONES["alex"].published, "--lpips-alex FILE"),
    }
    values: Values = {}
    for name, (published, option) in options.items():
        try:
            file = checkpoint.find_weights(published, None, option)
            state = {"state": "found", "path": str(file.path), "sha256": file.sha256}
        except AbsentWeightsError as error:
            state, fix[f"weights.{name}"] = {"state": "absent"}, error.hint
        except CheckpointError as error:
            state, broken[f"weights.{name}"] = {"state": error.message}, error.hint
        values[name] = {"file": published.file, **state}
    return values

"""`rdpm inspect`: what a path or recipe is, its config, digests and provenance."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rdpm_cli import config, files, recipe_files
from rdpm_cli.engine.runs import Result
from rdpm_cli.errors import DataError, RecipeError, UsageError


def inspect(target: str) -> Result:
    """What is this file, folder or recipe?"""
    kind, values = describe(target)
    return Result(kind, {"kind": kind, **values})


def describe(target: str) -> tuple[str, dict[str, Any]]:
    """(kind, values) of a checkpoint, run, store, sample folder, image source or recipe. Raises RdpmError."""
    path = Path(target)
    if path.suffix == ".pt":
        return _checkpoint(path)
    if path.is_dir():
        for name, found in FOLDERS.items():
            if (path / name).is_file():
                return found(path)
    from rdpm_cli.images.sources import is_archive, is_builtin

    if path.is_dir() or is_archive(target) or (is_builtin(target) and target not in recipe_files.recipe_names()):
        return _images(target)
    if path.is_file() and path.suffix not in {".yaml", ".yml"}:
        raise DataError(f"{path} is no checkpoint, store, recipe or image archive", "name the folder it lies in")
    try:
        return _recipe(target)
    except RecipeError as error:
        if path.exists() or "/" in target:
            raise
        raise UsageError(f"'{target}' is neither a path nor a recipe", error.hint) from error


def resolve(recipe_name: str, overrides: Sequence[str], section: str) -> Result:
    """--print-config: the recipe as the command whose section it is would use it, as YAML, or as values."""
    recipe = recipe_files.load_recipe(recipe_name, overrides, section)
    return Result("recipe", recipe.model_dump(mode="json"), text=recipe_files.to_yaml(recipe))


def _recipe(target: str) -> tuple[str, dict[str, Any]]:
    import torch

    recipe = recipe_files.load_recipe(target)
    values: dict[str, Any] = {"name": recipe.name, "digest": recipe.digest()}
    with torch.device("meta"):
        values |= _sizes(recipe)
    return "recipe", {**values, "recipe": recipe.model_dump(mode="json", exclude_none=True)}


def _sizes(recipe: config.Recipe) -> dict[str, Any]:
    """parameters: of the generator where there is one, else of the tokenizer."""
    from rdpm_cli.generator import model
    from rdpm_cli.tokenizer.model import Tokenizer

    sizes: dict[str, Any] = {}
    if recipe.tokenizer:
        tokenizer = Tokenizer(recipe.tokenizer)
        sizes["tokenizer_parameters"] = sum(p.numel() for p in tokenizer.parameters())
        sizes["parameters"] = sizes["tokenizer_parameters"]
    if recipe.generator:
        architecture = recipe.tokenizer or config.TokenizerArchitecture()
        auto, quant = architecture.autoencoder, architecture.quantizer
        generator = model.build(recipe.generator, Tokenizer(architecture), recipe.classes)
        sizes["parameters"] = model.parameters(generator)
        sizes["parameters_assume"] = {
            "classes": recipe.classes,
            "positions": math.prod(auto.grid),
            "codes": quant.codes,
            "channels": auto.channels,
        }
    return sizes


def _checkpoint(path: Path) -> tuple[str, dict[str, Any]]:
    from rdpm_cli import modelfile

    content = modelfile.load(path)
    kind = modelfile.FORMATS[content["format"]]
    values = {
        "file": str(path),
        "bytes": path.stat().st_size,
        "digest": content["digest"],
        "config": content["config"],
        "class_names": content["class_names"],
        "provenance": content["provenance"],
    }
    if kind == "generator":
        from rdpm_cli.generator import model

        loaded = model.load(path)
        values["parameters"] = model.parameters(loaded.generator)
        values["sampling"] = loaded.sampling.model_dump(mode="json")
        values["tokenizer"] = {"digest": content["tokenizer"]["digest"], "config": content["tokenizer"]["config"]}
    elif kind == "judge":
        values["parameters"] = sum(w.numel() for w in content["weights"].values())
    elif kind == "tokenizer":
        from rdpm_cli.tokenizer import model as tokenizer_file

        values["parameters"] = sum(p.numel() for p in tokenizer_file.unpack(content, str(path)).parameters())
    return kind, values


def _store(path: Path) -> tuple[str, dict[str, Any]]:
    from rdpm_cli.codes.manifest import Manifest

    manifest = Manifest.load(path)
    return "code store", {"digest": manifest.digest(), **manifest.model_dump(mode="json")}


def _samples(path: Path) -> tuple[str, dict[str, Any]]:
    record = files.read_json(path / "samples.json")
    return "samples", {**record, "samples": len(record["samples"])}


def _run(path: Path) -> tuple[str, dict[str, Any]]:
    note = files.read_json(path / "run.json")
    if "plan" in note:
        return "unfinished code store", note
    steps = sorted(p.name for p in (path / "checkpoints").glob("step-*.pt"))
    outputs = sorted(p.name for p in path.glob("*.pt"))
    return "run", {**note, "checkpoints": steps, "finished": outputs}


def _images(target: str) -> tuple[str, dict[str, Any]]:
    from rdpm_cli.images.sources import open_source

    source = open_source(target)
    return "images", {
        "source": source.spec,
        "images": len(source),
        "classes": len(source.class_names),
        "class_names": source.class_names[:20],
        "first": source.names[0],
        "first_size": list(source.image(0).size),
        "digest": source.digest(),
    }


def _demo(path: Path) -> tuple[str, dict[str, Any]]:
    return "demo", files.read_json(path / "result.json")


FOLDERS = {"result.json": _demo, "manifest.json": _store, "samples.json": _samples, "run.json": _run}

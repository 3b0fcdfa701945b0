"""`rdpm doctor`: what is here of what the commands use, and what to do about the rest."""

from __future__ import annotations

import importlib
import os
import platform
import re
import warnings
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rdpm_cli import __version__, crew, files, recipe_files, threads
from rdpm_cli.engine.gpus import GIB
from rdpm_cli.engine.runs import Result
from rdpm_cli.errors import AbsentWeightsError, CheckpointError, UsageError

ABSENT = "absent"
DRIVER = Path("/proc/driver/nvidia/version")
NEEDED = {  # distribution: module; all that rdpm depends on
    "torch": "torch",
    "torchvision": "torchvision",
    "torch-fidelity": "torch_fidelity",
    "lpips": "lpips",
    "numpy": "numpy",
    "pillow": "PIL",
    "torchmetrics": "torchmetrics",
    "scikit-learn": "sklearn",
    "matplotlib": "matplotlib",
    "tensorboard": "tensorboard",
    "pyyaml": "yaml",
    "pydantic": "pydantic",
    "typer": "typer",
    "rich": "rich",
    "filelock": "filelock",
}
EXTRAS = {  # extra: distribution, module, how to install it
    "flash": ("flash-attn", "flash_attn", "uv pip install 'rdpm[flash]' --no-build-isolation"),
    "parquet": ("pyarrow", "pyarrow", "uv pip install 'rdpm[parquet]'"),
    "wandb": ("wandb", "wandb", "uv pip install 'rdpm[wandb]'"),
}
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # all of them, or none
AROUND = ("LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NTASKS", "SLURM_PROCID")
SETTINGS = (
    "RDPM_CACHE", "RDPM_DEBUG", "RDPM_TOKENIZER", "RDPM_WEIGHTS", "TORCH_HOME", "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
)  # fmt: skip


@dataclass
class Findings:
    """What is missing, each with a line that mends it. broken: those among them that commands need."""

    fix: dict[str, str] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def lacks(self, name: str, fix: str) -> None:
        """Something that a command may do without."""
        self.fix[name] = fix

    def breaks(self, name: str, fix: str) -> None:
        """Something that commands need."""
        self.fix[name] = fix
        self.broken.append(name)


def examine() -> Result:
    """Versions, devices, attention, disk, weights, extras, launcher; `broken` and `fix` name what is not as it should.

    Broken is what stops commands: a needed package, a GPU that torch cannot use, a damaged weight file, half a
    launcher. What is absent and only some scores or options need has a fix line alone.
    """
    found = Findings()
    parts: dict[str, Any] = {"versions": _versions(found), "extras": _extras(found)}
    if not found.broken:  # the rest asks torch
        parts |= {"devices": _devices(found), "attention": _attention(found), "weights": _weights(found)}
    parts |= {"allocator": _allocator(found), "disk": _disk(found), "launcher": _launcher(found)}
    settings = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    values = {"ready": not found.broken, **parts, "settings": settings, "broken": found.broken, "fix": found.fix}
    return Result("not ready" if found.broken else "ready", values, "" if found.broken else "rdpm demo")


def _version(distribution: str, module: str) -> str:
    """The version of a package that can be imported. Raises ImportError, OSError or RuntimeError, as an import may."""
    importlib.import_module(module)
    return metadata.version(distribution)


def _versions(found: Findings) -> dict[str, Any]:
    versions: dict[str, Any] = {"rdpm": __version__, "python": platform.python_version()}
    for distribution, module in NEEDED.items():
        try:
            versions[distribution] = _version(distribution, module)
        except (ImportError, OSError, RuntimeError) as error:  # no such package; no such library; another torch's
            versions[distribution] = f"cannot be imported: {_first_line(error)}"
            found.breaks(f"versions.{distribution}", f"uv pip install --reinstall {distribution}")
    versions["libjpeg-turbo"] = _jpeg_version()
    if not recipe_files.recipe_names():
        found.breaks("recipes", f"{recipe_files.recipe_folder()} holds no recipe: install rdpm again")
    return versions


def _jpeg_version() -> str:
    """The library that decodes JPEGs: other versions may give other pixels."""
    try:
        from PIL import features
    except ImportError:  # told of pillow already
        return ABSENT
    return features.version_feature("libjpeg_turbo") or ABSENT


def _extras(found: Findings) -> dict[str, str]:
    extras = {}
    for extra, (distribution, module, fix) in EXTRAS.items():
        try:
            extras[extra] = f"{distribution} {_version(distribution, module)}"
        except (ImportError, OSError, RuntimeError) as error:
            missing = isinstance(error, ModuleNotFoundError)
            extras[extra] = ABSENT if missing else f"cannot be imported: {_first_line(error)}"
            found.lacks(f"extras.{extra}", fix)
    return extras


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _devices(found: Findings) -> dict[str, Any]:
    """GPUs that torch sees, what it was built for, the driver, and the machine's cores and memory."""
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
    values: dict[str, Any] = {
        "torch_built_for": built if torch.version.cuda or torch.version.hip else "CPU",
        "driver": driver() or ABSENT,
        "cpu_cores": crew.cores(),
        "memory_gib": round(files.memory_bytes() / GIB, 1),
    }
    if not torch.cuda.is_available():
        values["gpus"] = 0
        if driver() and os.environ.get("CUDA_VISIBLE_DEVICES") not in {"", "-1"}:
            fix = "install a torch that was built for this driver's CUDA, or a newer driver"
            found.breaks("devices.gpus", f"{fix}; CUDA_VISIBLE_DEVICES= works on the CPU")
        else:
            found.lacks("devices.gpus", "commands run on the CPU; for more than digits use a machine with a GPU")
        return values
    values["gpus"] = torch.cuda.device_count()
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        values[f"cuda:{number}"] = {
            "name": gpu.name,
            "memory_gib": round(gpu.total_memory / GIB, 1),
            "capability": f"{gpu.major}.{gpu.minor}",
        }
    return values


def driver() -> str | None:
    """Version of the NVIDIA driver that the kernel has loaded."""
    try:
        told = DRIVER.read_text()
    except OSError:
        return None
    version = re.search(r"\s(\d+\.\d+(\.\d+)*)\s", told)
    return version.group(1) if version else told.splitlines()[0]


def _attention(found: Findings) -> dict[str, Any]:
    """The kernels of torch's scaled_dot_product_attention that run here, and the flash-attn package."""
    import torch
    from torch.nn.attention import SDPBackend

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backends = (
        SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    )  # fmt: skip
    usable = [backend.name.lower() for backend in backends if _runs(backend, device)]
    if not usable:
        found.breaks("attention.sdpa", "uv pip install --reinstall torch")
    return {"sdpa": usable or ABSENT, "device": device.type}


def _runs(backend: Any, device: Any) -> bool:
    """Does this kernel take the shapes of a generator? bf16 on a GPU, as training there; fp32 on a CPU."""
    import torch
    from torch.nn import functional as F
    from torch.nn.attention import sdpa_kernel

    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    q = torch.zeros(1, 2, 16, 64, dtype=kind, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of each reason against a kernel
        try:
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(q, q, q)
        except RuntimeError:
            return False
    return True


def _weights(found: Findings) -> dict[str, Any]:
    """Published weight files, by the lookup that scores and losses use."""
    from rdpm_cli import weights
    from rdpm_cli.evaluation import features
    from rdpm_cli.tokenizer import perceptual

    wanted = {
        "inception": (features.INCEPTION, features.OPTION),
        "vgg16": (perceptual.BACKBONES["vgg"].published, "--lpips-vgg FILE, loss.perceptual_weights=FILE in training"),
        "alexnet": (perceptual.BACKBONES["alex"].published, "--lpips-alex FILE"),
    }
    values = {}
    for name, (published, option) in wanted.items():
        told = {"state": "found", "file": published.file}
        try:
            there = weights.find(published, None, option)
            told |= {"path": str(there.path), "sha256": there.sha256}
        except AbsentWeightsError as error:
            told["state"] = ABSENT
            found.lacks(f"weights.{name}", error.hint)
        except CheckpointError as error:
            told["state"] = error.message
            found.breaks(f"weights.{name}", error.hint)
        values[name] = told
    return values


def _allocator(found: Findings) -> dict[str, str]:
    """How memory is handed back: the setting that every command makes as it begins."""
    if threads.tune_allocator():
        return {"malloc": "glibc, freed memory is kept"}
    found.lacks("allocator.malloc", "CPU training is up to twice as fast on a Linux with glibc")
    return {"malloc": "the system's own"}


def _disk(found: Findings) -> dict[str, Any]:
    here = Path.cwd()
    try:
        files.check_folder(here)
    except (PermissionError, UsageError):
        found.lacks("disk.writable", "go to a folder that you may write to, or give --out")
    return {
        "folder": str(here),
        "writable": "disk.writable" not in found.fix,
        "free_gib": round(files.free_bytes(here) / GIB, 1),
    }


def _launcher(found: Findings) -> dict[str, str]:
    """What torchrun or Slurm have set."""
    told = {name: os.environ[name] for name in (*LAUNCHER, *AROUND) if name in os.environ}
    absent = [name for name in LAUNCHER if name not in told]
    if 0 < len(absent) < len(LAUNCHER):
        there = " ".join(name for name in LAUNCHER if name in told)
        found.breaks("launcher", f"{', '.join(absent)} not set: start by torchrun or --gpus N, or `unset {there}`")
    return told

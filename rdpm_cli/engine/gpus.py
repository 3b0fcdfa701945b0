"""GPUs by name: what their vendors' datasheets promise. Torch-free."""

import re
from dataclasses import dataclass

from rdpm_cli.errors import UsageError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str  # of --gpu
    device: str  # pattern of torch.cuda.get_device_name, whole: a MIG slice or a laptop's is another
    bf16_flops: float  # peak a second of dense bf16 products with fp32 sums, without sparsity
    memory_gib: float  # the datasheet's "GB", which drivers count in GiB


GPUS = (
    Gpu("h200", "NVIDIA H200", 989.4e12, 141),
    Gpu("h100", "NVIDIA H100 80GB HBM3", 989.4e12, 80),
    Gpu("h100-nvl", "NVIDIA H100 NVL", 835.5e12, 94),
    Gpu("h100-pcie", "NVIDIA H100 PCIe", 756.0e12, 80),
    Gpu("b200", "NVIDIA B200", 2250e12, 180),
    Gpu("a100", "NVIDIA A100(-SXM4-80GB| 80GB PCIe)", 312e12, 80),
    Gpu("a100-40gb", "NVIDIA A100-(SXM4|PCIE)-40GB", 312e12, 40),
    Gpu("l40s", "NVIDIA L40S", 362e12, 48),
    Gpu("l4", "NVIDIA L4", 121e12, 24),
    Gpu("a10", "NVIDIA A10", 125e12, 24),
    Gpu("a6000", "NVIDIA RTX A6000", 154.8e12, 48),
    Gpu("rtx4090", "NVIDIA GeForce RTX 4090", 165.2e12, 24),
    Gpu("rtx3090", "NVIDIA GeForce RTX 3090", 71e12, 24),
    Gpu("mi300x", "AMD Instinct MI300X.*", 1307.4e12, 192),
)


def called(name: str) -> Gpu:
    """The GPU that --gpu names. Raises UsageError."""
    for gpu in GPUS:
        if gpu.name == name.lower():
            return gpu
    raise UsageError(f"--gpu {name}: not in the table", f"give one of {', '.join(gpu.name for gpu in GPUS)}")


def of_device(name: str) -> Gpu | None:
    """The GPU of a device's own name, where the table has it."""
    return next((gpu for gpu in GPUS if re.fullmatch(gpu.device, name)), None)

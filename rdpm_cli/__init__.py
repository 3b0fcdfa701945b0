"""rdpm: image generation by recurrent token prediction (arXiv 2412.18390). The Python API is rdpm_cli/api.py."""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["CodeStore", "Generator", "Tokenizer", "load", "open_images"]


def __getattr__(name: str) -> Any:
    """A name of the API, whose import takes torch and seconds, and so waits for its first use."""
    if name in __all__:
        return getattr(importlib.import_module("rdpm_cli.api"), name)
    raise AttributeError(f"module 'rdpm_cli' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*globals(), *__all__]

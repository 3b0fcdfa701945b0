"""rdpm: image generation by recurrent token prediction (arXiv 2412.18390)."""

__version__ = "0.1.0"

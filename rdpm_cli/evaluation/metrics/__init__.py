"""Pure metrics, a module a family: arrays in, numbers out."""

from rdpm_cli.evaluation.metrics.frechet import (
    RunningStatistics,
    Statistics,
    balanced_subsets,
    frechet_distance,
    matrix_root,
    statistics,
)
from rdpm_cli.evaluation.metrics.kernel import KernelDistance, kernel_distance
from rdpm_cli.evaluation.metrics.manifold import NEIGHBOURS, precision_recall
from rdpm_cli.evaluation.metrics.pixels import mean_squared_error, psnr, ssim
from rdpm_cli.evaluation.metrics.score import SPLITS, RunningScore

__all__ = [
    "NEIGHBOURS",
    "SPLITS",
    "KernelDistance",
    "RunningScore",
    "RunningStatistics",
    "Statistics",
    "balanced_subsets",
    "frechet_distance",
    "kernel_distance",
    "matrix_root",
    "mean_squared_error",
    "precision_recall",
    "psnr",
    "ssim",
    "statistics",
]

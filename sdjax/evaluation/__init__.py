"""How well a model draws what it was asked for, and how well it reconstructs."""

from sdjax.evaluation.report import Report, evaluate
from sdjax.evaluation.retrieval import ranks
from sdjax.evaluation.similarity import psnr, ssim

__all__ = ["Report", "evaluate", "psnr", "ranks", "ssim"]

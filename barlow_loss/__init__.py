"""Barlow Twins for PyTorch: the exact loss, linear in the number of features, with its layers and diagnostics."""

from barlow_loss.diagnostics import CollapseReport, PairReports, collapse_report, cross_correlation
from barlow_loss.loss import BarlowTwinsLoss, BarlowTwinsTerms, barlow_twins_loss
from barlow_loss.normalization import DistributedBatchNorm, standardize
from barlow_loss.projector import Projector

__all__ = [
    "BarlowTwinsLoss",
    "BarlowTwinsTerms",
    "CollapseReport",
    "DistributedBatchNorm",
    "PairReports",
    "Projector",
    "barlow_twins_loss",
    "collapse_report",
    "cross_correlation",
    "standardize",
]

__version__ = "0.1.0"

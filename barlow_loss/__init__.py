"""Barlow Twins for PyTorch: the exact loss, linear in the number of features, its relatives, layers and diagnostics."""

import importlib
from types import ModuleType

from barlow_loss.diagnostics import CollapseReport, PairReports, collapse_report, cross_correlation
from barlow_loss.loss import BarlowTwinsLoss, BarlowTwinsTerms, barlow_twins_loss
from barlow_loss.mixed import MixedBarlowTwinsLoss, MixedBarlowTwinsTerms, mixed_barlow_twins_loss
from barlow_loss.monitoring import CollapseGate, CollapseMonitor, TrainingCollapsed
from barlow_loss.normalization import DistributedBatchNorm, standardize
from barlow_loss.projector import Projector
from barlow_loss.vicreg import VICRegLoss, VICRegTerms, vicreg_loss

__all__ = [
    "BarlowTwinsLoss",
    "BarlowTwinsTerms",
    "CollapseGate",
    "CollapseMonitor",
    "CollapseReport",
    "DistributedBatchNorm",
    "MixedBarlowTwinsLoss",
    "MixedBarlowTwinsTerms",
    "PairReports",
    "Projector",
    "TrainingCollapsed",
    "VICRegLoss",
    "VICRegTerms",
    "barlow_twins_loss",
    "collapse_report",
    "cross_correlation",
    "mixed_barlow_twins_loss",
    "standardize",
    "vicreg_loss",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    """The oracle, imported when somebody asks for it: nothing here needs it."""
    if name == "reference":
        return importlib.import_module("barlow_loss.reference")
    raise AttributeError(f"module 'barlow_loss' has no attribute {name!r}")

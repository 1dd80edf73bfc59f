"""Predicts what a training step takes under a layout, and finds the fastest that fits: see ``docs/plan.md``."""

from torch_sluice.plan.device import device_names, load_cluster
from torch_sluice.plan.model import describe_model
from torch_sluice.plan.native import check, predict
from torch_sluice.plan.planning import Plan, plan
from torch_sluice.plan.search import search
from torch_sluice.plan.shapes import Cluster, Estimate, Layout, ModelShape

__all__ = [
    "Cluster",
    "Estimate",
    "Layout",
    "ModelShape",
    "Plan",
    "check",
    "describe_model",
    "device_names",
    "load_cluster",
    "plan",
    "predict",
    "search",
]

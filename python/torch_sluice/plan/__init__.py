"""Predicts what a training step takes under a layout: see ``docs/plan.md``."""

from torch_sluice.plan.device import device_names, load_cluster
from torch_sluice.plan.native import check, predict
from torch_sluice.plan.shapes import Cluster, Estimate, Layout, ModelShape

__all__ = ["Cluster", "Estimate", "Layout", "ModelShape", "check", "device_names", "load_cluster", "predict"]

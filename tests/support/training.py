"""A model and a context that train in milliseconds, as options of ``torch-sluice train`` and as settings."""

from torch_sluice.train.settings import PRESETS

TINY = (
    *("--context=48", "--width=16", "--heads=2", "--layers=1", "--micro-size=2", "--threads=1"),
    *("--local-window=4", "--target-density=0.5"),
)

SMALL = PRESETS["demo"].override(
    steps=2, context=48, width=16, heads=2, layers=1, local_window=4, target_density=0.5, quick_windows=2, threads=1
)

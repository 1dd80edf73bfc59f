"""Options of ``torch-sluice train`` for a model and a context that train in milliseconds."""

TINY = (
    *("--context=48", "--width=16", "--heads=2", "--layers=1", "--micro-size=2", "--threads=1"),
    *("--local-window=4", "--target-density=0.5"),
)

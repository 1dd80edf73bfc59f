"""What a step of a pipeline takes, before anything runs (simulation.py), and how to share its work out (cuts.py)."""

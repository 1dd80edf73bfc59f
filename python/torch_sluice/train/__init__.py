"""The main job: trains a small language model dense and with Sluice, side by side, and compares them."""

"""The main job on a mesh of ranks: data, tensor and pipeline parallel by what PyTorch has, with Sluice inside."""

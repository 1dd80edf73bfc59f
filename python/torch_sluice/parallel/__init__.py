"""Process groups over shared memory, the backend "sluice" of torch.distributed; and gradients reduced in few bytes."""

from torch_sluice.parallel.adaptive_all_reduce import AdaptiveAllReduce, adaptive_all_reduce_hook

__all__ = ["AdaptiveAllReduce", "adaptive_all_reduce_hook"]

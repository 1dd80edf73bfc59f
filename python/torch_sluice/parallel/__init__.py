"""Process groups over shared memory, the backend "sluice" of torch.distributed; and gradients reduced in few bytes."""

from torch_sluice.parallel.adaptive_all_reduce import AdaptiveAllReduce, adaptive_all_reduce_hook
from torch_sluice.parallel.statistics import CommunicationStatistics, communication_statistics

__all__ = ["AdaptiveAllReduce", "CommunicationStatistics", "adaptive_all_reduce_hook", "communication_statistics"]

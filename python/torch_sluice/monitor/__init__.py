"""What a run makes of the machine: FLOPs, MFU against a measured peak, memory, kept pairs, bits, communication.

The callbacks are in ``torch_sluice.monitor.hugging_face`` and ``torch_sluice.monitor.lightning``.
"""

from torch_sluice.monitor import bits
from torch_sluice.monitor.counter import count_flops, measure_flops
from torch_sluice.monitor.flops import FlopCount
from torch_sluice.monitor.limits import MonitorWarning, find_problems
from torch_sluice.monitor.memory import peak_resident_bytes
from torch_sluice.monitor.monitor import Monitor
from torch_sluice.monitor.pairs import KeptPairCounter, count_kept_pairs
from torch_sluice.monitor.peak import measure_peak_flops

__all__ = [
    "FlopCount",
    "KeptPairCounter",
    "Monitor",
    "MonitorWarning",
    "bits",
    "count_flops",
    "count_kept_pairs",
    "find_problems",
    "measure_flops",
    "measure_peak_flops",
    "peak_resident_bytes",
]

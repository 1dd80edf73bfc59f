"""What training makes of the machine: FLOPs, MFU against a measured peak, memory, kept-pair density."""

from torch_sluice.monitor.flops import KeptPairCounter, count_flops, count_kept_pairs
from torch_sluice.monitor.monitor import Monitor, MonitorWarning, find_problems, peak_resident_bytes
from torch_sluice.monitor.peak import measure_peak_flops

__all__ = [
    "KeptPairCounter",
    "Monitor",
    "MonitorWarning",
    "count_flops",
    "count_kept_pairs",
    "find_problems",
    "measure_peak_flops",
    "peak_resident_bytes",
]

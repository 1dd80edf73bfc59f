"""What this process holds in memory, and the most that it held for a while; 0 where /proc is not to be had."""

import contextlib
import re
import resource
from pathlib import Path


def held_bytes() -> int:
    """What the process holds in memory now."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return 0


def forget_peak() -> None:
    """Lets the kernel measure the largest memory from now on, where it can: loading may have taken more."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most that it held since ``forget_peak``. Not ``getrusage``'s, which counts what its parent held before."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024 if found else 0
    return 0

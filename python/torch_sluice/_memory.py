"""Gives memory that is no longer in use back to the system."""

import ctypes
import sys


def release_memory() -> None:
    """What a C library keeps of freed memory may grow beyond what is in use: large tensors that come and go leave gaps
    between small ones that stay, into which the next do not fit. glibc gives such gaps back when it is told to."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(ctypes.c_size_t(0))

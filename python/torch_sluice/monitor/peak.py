"""The peak that MFU is a share of: what this machine's matrix multiply reaches, measured and not looked up."""

import time

import torch


def measure_peak_flops(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seconds: float = 0.6
) -> float:
    """FLOP/s of a large square matrix product with torch's current number of threads: the best of several batches.

    A product of two n x n matrices counts 2 n^3 operations. n is 1024 on a CPU, 8192 elsewhere.
    """
    device = torch.device(device)
    n = 1024 if device.type == "cpu" else 8192
    left = torch.randn(n, n, device=device).to(dtype)
    right = torch.randn(n, n, device=device).to(dtype)
    out = torch.empty(n, n, dtype=dtype, device=device)

    def time_product() -> float:
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    time_product()
    best, end = time_product(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, time_product())
    return 2.0 * n**3 / best

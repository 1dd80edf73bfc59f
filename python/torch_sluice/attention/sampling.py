"""Which query rows to look at when looking at all of them costs too much."""

import math

import torch


def sample_rows(n, share, device):
    """Sorted int64 indices of ``ceil(share * n)`` of n rows, one drawn from each of equal strata."""
    count = min(n, math.ceil(share * n))
    if count == n:
        return torch.arange(n, device=device)
    strata = torch.arange(count, device=device) + torch.rand(count, device=device)
    return (strata * (n / count)).long().clamp(max=n - 1)

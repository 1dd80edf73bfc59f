"""Which query rows to look at when looking at all of them costs too much."""

import math

import torch


def sample_rows(n, share, device):
    """``ceil(share * n)`` of n rows, sorted int64: one drawn from each of equal strata, every row as likely.

    Where n is no multiple of their number, two neighbours may be the same row.
    """
    count = min(n, math.ceil(share * n))
    if count == n:
        return torch.arange(n, device=device)
    strata = torch.arange(count, device=device) + torch.rand(count, device=device)
    return (strata * (n / count)).long().clamp(max=n - 1)

"""Where the time of gated attention's forward goes: what ``python -m benchmarks.gated_attention --profile`` prints.

Seconds are summed over the threads, of calls beside those that are timed, as timing the parts costs a little:

    sort      putting keys in order
    pack      packing keys and values for the products
    rows      loading queries, putting them in order, storing results
    products  of the pairs that are kept
    waste     products of others: groups of rows are worked on as wide as their longest, in whole vectors
    softmax   exponentials, sums and the gate; cutting by position
    rest      finding prefixes, and the way from one block to the next
    idle      of a thread that waits for the others, and what is outside of the kernel
"""

import ctypes
import time
from collections.abc import Callable

import torch_sluice
from benchmarks import harness

PARTS = ("sort", "pack", "rows", "products", "waste", "softmax", "rest", "idle")
_TIMED = ("busy", "sort", "pack", "rows", "scores", "softmax", "values")


class _Profile(ctypes.Structure):
    """sl_attention_profile of ops/sluice/gated_attention.h."""

    _fields_ = [
        *((name, ctypes.c_double) for name in _TIMED),
        ("score_pairs", ctypes.c_int64),
        ("value_pairs", ctypes.c_int64),
    ]


def measure(call: Callable, needed: int, options) -> dict[str, float] | None:
    """Seconds of each part per call; None without ``options.profile``. needed: pairs of the products."""
    if not options.profile:
        return None
    library, profile = ctypes.CDLL(torch_sluice.library_path()), _Profile()
    library.sl_attention_profile_begin()
    begun = time.perf_counter()
    for _ in range(options.repeats):
        call()
    seconds = time.perf_counter() - begun
    library.sl_attention_profile_end(ctypes.byref(profile))
    needed = needed * options.repeats
    products = sum(
        spent * min(1.0, needed / pairs) if pairs else 0.0
        for spent, pairs in ((profile.scores, profile.score_pairs), (profile.values, profile.value_pairs))
    )
    parts = {name: getattr(profile, name) for name in ("sort", "pack", "rows", "softmax")}
    parts |= {"products": products, "waste": profile.scores + profile.values - products}
    parts |= {"rest": profile.busy - sum(parts.values())}
    parts |= {"idle": options.threads * seconds - profile.busy}
    return {name: parts[name] / options.repeats for name in PARTS}


def print_profiles(rows: list[dict]) -> None:
    """A table of the rows that have a profile, in shares of their time."""
    rows = [row for row in rows if row.get("profile")]
    if not rows:
        return

    def share_of(part: str) -> Callable[[dict], str]:
        return lambda row: f"{row['profile'][part] / sum(row['profile'].values()):.1%}"

    columns = {name: (lambda row, name=name: str(row[name])) for name in ("dtype", "n", "density")}
    columns["threads' time"] = lambda row: harness.format_seconds(sum(row["profile"].values()))
    harness.print_rows("where the forward's time goes", rows, columns | {part: share_of(part) for part in PARTS})

"""Random calls of gated attention against the formula in eager torch: dense, packed and paged ones, whose sizes,
layouts, dtypes, modes, options, padding, places, gates and tiers are drawn; values, log-sum-exps and gradients are
compared.

By hand: ``PYTHONPATH=tests python -m support.attention_fuzz --seconds 600 [--seed 5] [--isa avx2]``. A call is a
function of its seed, each choice in it of the seed and its name. One that fails is printed with all its choices. With
them it comes again, ``check_call(seed, **choices)``, even when more can be drawn. That line belongs into the table of
``tests/ops/test_attention_fuzz.py``.
"""

import argparse
import math
import os
import subprocess
import sys
import time
import traceback
from itertools import accumulate

import torch

from support.attention import choose_pairs, formula
from support.attention_draws import Drawn, draw_call
from support.errors import assert_close_as_torch
from torch_sluice import gated_attention, gated_attention_paged, gated_attention_varlen
from torch_sluice.info import describe_plugin

NAMES = ("out", "lse", "dq", "dk", "dv", "da", "db")
CHOOSING = {"causal", "tau", "window", "sinks", "key_range", "q_offset", "text_begin", "attn_mask", "sliding_window"}
TIERS = ("scalar", "avx2", "avx512", "avx512bf16")
_EPS = torch.finfo(torch.float32).eps


def operator(drawn: Drawn, leaves: list, options: dict) -> tuple:
    """(out, lse), [B, H, N, Dv] and [B, H, N], of what the call is to."""
    if drawn.kind == "dense":
        return gated_attention(*leaves[:5], return_lse=True, **options)
    if drawn.kind == "paged":
        return _paged(drawn, leaves, options)
    packed = [x[0].transpose(0, 1) for x in leaves[:5]]
    ends = [torch.tensor([0, *accumulate(n)], dtype=torch.int32) for n in (*zip(*drawn.lengths, strict=True),)] or [
        torch.zeros(1, dtype=torch.int32)
    ] * 2
    if "output_gate" in options:
        options = options | dict(output_gate=options["output_gate"][0].transpose(0, 1))
    out, lse = gated_attention_varlen(*packed, *ends, return_lse=True, **options)
    return out.transpose(0, 1).unsqueeze(0), lse.unsqueeze(0)


def _table(drawn: Drawn) -> torch.Tensor:
    """[B, blocks], where each block of each text lies: anywhere, -1 where it was dropped."""
    generator, batch = drawn.choices.generator("block_table"), drawn.inputs[0].shape[0]
    blocks = drawn.inputs[1].shape[2] // drawn.block_size
    places = torch.randperm(batch * blocks, generator=generator).view(batch, blocks).int()
    dropped = torch.rand(batch, blocks, generator=generator) < 0.3
    return places.masked_fill(dropped, -1) if drawn.holes else places


def _paged(drawn: Drawn, leaves: list, options: dict) -> tuple:
    q, k, v, a, b = (x.detach() for x in leaves[:5])
    options = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    table, block = _table(drawn), drawn.block_size
    caches = []
    for x in (k, v, b.unsqueeze(-1)):
        batch, heads, length, width = x.shape
        cache = torch.full((table.numel(), block, heads, width), torch.nan, dtype=x.dtype)
        chunks = x.transpose(1, 2).reshape(batch * length // block, block, heads, width)
        there = table.flatten() >= 0
        cache[table.flatten()[there].long()] = chunks[there]
        caches.append(cache)
    seqlens = torch.tensor(drawn.lengths, dtype=torch.int32)
    return gated_attention_paged(
        q, caches[0], caches[1], a, caches[2].squeeze(-1), table, seqlens, return_lse=True, **options
    )


def expected(drawn: Drawn, leaves: list, options: dict) -> tuple:
    """The same of the formula, in the precision of the leaves."""
    options = options | dict(choice_dtype=drawn.inputs[3].dtype)
    if drawn.kind == "dense":
        return formula(*leaves[:5], **options)
    if drawn.kind == "paged":
        return formula(*leaves[:5], **_as_dense(drawn, options))
    outs, lses, first_q, first_k = [], [], 0, 0
    for text, (n_q, n_k) in enumerate(drawn.lengths):
        queries, keys = slice(first_q, first_q + n_q), slice(first_k, first_k + n_k)
        q, k, v, a, b = leaves[:5]
        own = dict(options)
        for name in ("tau", "alibi_slopes"):
            if isinstance(own.get(name), torch.Tensor) and own[name].dim() == 2:
                own[name] = own[name][text : text + 1]
        if "output_gate" in own:
            own["output_gate"] = own["output_gate"][:, :, queries]
        out, lse = formula(q[:, :, queries], k[:, :, keys], v[:, :, keys], a[:, :, queries], b[:, :, keys], **own)
        outs.append(out)
        lses.append(lse)
        first_q, first_k = first_q + n_q, first_k + n_k
    if not outs:
        return leaves[0].sum(-1, keepdim=True).expand(*leaves[0].shape[:3], leaves[2].shape[3]), leaves[3]
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _as_dense(drawn: Drawn, options: dict) -> dict:
    """The options of a paged call for keys side by side: what is valid, where queries are, which blocks are gone."""
    q, k = drawn.inputs[:2]
    lengths = torch.tensor(drawn.lengths)
    there = (_table(drawn) >= 0).repeat_interleave(drawn.block_size, 1).view(len(lengths), 1, 1, -1)
    mask = options.get("attn_mask")
    if mask is None or mask.dtype == torch.bool:
        mask = there if mask is None else there & mask
    else:
        shape = torch.broadcast_shapes(mask.shape, there.shape)
        mask = mask.expand(shape).masked_fill(~there.expand(shape), -math.inf)
    return dict(q_offset=lengths - q.shape[2]) | options | dict(
        key_range=torch.stack((torch.zeros_like(lengths), lengths.clamp(max=k.shape[2])), 1), attn_mask=mask,
        text_begin=torch.zeros_like(lengths),
    )  # fmt: skip


def _differentiate(run, drawn: Drawn, dtype: torch.dtype | None) -> tuple[tuple, list]:
    """(out, lse and the gradients, the leaves); dtype: of all floating-point inputs, None: as they were drawn."""

    def leaf(x):
        return (x.detach() if dtype is None else x.detach().to(dtype)).requires_grad_()

    leaves, options = [leaf(x) for x in drawn.inputs], dict(drawn.options)
    if "output_gate" in options:
        leaves.append(leaf(options["output_gate"].to(drawn.inputs[0].dtype)))
        options["output_gate"] = leaves[-1]
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        leaves.append(leaf(mask))
        options["attn_mask"] = leaves[-1]
    out, lse = run(drawn, leaves, options)
    if drawn.kind == "paged":
        return (out.detach(), lse.detach()), leaves
    found = torch.autograd.grad(out, leaves, drawn.dout.to(out.dtype), allow_unused=not drawn.inputs[0].shape[2])
    found = [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]
    return (out.detach(), lse.detach(), *found), leaves


def floors(drawn: Drawn, found: tuple) -> tuple[dict[str, float], float]:
    """What rounding may make of each result, beside what it makes of torch's; and of an exponent.

    A wrong pair shows as a share of the largest number; so these bounds are wide.
    """
    (q, k, v, *_), dout, options = drawn.inputs, drawn.dout, drawn.options
    out, lse = found[:2]
    if not (out.numel() and k.numel()):
        return {}, 0.0
    eps = float(torch.finfo(q.dtype).eps)
    largest = max(float(v.abs().amax()), float(out.abs().amax()))
    terms = float(dout.abs().amax()) * largest * v.shape[3]
    scale = abs(options.get("scale", q.shape[3] ** -0.5))
    # Gradients of q and k are differences that may cancel.
    cancels = 16 * eps * terms * scale * float(max(q.abs().amax(), k.abs().amax()))
    summed = math.sqrt(max(1, q.shape[2] * q.shape[1] // k.shape[1]))  # by a key, over queries
    # g (1 - g) of a gate that is all but 1 is rounded as a number near 1 is.
    gate = 16 * terms * _EPS
    if "output_gate" in options:  # dout times it is rounded to the dtype, as in torch
        gate += 0.5 * terms * eps
    # P is exp(s - lse), whose relative error is the absolute one of the larger of the two: that of a sum of products of
    # both signs.
    products = q.abs().double() @ k.abs().double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    exponent = float(products.amax()) * scale * _EPS
    mask = options.get("attn_mask")
    of_mask = 1.0
    if mask is not None and mask.dtype != torch.bool and mask.numel():
        exponent += float(mask.nan_to_num(neginf=0.0).abs().amax()) * _EPS
        of_mask = max(1.0, math.sqrt(q.shape[:3].numel() * k.shape[2] / mask.numel()))
    if "alibi_slopes" in options:
        exponent += max(q.shape[2], k.shape[2]) * _EPS
    if "softcap" in options:  # tanh is right to 3e-7 of the cap
        exponent += 3 * options["softcap"] * _EPS
    if "mode" in options:  # shares of two log-sum-exps, or of a sum of gates
        exponent += (10 + float(lse.nan_to_num(neginf=0.0).abs().amax())) * _EPS
    if options.get("mode") == "post":  # out in half precision is rounded once more, times its share
        gate += terms * eps
    each = 32 * _EPS  # of a number that is added to others in float32
    return {
        "out": each * float(v.abs().amax()) * k.shape[2] ** 0.5, "dv": each * float(dout.abs().amax()) * summed,
        "dq": cancels, "dk": cancels * summed, "da": gate, "db": gate * summed, "doutput_gate": 4 * cancels,
        "dattn_mask": 16 * eps * terms * of_mask,
    }, exponent  # fmt: skip


def _check_count(drawn: Drawn) -> None:
    """That the count of kept pairs is exact; mode "log" may find a threshold by itself."""
    if drawn.kind != "dense" or drawn.options.get("mode") == "log":
        return
    _, kept = gated_attention(*drawn.inputs, return_kept=True, **drawn.options)
    options = {name: drawn.options[name] for name in drawn.options.keys() & CHOOSING}
    right = choose_pairs(*drawn.inputs[3:], **options)[1].sum((-1, -2))
    assert torch.equal(kept, right), "the count of kept pairs is wrong"


def check_call(seed: int, **pins) -> None:
    """Raises AssertionError, with the call, where the operator and the formula part."""
    drawn = draw_call(seed, **pins)
    try:
        found, leaves = _differentiate(operator, drawn, None)
        again = operator(drawn, list(drawn.inputs), drawn.options)[0]
        assert torch.equal(found[0], again.detach()), "the same call gave other bits"
        _check_count(drawn)
        truth, _ = _differentiate(expected, drawn, torch.float64)
        peer, _ = _differentiate(expected, drawn, None)
        names = [*NAMES, *(["doutput_gate"] if "output_gate" in drawn.options else [])]
        names = [*names, "dattn_mask"][: len(truth)]
        floor, exponent = floors(drawn, found)
        like = (drawn.inputs[0], drawn.inputs[3], *leaves)[: len(truth)]
        for name, ours, right, theirs, source in zip(names, found, truth, peer, like, strict=True):
            assert ours.dtype == source.dtype, f"{name} is {ours.dtype}"
            assert ours.shape == right.shape, f"{name} is {tuple(ours.shape)}"
            most = 8 * exponent if name == "lse" else floor.get(name, 0.0)
            if name != "lse" and right.numel():
                most += 16 * exponent * float(right.abs().nan_to_num(posinf=0.0).amax())
            assert_close_as_torch(name, ours, right, theirs, most, drawn=True)
    except Exception as error:
        call = ", ".join(f"{name}={value!r}" for name, value in drawn.choices.made.items() if name.isidentifier())
        others = {name: value for name, value in drawn.choices.made.items() if not name.isidentifier()}
        raise AssertionError(f"{type(error).__name__}: {error}\nin check_call({seed}, {call}, **{others})") from error


def fuzz(seconds: float, seed: int) -> int:
    """How many calls were checked in this time."""
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        check_call(seed + count)
        count += 1
    return count


def run_tiers(seconds: float, seed: int) -> tuple[str, bool]:
    """Each tier that this processor has, in a process of its own, for its share of the time. Returns what they print
    and whether all passed."""
    best = describe_plugin()["cpu"]["isa_detected"]
    tiers = TIERS[: TIERS.index(best) + 1] if best in TIERS else (best,)
    texts, passed = [], True
    for number, tier in enumerate(tiers):
        command = [sys.executable, "-m", "support.attention_fuzz", f"--seconds={seconds / len(tiers)}"]
        command += [f"--seed={seed + 10**6 * number}", f"--isa={tier}"]
        environment = {**os.environ, "SLUICE_ISA": tier, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        passed &= run.returncode == 0
        texts.append(run.stdout + run.stderr)
    return "".join(texts), passed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long, over all tiers")
    parser.add_argument("--seed", type=int, default=None, help="of the first call; the next have the next ones")
    parser.add_argument("--isa", help="the tier that this process runs on; default: each that the processor has")
    options = parser.parse_args()
    seed = int(time.time()) * 1000 if options.seed is None else options.seed
    if options.isa is None:
        text, passed = run_tiers(options.seconds, seed)
        print(text, end="")
        sys.exit(not passed)
    try:
        count = fuzz(options.seconds, seed)
    except AssertionError:
        traceback.print_exc()
        sys.exit(1)
    print(f"{options.isa}: {count} calls from seed {seed} on, none parted")


if __name__ == "__main__":
    main()

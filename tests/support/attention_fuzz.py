"""Random calls of ``torch_sluice.gated_attention`` against the formula in eager torch: sizes, layouts, dtypes, options,
padding, places, gates and tiers are drawn; values, log-sum-exps and all gradients are compared.

By hand: ``PYTHONPATH=tests python -m support.attention_fuzz --seconds 600 [--seed 5] [--isa avx2]``. A call is a
function of its seed; one that fails is printed with what it was, and the seed with which it comes again.
"""

import argparse
import math
import os
import random
import subprocess
import sys
import time
import traceback

import torch

from support.attention import choose_pairs, formula_with_gradients
from support.errors import assert_close_as_torch
from torch_sluice import gated_attention
from torch_sluice.info import describe_plugin

NAMES = ("out", "lse", "dq", "dk", "dv", "da", "db")
CHOOSING = {"causal", "tau", "window", "sinks", "key_range", "q_offset", "text_begin", "attn_mask", "sliding_window"}
TIERS = ("scalar", "avx2", "avx512", "avx512bf16")
LAYOUTS = ("plain", "heads inside", "expanded batch", "cut out", "shifted", "strided")
_PAIRS = 1 << 21  # at most, of a call: the formula is dense


def draw_sizes(draw):
    """Small sizes mostly, on both sides of what kernels take at once; now and then large ones."""
    heads_kv = draw.choice((1, 1, 2, 3))
    sizes = dict(
        batch=draw.choice((1, 1, 2, 3)), heads_kv=heads_kv, heads=heads_kv * draw.choice((1, 1, 2, 3, 7)),
        n_q=draw.choice((0, 1, 1, 2, 3, 7, 8, 9, 16, 17, 31, 64, 65, 130, 300)),
        n_k=draw.choice((0, 1, 2, 5, 8, 15, 16, 33, 64, 70, 129, 257, 513, 1100)),
        head_dim=draw.choice((1, 3, 8, 16, 31, 32, 40, 64, 64, 96, 128, 256)),
    )  # fmt: skip
    sizes["head_dim_v"] = sizes["head_dim"] if draw.random() < 0.7 else draw.choice((1, 5, 16, 24, 64, 80, 256))
    if draw.random() < 0.4:
        sizes["n_k"] = sizes["n_q"]
    while sizes["batch"] * sizes["heads"] * sizes["n_q"] * sizes["n_k"] > _PAIRS:
        sizes["heads"], sizes["heads_kv"], sizes["batch"] = heads_kv, heads_kv, 1
        sizes["n_q"] //= 2
    return sizes


def draw_options(draw, sizes):
    batch, heads, n_q, n_k = (sizes[name] for name in ("batch", "heads", "n_q", "n_k"))
    options = dict(causal=draw.random() < 0.6)
    tau = draw.choice((None, 0.0, 0.3, 0.5, 0.7, 0.9, 0.9999, "heads", "batch and heads"))
    if isinstance(tau, str):
        shape = (heads,) if tau == "heads" else (batch, heads)
        tau = torch.rand(shape, generator=torch.Generator().manual_seed(draw.randrange(1 << 30))) * 0.99
    if tau is not None:
        options["tau"] = tau
    if draw.random() < 0.5:
        options["window"] = draw.choice((1, 2, 5, 16, 17, 64, 2000))
    if draw.random() < 0.4:
        options["sinks"] = draw.choice((1, 2, 4, 17, 2000))
    if draw.random() < 0.2:
        options["scale"] = draw.choice((0.01, 0.3, 1.0, -0.2))
    if draw.random() < 0.35:
        bounds = [sorted((draw.randint(0, n_k), draw.randint(0, n_k))) for _ in range(batch)]
        options["key_range"] = torch.tensor(bounds)
    if n_k >= n_q and draw.random() < 0.35:
        options["q_offset"] = torch.tensor([draw.randint(0, n_k - n_q) for _ in range(batch)])
    if draw.random() < 0.2:
        options["sliding_window"] = draw.choice((1, 2, 9, 64, 5000))
    if draw.random() < 0.15:
        options["softcap"] = draw.choice((0.3, 5.0, 50.0))
    if draw.random() < 0.15:
        slopes = torch.rand(heads, generator=torch.Generator().manual_seed(draw.randrange(1 << 30)))
        options["alibi_slopes"] = slopes if draw.random() < 0.5 else slopes.expand(batch, heads)
    if draw.random() < 0.15:
        shape = (batch, heads, n_q, draw.choice((1, sizes["head_dim_v"])))
        options["output_gate"] = torch.randn(shape, generator=torch.Generator().manual_seed(draw.randrange(1 << 30)))
    if draw.random() < 0.3:
        options["attn_mask"] = draw_mask(draw, (batch, heads, n_q, n_k))
    if draw.random() < 0.25:
        begins = options["key_range"][:, 0].tolist() if "key_range" in options else [0] * batch
        options["text_begin"] = torch.tensor([begin - draw.choice((0, 1, 3, 100)) for begin in begins])
    return options


def draw_mask(draw, shape):
    """Booleans or numbers, with holes or without, broadcast over some dimensions, maybe transposed in memory."""
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    shape = [1 if draw.random() < 0.35 else size for size in shape]
    seen = torch.rand(shape, generator=generator) < draw.choice((1.0, 0.8, 0.2))
    dtype = draw.choice((torch.bool, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64))
    mask = seen if dtype == torch.bool else torch.randn(shape, generator=generator).masked_fill(~seen, -math.inf)
    mask = mask.to(dtype)
    return mask.mT.contiguous().mT if draw.random() < 0.3 else mask


def draw_tensor(draw, shape, dtype, spread=1.0):
    """Normal entries in one of the layouts that a model may hand over."""
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))

    def normal(*sizes):
        return (torch.randn(*sizes, generator=generator) * spread).to(dtype)

    layout, (batch, heads, length, *rest) = draw.choice(LAYOUTS), shape
    if layout == "heads inside":
        return normal(batch, length, heads, *rest).transpose(1, 2), layout
    if layout == "expanded batch":
        return normal(1, heads, length, *rest).expand(shape), layout
    if layout == "cut out":
        return normal(batch, heads + 1, length + 3, *rest)[:, 1:, 2 : length + 2], layout
    if layout == "shifted":  # one element from where an allocation begins: aligned to nothing
        whole = normal(batch * heads * length * (rest[0] if rest else 1) + 1)
        return whole[1:].view(shape), layout
    if layout == "strided" and rest:
        return normal(batch, heads, length, 2 * rest[0])[..., ::2], layout
    return normal(*shape), "plain"


def draw_call(seed):
    """(inputs, dout, options, what to print)."""
    draw = random.Random(seed)
    sizes, dtype = draw_sizes(draw), draw.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    options = draw_options(draw, sizes)
    queries = (sizes["batch"], sizes["heads"], sizes["n_q"])
    keys = (sizes["batch"], sizes["heads_kv"], sizes["n_k"])
    spread = draw.choice((1.0, 1.0, 1.0, 0.0, 3.0))
    drawn = [
        draw_tensor(draw, (*queries, sizes["head_dim"]), dtype, spread),
        draw_tensor(draw, (*keys, sizes["head_dim"]), dtype, spread),
        draw_tensor(draw, (*keys, sizes["head_dim_v"]), dtype),
        *(draw_tensor(draw, shape, torch.float32, draw.choice((0.0, 1.0, 3.0, 30.0))) for shape in (queries, keys)),
    ]
    dout, _ = draw_tensor(draw, (*queries, sizes["head_dim_v"]), dtype)
    inputs, layouts = zip(*drawn, strict=True)
    return inputs, dout, options, dict(seed=seed, **sizes, dtype=dtype, layouts=layouts, **options)


def check_call(seed):
    """Raises AssertionError, with the call, where the operator and the formula part."""
    inputs, dout, options, text = draw_call(seed)
    try:
        leaves = [x.detach().requires_grad_() for x in inputs]
        mask, names = options.get("attn_mask"), NAMES
        if "output_gate" in options:
            leaves.append(options["output_gate"].to(inputs[0].dtype).requires_grad_())
            options, names = options | dict(output_gate=leaves[-1]), (*NAMES, "doutput_gate")
        if mask is not None and mask.dtype != torch.bool:
            leaves.append(mask.detach().requires_grad_())
            options, names = options | dict(attn_mask=leaves[-1]), (*names, "dattn_mask")
        out, lse = gated_attention(*leaves[:5], return_lse=True, **options)
        found = out.detach(), lse, *torch.autograd.grad(out, leaves, dout)
        again, kept = gated_attention(*inputs, return_kept=True, **options)
        assert torch.equal(out.detach(), again), "the same call gave other bits"
        chosen = choose_pairs(*inputs[3:], **{name: options[name] for name in options.keys() & CHOOSING})[1]
        assert torch.equal(kept, chosen.sum((-1, -2))), "the count of kept pairs is wrong"
        truth = formula_with_gradients(inputs, dout, exact=True, **options)
        peer = formula_with_gradients(inputs, dout, **options)
        q, k, v, a, _ = inputs
        cancels = exponent = gate = summed = of_score = 0.0
        pairs = q.shape[:3].numel() * k.shape[2]
        each = 32 * torch.finfo(torch.float32).eps  # of a number that is added to others in float32
        if out.numel() and k.numel():
            # Gradients of q and k are differences that may cancel.
            terms = dout.abs().amax() * max(v.abs().amax(), out.detach().abs().amax()) * v.shape[3]
            of_score = 16 * float(torch.finfo(q.dtype).eps * terms)
            scale = abs(options.get("scale", q.shape[3] ** -0.5))
            # A wrong pair shows as a share of the largest number; so these bounds are wide.
            cancels = 16 * float(torch.finfo(q.dtype).eps * terms * scale * max(q.abs().amax(), k.abs().amax()))
            summed = math.sqrt(max(1, q.shape[2] * q.shape[1] // k.shape[1]))  # by a key, over queries
            # g (1 - g) of a gate that is all but 1 is rounded as a number near 1 is.
            gate = 16 * float(terms) * torch.finfo(torch.float32).eps
            if "output_gate" in options:  # dout times it is rounded to the dtype, as in torch
                gate += 0.5 * float(terms) * torch.finfo(q.dtype).eps
            # P is exp(s - lse), whose relative error is the absolute one of the larger of the two: that of a sum of
            # products of both signs.
            products = q.abs().double() @ k.abs().double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
            exponent = float(products.amax()) * scale * torch.finfo(torch.float32).eps
            if mask is not None and mask.dtype != torch.bool and mask.numel():
                exponent += float(mask.nan_to_num(neginf=0.0).abs().amax()) * torch.finfo(torch.float32).eps
            if "alibi_slopes" in options:
                exponent += max(q.shape[2], k.shape[2]) * torch.finfo(torch.float32).eps
            if "softcap" in options:  # tanh is right to 3e-7 of the cap
                exponent += 3 * options["softcap"] * torch.finfo(torch.float32).eps
        for name, ours, right, theirs, like in zip(names, found, truth, peer, (q, a, *leaves), strict=True):
            assert ours.dtype == like.dtype, f"{name} is {ours.dtype}"
            assert ours.shape == right.shape, f"{name} is {tuple(ours.shape)}"
            floor = {
                "out": each * float(v.abs().amax()) * k.shape[2] ** 0.5 if right.numel() and v.numel() else 0.0,
                "dv": each * float(dout.abs().amax()) * summed if dout.numel() else 0.0,
                "dq": cancels, "dk": cancels * summed, "da": gate, "db": gate * summed,
                "doutput_gate": 4 * cancels,
                "dattn_mask": of_score * max(1.0, math.sqrt(right.numel() and pairs / right.numel())),
            }.get(name, 0.0)  # fmt: skip
            if name == "lse":
                floor = 8 * exponent
            elif right.numel():
                floor += 16 * exponent * float(right.abs().amax())
            assert_close_as_torch(name, ours, right, theirs, floor)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\nin {text}") from error


def fuzz(seconds, seed):
    """How many calls were checked in this time."""
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        check_call(seed + count)
        count += 1
    return count


def run_tiers(seconds, seed):
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

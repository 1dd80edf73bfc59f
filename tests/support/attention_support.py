"""Which features of gated attention work where, found by trying each: the table of docs/attention.md.

By hand: ``PYTHONPATH=tests python -m support.attention_support`` prints it.
"""

import inspect

import torch

from support.attention import formula_with_gradients, random_inputs
from torch_sluice import gated_attention, gated_attention_paged, gated_attention_varlen

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = 12
FEATURES = {
    "`causal`": dict(causal=True),
    "`tau`": dict(tau=0.6),
    "`density`": dict(density=0.5),
    "`window`, `sinks`": dict(tau=0.6, window=3, sinks=2),
    "`sliding_window`": dict(sliding_window=5),
    "`softcap`": dict(softcap=2.0),
    "`alibi_slopes`": dict(alibi_slopes=torch.tensor([0.1, 0.2, 0.3, 0.4])),
    "`attn_mask`, booleans": dict(attn_mask=torch.ones(TOKENS, TOKENS).tril().bool()),
    "`attn_mask`, numbers": dict(attn_mask=torch.linspace(-1, 1, TOKENS * TOKENS).view(TOKENS, TOKENS)),
    "`key_range`": dict(key_range=torch.tensor([[1, 9]])),
    "`q_offset`": dict(q_offset=torch.tensor([0]), causal=True),
    "`text_begin`": dict(text_begin=torch.tensor([-1]), tau=0.6, sinks=2),
    "`output_gate`": dict(output_gate=torch.linspace(-2, 2, 4 * TOKENS).view(1, 4, TOKENS)),
    "`dropout_p`": dict(dropout_p=0.3),
    "`return_lse`": dict(return_lse=True),
    "`return_kept`": dict(return_kept=True, tau=0.6),
}
COLUMNS = ("float32, bfloat16, float16", "gradients", "varlen", "paged", "post, log", "compiled", "vmap")
REFUSALS = (ValueError, TypeError, NotImplementedError)


def close(found, wanted, dtype):
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found.float(), wanted.float(), atol=tolerance, rtol=tolerance)


def reference_options(options):
    options = {name: x for name, x in options.items() if name not in ("return_lse", "return_kept")}
    return {
        name: x[(None,) * (4 - x.dim())] if name == "attn_mask" else x[..., None] if name == "output_gate" else x
        for name, x in options.items()
    }


def first(result):
    return result[0] if isinstance(result, tuple) else result


def try_dtypes(options):
    for dtype in DTYPES:
        inputs = random_inputs(batch=1, n_q=TOKENS, n_k=TOKENS, dtype=dtype)
        torch.manual_seed(0)
        out = first(gated_attention(*inputs, **options))
        if "dropout_p" in options or "density" in options:  # drawn, and chosen: their own tests compare them
            assert out.isfinite().all()
            continue
        reference = reference_options(options)
        close(out, formula_with_gradients([x.double() for x in inputs], out.double(), **reference)[0], dtype)


def try_gradients(options):
    inputs = random_inputs(batch=1, n_q=TOKENS, n_k=TOKENS)
    leaves = [x.requires_grad_() for x in inputs]
    learning = {name: x.clone() for name, x in options.items() if name in ("attn_mask", "output_gate")}
    learning = {name: x.requires_grad_() for name, x in learning.items() if x.is_floating_point()}
    result = gated_attention(*leaves, **options | learning)
    results = result if isinstance(result, tuple) else (result,)
    loss = sum(x.square().sum() for x in results if x.is_floating_point())
    for gradient in torch.autograd.grad(loss, [*leaves, *learning.values()]):
        assert gradient.isfinite().all()
        assert gradient.any()


def try_varlen(options):
    q, k, v, a, b = (x[0].transpose(0, 1) for x in random_inputs(batch=1, n_q=TOKENS, n_k=TOKENS))
    options = {name: x[0].transpose(0, 1) if name == "output_gate" else x for name, x in options.items()}
    out = first(gated_attention_varlen(q, k, v, a, b, torch.tensor([0, 5, TOKENS]), **options))
    assert out.isfinite().all()


def try_paged(options):
    q, k, v, a, b = random_inputs(batch=1, n_q=TOKENS, n_k=TOKENS)
    caches = (x[0].transpose(0, 1).unflatten(0, (3, 4)) for x in (k, v, b))
    k_cache, v_cache, b_cache = caches
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    order = torch.tensor([1, 2, 0])  # where block i of the text lies
    k_cache, v_cache, b_cache = (x[order] for x in (k_cache, v_cache, b_cache))
    arguments = (q, k_cache, v_cache, a, b_cache, table, torch.tensor([TOKENS]))
    found = first(gated_attention_paged(*arguments, **options))
    close(found, first(gated_attention(q, k, v, a, b, **options)), torch.float32)


def try_modes(options):
    inputs = random_inputs(batch=1, n_q=TOKENS, n_k=TOKENS)
    for mode in ("post", "log"):
        assert first(gated_attention(*inputs, mode=mode, **options)).isfinite().all()


def try_compiled(options):
    inputs = random_inputs(batch=1, n_q=TOKENS, n_k=TOKENS)
    torch.compiler.reset()
    torch.manual_seed(0)
    found = first(torch.compile(gated_attention, fullgraph=True, backend="eager")(*inputs, **options))
    torch.manual_seed(0)
    close(found, first(gated_attention(*inputs, **options)), torch.float32)


def try_vmap(options):
    q, *rest = random_inputs(batch=1, n_q=TOKENS, n_k=TOKENS)
    run = torch.func.vmap(lambda q: first(gated_attention(q, *rest, **options)), randomness="same")
    close(run(torch.stack((q, -q)))[1], first(gated_attention(-q, *rest, **options)), torch.float32)


TRIALS = dict(
    zip(
        COLUMNS,
        (try_dtypes, try_gradients, try_varlen, try_paged, try_modes, try_compiled, try_vmap),
        strict=True,
    )
)


def works(trial, options) -> bool:
    """False where the feature is refused; whatever else goes wrong is raised."""
    try:
        trial(options)
    except REFUSALS:
        return False
    return True


def table() -> str:
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for name, options in FEATURES.items():
        cells = ("yes" if works(trial, options) else "–" for trial in TRIALS.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def arguments_of_features() -> set[str]:
    return {name for options in FEATURES.values() for name in options}


def arguments_of_operator() -> set[str]:
    return {name for name, x in inspect.signature(gated_attention).parameters.items() if x.kind is x.KEYWORD_ONLY} - {
        "mode",
        "scale",
    }


if __name__ == "__main__":
    print(table())

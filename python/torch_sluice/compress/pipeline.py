"""``torch_sluice.compress``: prune, quantise, measure; never below the share of the metric that was asked for."""

import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from torch_sluice.compress.blocks import Metric
from torch_sluice.compress.measure import METRICS
from torch_sluice.compress.outputs import Agreement
from torch_sluice.compress.progress import Progress
from torch_sluice.compress.quantized import check_options
from torch_sluice.compress.run import Run, Settings
from torch_sluice.quantize import DEFAULT_TARGET_SQNR

POLICIES = ("sensitivity", "quantile")
_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")


def compress(
    model: nn.Module,
    example_inputs: Any,
    data: Iterable[tuple[Any, Any]],
    keep: float = 0.97,
    *,
    metric: Metric | Agreement | str | None = None,
    policy: str = "sensitivity",
    budget: float | None = None,
    prune: bool = True,
    quantize: bool = True,
    finetune: Callable[[nn.Module, int], None] | None = None,
    finetune_steps: int = 100,
    round_to: int = 16,
    compensate: bool = True,
    quantize_policy: str = "sqnr",
    target_sqnr: float | None = None,
    weight_bits: int = 8,
    group_size: int = 0,
    threads: int | None = None,
    progress: bool = True,
) -> nn.Module:
    """A smaller and faster copy of a model that keeps at least ``keep`` of its metric, measured on ``data``.

    ::

        small = torch_sluice.compress(model, x, loader, keep=0.97, metric=accuracy)
        print(small.compression_report)
        torch_sluice.compress.save(small, "small.pt")

    Channels and heads are pruned where that wins most time for the metric it costs, then the layers that are faster in
    integers are quantised. docs/infer.md says what each rule promises. ``model`` itself is never changed, whatever
    happens; where nothing can be had within ``keep``, the result is a copy of it, and its report says so.

    Args:
        model: on the CPU. It is compressed for inference, as ``model.eval()`` behaves.
        example_inputs: the inputs of one call, of the size whose latency counts: a tensor, a tuple of positional
            inputs, or a dict of keyword inputs.
        data: batches (inputs, target), inputs as above, of independent samples. They are read once and kept, so that
            all candidates meet the same. With few samples little can be known, and so little is done.
        keep: share of the metric to keep, in (0, 1]: what is known with 95 % confidence to be kept on other data like
            this (docs/infer.md, "What is promised").
        metric: ``metric(model, batches) -> float`` over a list of batches, higher is better, above 0 for the model. It
            is called on parts of ``data``, too, to see how well it is known. None: closeness to the model's own
            outputs, 1 - (squared error / variance). "agreement" or ``Agreement(dim)``: the share of a classifier's
            answers that stay the same. For neither of these two is target read.
        policy: "sensitivity" measures what each group of channels costs at several sizes; "quantile" is one global
            quantile of L1 norms.
        budget: latency in seconds of one call at which pruning may stop; None: prune as far as ``keep`` allows.
        prune, quantize: which of the two to do.
        finetune: ``finetune(model, step)``, one step of the user's training on a pruned model that is in training mode,
            called for step = 0 .. finetune_steps - 1 after each round of pruning; at step 0 the parameters are new, and
            an optimizer has to be made.
        finetune_steps: steps in a round, at least 1.
        round_to: channel counts become multiples of this where a layer has four times as many, of 8, 4, .. else.
        compensate: fold what pruned channels would have brought, as far as others tell it, into the layers that read
            them (compensation.py).
        target_sqnr: signal-to-noise ratio in dB by which activations take their widths. None: 30, or 24 for all layers
            where the model is faster for it and the metric is kept, or 42 for single ones where the metric needs it.
        quantize_policy, weight_bits, group_size: of the quantised layers, see ``quantize_layer``.
        threads: that torch uses while measuring; None: as it is set.
        progress: a bar on standard error once two seconds have passed.

    Returns:
        An ordinary ``nn.Module`` in eval mode with a ``compression_report``. Unless layers were quantised it can be
        trained further.

    Raises:
        TypeError, ValueError: an argument is not allowed, the example does not match, data yields nothing, or the model
            or the metric fails on it before anything is changed; the message says what to do. What fails later, in a
            candidate, is left out, and the report says so.
    """
    model = _check_model(model)
    keep, budget = _check_share(keep), _check_seconds(budget)
    metric = _check_metric(metric)
    _check(policy, finetune, finetune_steps, round_to, prune, quantize, threads)
    may_relax = target_sqnr is None
    target_sqnr = DEFAULT_TARGET_SQNR if may_relax else target_sqnr
    check_options(quantize_policy, weight_bits, group_size, target_sqnr)
    options = {
        "policy": quantize_policy, "target_sqnr": float(target_sqnr), "weight_bits": int(weight_bits),
        "group_size": int(group_size),
    }  # fmt: skip
    settings = Settings(
        keep, policy, budget, prune, quantize, finetune, int(finetune_steps), int(round_to), compensate, options,
        may_relax,
    )  # fmt: skip
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(int(threads))
    try:
        with Progress(progress) as bar:
            return Run(model, example_inputs, data, metric, settings, bar).finish()
    finally:
        torch.set_num_threads(before)


def _check_model(model: Any) -> nn.Module:
    """The model, without the wrapper of torch.compile."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    model = getattr(model, "_orig_mod", model)
    kind = None
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            kind = "a ScriptModule"
        elif isinstance(module, torch.fx.GraphModule) and _calls_operators(module):
            kind = "a graph that torch.export made"
        elif type(module).__module__.startswith(_QUANTISED):
            kind = f"quantised by torch.ao ({name or type(model).__name__})"
            break
        if kind is not None:
            kind = kind if not name else f"a {type(model).__name__} of which {name} is {kind}"
            break
    if kind is not None:
        raise TypeError(f"model is {kind}, expected the eager torch.nn.Module in floating point that it was made from")
    return model


def _calls_operators(graph: torch.fx.GraphModule) -> bool:
    """Whether a graph calls operators on weights, and not layers: then no layer is left to be seen."""
    layers = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)
    return any(isinstance(node.target, torch._ops.OpOverload) for node in graph.graph.nodes) and not any(
        isinstance(module, layers) for module in graph.modules()
    )


def _check_share(keep: Any) -> float:
    if isinstance(keep, bool) or not isinstance(keep, numbers.Real) or not 0 < keep <= 1:
        raise ValueError(f"keep is {keep!r}, expected a share in (0, 1]: 0.97 keeps 97 % of the metric")
    return float(keep)


def _check_seconds(budget: Any) -> float | None:
    if budget is None:
        return None
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
        raise TypeError(f"budget is {budget!r}, expected seconds as a number (0.001 is a millisecond), or None")
    if not 0 < budget < math.inf:
        raise ValueError(f"budget is {budget!r}, expected seconds above 0, or None")
    return float(budget)


def _check_metric(metric: Any) -> Any:
    if isinstance(metric, str):
        if metric not in METRICS:
            raise ValueError(
                f"metric is {metric!r}, expected a function (model, batches), None, or one of "
                f"{', '.join(map(repr, METRICS))}"
            )
        return None if metric == "fidelity" else METRICS[metric]()
    if metric is not None and not isinstance(metric, Agreement) and not callable(metric):
        raise TypeError(f"metric is a {type(metric).__name__}, expected a function (model, batches), a name, or None")
    return metric


def _check(policy, finetune, finetune_steps, round_to, prune, quantize, threads) -> None:
    if policy not in POLICIES:
        raise ValueError(f"policy is {policy!r}, expected one of {', '.join(map(repr, POLICIES))}")
    if finetune is not None and not callable(finetune):
        raise TypeError(f"finetune is a {type(finetune).__name__}, expected a function (model, step)")
    for name, value in (("finetune_steps", finetune_steps), ("round_to", round_to), ("threads", threads)):
        if name == "threads" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"{name} is {value!r}, expected an integer of at least 1")
    if not prune and not quantize:
        raise ValueError("prune and quantize are both False, expected at least one of them")

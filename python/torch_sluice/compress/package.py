"""A model compiled ahead by AOTInductor, in a package that knows which inputs it takes.

A bare package computes with the strides of the example: an input of the right shape in another memory layout gives
wrong numbers without an error. This one says what was exported, and its inputs are checked against it.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_flatten, tree_unflatten

_KEY = "sluice_inputs"


def save_package(
    model: nn.Module, example_inputs: Any, path: str | os.PathLike, dynamic_shapes: Any = None
) -> None:  # fmt: skip
    """Exports a model, compiles it ahead and writes the package. A C++ compiler is needed here, none to run it.

    Args:
        model: as ``compress`` returned it, or any other that ``torch.export`` takes; it is packaged in eval mode.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs, of the shapes, dtypes and
            memory layouts that the package shall take; what is not dense is made contiguous.
        path: the file, whose name ends in ".pt2".
        dynamic_shapes: for ``torch.export.export``: which dimensions may be of other sizes.

    Raises:
        ValueError: the path does not end in ".pt2", or an input is neither a tensor nor a plain value.
    """
    if not str(path).endswith(".pt2"):
        raise ValueError(f"path is {str(path)!r}, expected a name that ends in .pt2")
    args, kwargs = _arguments(example_inputs)
    leaves, structure = tree_flatten((args, kwargs))
    args, kwargs = tree_unflatten([_dense(leaf) for leaf in leaves], structure)
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            program = torch.export.export(model.eval(), args, kwargs, dynamic_shapes=dynamic_shapes)
            metadata = {_KEY: json.dumps({"keywords": list(kwargs), "inputs": _describe(program, args, kwargs)})}
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs={"aot_inductor.metadata": metadata}
            )
    finally:
        for module, mode in modes:
            module.training = mode


def _arguments(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def _order(tensor: Tensor) -> list[int]:
    """Its dimensions from the outermost in memory to the innermost."""
    dimensions = range(tensor.dim())
    return list(dimensions) if tensor.is_contiguous() else sorted(dimensions, key=lambda d: -tensor.stride(d))


def _dense_strides(sizes: tuple[int, ...], order: list[int]) -> list[int]:
    strides, step = [0] * len(sizes), 1
    for dimension in reversed(order):
        strides[dimension] = step
        step *= max(sizes[dimension], 1)
    return strides


def _has_layout(tensor: Tensor, order: list[int]) -> bool:
    rows = zip(tensor.shape, tensor.stride(), _dense_strides(tuple(tensor.shape), order), strict=True)
    return all(size == 1 or stride == wanted for size, stride, wanted in rows)


def _dense(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf if _has_layout(leaf, _order(leaf)) else leaf.contiguous()


def _describe(program, args: tuple, kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each leaf of the inputs what the compiled code relies on."""
    fakes = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    names = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    described = []
    for name, leaf in zip(names, tree_flatten((args, kwargs))[0], strict=True):
        if not isinstance(leaf, Tensor):
            if leaf is not None and not isinstance(leaf, (bool, int, float, str)):
                raise ValueError(f"example_inputs holds a {type(leaf).__name__}, expected tensors and plain values")
            described.append({"name": name, "value": leaf})
            continue
        sizes = []
        for size in fakes[name].shape:
            if isinstance(size, int):
                sizes.append([size, size])
                continue
            bounds = program.range_constraints.get(size.node.expr)
            high = None if bounds is None or not bounds.upper.is_Integer else int(bounds.upper)
            sizes.append([0 if bounds is None else int(bounds.lower), high])
        described.append({"name": name, "dtype": str(leaf.dtype), "sizes": sizes, "order": _order(leaf)})
    return described


class Package:
    """A model that ``save_package`` wrote: called as the model was, with inputs as they were exported.

    Another shape or dtype raises ValueError; another memory layout is copied into the one that was exported.
    """

    def __init__(self, run, described: dict[str, Any]):
        self._run, self._keywords, self._inputs = run, described["keywords"], described["inputs"]

    def __call__(self, *args, **kwargs):
        if set(kwargs) != set(self._keywords):
            raise ValueError(f"keyword inputs are {sorted(kwargs)}, expected {sorted(self._keywords)}")
        leaves, structure = tree_flatten((args, {name: kwargs[name] for name in self._keywords}))
        if len(leaves) != len(self._inputs):
            names = ", ".join(spec["name"] for spec in self._inputs)
            raise ValueError(f"there are {len(leaves)} inputs, expected {len(self._inputs)}: {names}")
        args, kwargs = tree_unflatten([_checked(*pair) for pair in zip(self._inputs, leaves, strict=True)], structure)
        return self._run(*args, **kwargs)


def _checked(spec: dict[str, Any], leaf: Any) -> Any:
    name = spec["name"]
    if "value" in spec:
        if leaf != spec["value"]:
            raise ValueError(f"{name} is {leaf!r}, expected {spec['value']!r}, which it was when it was exported")
        return leaf
    if not isinstance(leaf, Tensor) or str(leaf.dtype) != spec["dtype"] or leaf.device.type != "cpu":
        found = f"{leaf.dtype} on {leaf.device}" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
        raise ValueError(f"{name} is {found}, expected a tensor of {spec['dtype']} on cpu")
    wanted = spec["sizes"]
    fits = leaf.dim() == len(wanted) and all(
        low <= size and (high is None or size <= high) for size, (low, high) in zip(leaf.shape, wanted, strict=True)
    )
    if not fits:
        text = ", ".join(str(low) if low == high else f"{low} to {high or 'any'}" for low, high in wanted)
        raise ValueError(f"{name} has shape {list(leaf.shape)}, expected [{text}]")
    if _has_layout(leaf, spec["order"]):
        return leaf
    sizes = tuple(leaf.shape)
    return torch.empty_strided(sizes, _dense_strides(sizes, spec["order"]), dtype=leaf.dtype).copy_(leaf)


def load_package(path: str | os.PathLike) -> Package:
    """A package of ``save_package``. It holds compiled code, which is run: load only what you trust.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a package of another's, which does not say what it takes.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is not a file, expected what save_package() wrote")
    run = torch._inductor.aoti_load_package(str(path))
    described = run.get_metadata().get(_KEY)
    if described is None:
        raise ValueError(
            f"{path} does not say which inputs it takes, expected what save_package() wrote; "
            "torch._inductor.aoti_load_package() loads others, with AOTI_RUNTIME_CHECK_INPUTS=1 to have them checked"
        )
    return Package(run, json.loads(described))

"""How a model uses its parameters: which functions read them, and the seconds that those take within a call."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from torch_sluice.compress import served, served_recurrent
from torch_sluice.compress.quantized import QuantizedWeight
from torch_sluice.quantize.operators import FLOATS

_TURNED = {"linear": "transposed", "transposed": "linear"}
_TURNING = (Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__, Tensor.transpose, torch.transpose, Tensor.permute)
# Functions that an integer kernel can serve: their kind, the place of the weight and its name.
_PRODUCTS: dict[Callable, tuple[str, int, str]] = {
    F.linear: ("linear", 1, "weight"),
    torch.conv2d: ("conv2d", 1, "weight"),
    F.embedding: ("rows", 1, "weight"),
    torch.addmm: ("transposed", 2, "mat2"),
    Tensor.addmm: ("transposed", 2, "mat2"),
    torch.matmul: ("transposed", 1, "other"),
    Tensor.matmul: ("transposed", 1, "other"),
    Tensor.__matmul__: ("transposed", 1, "other"),
    torch.mm: ("transposed", 1, "mat2"),
    Tensor.mm: ("transposed", 1, "mat2"),
}
# Questions about a tensor that read no value of it.
_METHODS = "size dim numel stride element_size is_floating_point is_contiguous is_complex data_ptr get_device __len__"
_PROPERTIES = (
    "dtype device shape ndim layout requires_grad is_cuda is_cpu is_mps is_meta is_quantized is_sparse is_nested grad "
    "itemsize nbytes is_leaf grad_fn is_mkldnn is_xla"
)
_QUESTIONS = {
    *(getattr(Tensor, name) for name in _METHODS.split()),
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES.split() if hasattr(Tensor, name)),
    torch.numel,
    torch.is_floating_point,
    torch.is_complex,
}


@dataclass
class Use:
    """What the calls of a model did with one parameter."""

    kinds: set[str] = field(default_factory=set)  # of served functions, see Options.kind
    others: set[str] = field(default_factory=set)  # names of other functions that read it, and other reasons
    groups: int = 1  # of a convolution
    seconds: float = 0.0  # that the served functions took, all calls together
    together: set[str] = field(default_factory=set)  # names of parameters that a kernel takes with it, or not at all


class Watch(TorchFunctionMode):
    """Within it, ``uses`` says by parameter name what functions did with the parameters of ``names``.

    Functions in Python of torch.nn.functional that call others are followed into; C++ that reads weights by itself, as
    a scripted module does, is not seen, and its parameters have no entry.
    """

    def __init__(self, names: dict[int, str]):
        super().__init__()
        self._names = names  # id of a parameter -> its name
        self._turned: dict[int, tuple[str, Tensor]] = {}  # id of a transposed view -> name, and what keeps its id
        self.uses: dict[str, Use] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return served.FUNCTIONS[func](*args, **kwargs)
        if func in _QUESTIONS:
            return func(*args, **kwargs)
        leaves = (*args, *kwargs.values())
        if any(isinstance(leaf, (list, tuple, dict)) for leaf in leaves):  # else nothing is inside another
            leaves = tree_leaves((args, kwargs))
        watched = [leaf for leaf in leaves if isinstance(leaf, Tensor) and self._name(leaf)]
        if not watched:
            return func(*args, **kwargs)
        if func in served_recurrent.SERVED and not kwargs:
            return self._call_recurrent(func, args, watched)
        if func in _PRODUCTS:
            return self._call_product(func, args, kwargs, watched)
        out = func(*args, **kwargs)
        tensor = watched[0]
        name, turned = self._name(tensor), id(tensor) in self._turned
        if out is tensor:
            return out  # .to() of the dtype that it has, .contiguous()
        if func in _TURNING and tensor.dim() == 2 and isinstance(out, Tensor) and out.shape == tensor.shape[::-1]:
            if turned:
                self._use(name).others.add("transpose of a transpose")
            else:
                self._turned[id(out)] = (name, out)
            return out
        for leaf in watched:
            self._use(self._name(leaf)).others.add(getattr(func, "__name__", str(func)))
        return out

    def _name(self, tensor: Tensor) -> str | None:
        name = self._names.get(id(tensor))
        return name or self._turned.get(id(tensor), (None,))[0]

    def _use(self, name: str) -> Use:
        return self.uses.setdefault(name, Use())

    def _call_product(self, func, args, kwargs, watched):
        kind, place, keyword = _PRODUCTS[func]
        weight = args[place] if len(args) > place else kwargs.get(keyword)
        begin = time.perf_counter()
        out = func(*args, **kwargs)
        seconds = time.perf_counter() - begin
        for tensor in watched:
            use = self._use(self._name(tensor))
            if tensor is not weight:
                use.others.add(f"{func.__name__}, not as its weight")
                continue
            turned = id(tensor) in self._turned
            use.kinds.add(_TURNED.get(kind, "a transposed view") if turned else kind)
            use.seconds += seconds
            self._look_closer(use, func, kind, args, kwargs)
        return out

    def _call_recurrent(self, func, args, watched):
        begin = time.perf_counter()
        out = func(*args)
        seconds = time.perf_counter() - begin
        matrices = [weight for weight in served_recurrent.flat_weights(func, args) if weight.dim() == 2]
        names = {self._name(matrix) or "another tensor" for matrix in matrices}
        for tensor in watched:
            use = self._use(self._name(tensor))
            if not any(tensor is matrix for matrix in matrices) or id(tensor) in self._turned:
                use.others.add(f"{func.__name__}, not as its weight")
                continue
            use.kinds.add("linear")
            use.seconds += seconds
            use.together |= names
            if args[0].dtype not in FLOATS or args[0].device.type != "cpu":
                use.others.add(f"an input of {args[0].dtype} on {args[0].device}")
        return out

    def _look_closer(self, use: Use, func, kind: str, args, kwargs) -> None:
        """What of the other arguments the kernels do not take."""
        if kind == "conv2d":
            groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
            if use.groups not in (1, groups):
                use.others.add("convolutions of several groups")
            use.groups = groups
        if kind == "rows":
            if (args[3] if len(args) > 3 else kwargs.get("max_norm")) is not None:
                use.others.add("renormalisation of its rows")
            return
        x = args[1] if func in (torch.addmm, Tensor.addmm) and len(args) > 1 else args[0] if args else None
        if isinstance(x, Tensor) and (x.dtype not in FLOATS or x.device.type != "cpu"):
            use.others.add(f"an input of {x.dtype} on {x.device}")


def watch_uses(model: nn.Module, run: Callable[[], Any], names: list[str]) -> dict[str, Use]:
    """What ``run()``, a call of the model, did with the parameters of these names."""
    ids = {id(model.get_parameter(name)): name for name in names}
    with Watch(ids) as watch:
        run()
    return watch.uses


def float_parameters(model: nn.Module) -> dict[str, list[str]]:
    """Names of the floating-point parameters of two dimensions and more that are not quantised yet: of each the name
    that ``named_parameters`` gives it, and all its names, several where it is tied."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        fits = parameter.dim() >= 2 and parameter.is_floating_point() and not isinstance(parameter, QuantizedWeight)
        if fits:
            found.setdefault(id(parameter), []).append(name)
    return {names[0]: names for names in found.values()}

"""Attention functions of a user's own, marked with what their arguments mean."""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, handle_torch_function

from torch_sluice.swap.code import functions_of, values_in

_LAYOUTS = ("bhnd", "bnhd", "bnd")
_KEY_LAYOUTS = (*_LAYOUTS, "bhdn", "bdn")
_OUTPUTS = (*_LAYOUTS, "bnc")
MASK_MEANINGS = ("added", "seen", "hidden", "sdpa")


class Answers(TorchFunctionMode):
    """A mode that is asked in place of marked functions, as of those of torch."""


class Call(NamedTuple):
    """One call of a marked function, as the formula has it; tensors are [B, H, N, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None
    causal: bool
    scale: float | None
    softcap: float | None
    dropout: float
    unknown: str | None  # an argument that was given and of which nothing is said


class Marked(NamedTuple):
    """A function and what its arguments mean. A path is the name of an argument, or of one and attributes of it."""

    function: Callable
    names: tuple[str, ...]  # of the arguments that may be given by place
    defaults: dict[str, Any]
    required: tuple[str, ...]
    query: str
    key: str
    value: str
    module: str | None
    mask: str | None
    mask_means: str | None
    mask_is_causal: bool
    bias: str | None
    causal: bool | str
    scale: float | str | None
    softcap: float | str | None
    dropout: float | str
    layout: str
    key_layout: str
    output: str

    @property
    def title(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}"

    def said(self) -> set[str]:
        """The arguments of which something is said."""
        paths = (self.causal, self.scale, self.softcap, self.dropout)
        roots = {path.partition(".")[0] for path in paths if isinstance(path, str)}
        return roots | {self.query, self.key, self.value, self.mask, self.bias, self.module}

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> Call:
        values = {**self.defaults, **dict(zip(self.names, args, strict=False)), **kwargs}
        said = self.said()
        unknown = None
        for name, value in values.items():
            if name not in said and not _is_default(value, self.defaults.get(name)):
                unknown = name
        return Call(
            from_layout(values[self.query], self.layout),
            from_layout(values[self.key], self.key_layout),
            from_layout(values[self.value], self.layout),
            None if self.mask is None else values[self.mask],
            None if self.bias is None else values[self.bias],
            bool(_follow(self.causal, values)),
            _follow(self.scale, values),
            _follow(self.softcap, values),
            _probability(self.dropout, values),
            unknown,
        )


def _is_default(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, (bool, int, float, str)) and value == default)


def _follow(path: Any, values: dict[str, Any]) -> Any:
    """What a path leads to."""
    if not isinstance(path, str):
        return path
    name, *attributes = path.split(".")
    return functools.reduce(getattr, attributes, values[name])


def _probability(path: float | str, values: dict[str, Any]) -> float:
    """A dropout probability: nn.Dropout has one while it trains, and so has a module that has a number."""
    found = _follow(path, values)
    if isinstance(found, nn.Dropout):
        return found.p if found.training else 0.0
    if isinstance(path, str) and "." in path:
        holder = _follow(path.rpartition(".")[0], values)
        if isinstance(holder, nn.Module) and not holder.training:
            return 0.0
    return found or 0.0


def from_layout(x: Tensor, layout: str) -> Tensor:
    """x as [B, H, N, D]; it is left alone if it has another number of dimensions."""
    if x.dim() != len(layout):
        return x
    if layout in ("bnd", "bdn"):
        x = x.unsqueeze(1)
    if layout == "bnhd":
        return x.transpose(1, 2)
    return x.mT if layout in ("bhdn", "bdn") else x


def to_layout(x: Tensor, layout: str) -> Tensor:
    """x [B, H, N, D] in a layout of arguments, or of results ("bnc": heads side by side)."""
    if layout in ("bnhd", "bnc"):
        x = x.transpose(1, 2)
        return x.flatten(-2) if layout == "bnc" else x.contiguous()
    x = x.mT if layout in ("bhdn", "bdn") else x
    return x.squeeze(1) if layout in ("bnd", "bdn") else x


def _check(function: Callable, options: dict[str, Any]) -> inspect.Signature:
    if not inspect.isfunction(inspect.unwrap(function)):
        raise ValueError(f"the marked object is a {type(function).__name__}, expected a plain function or a method")
    title = f"{function.__module__}.{function.__qualname__}"
    signature = inspect.signature(function)
    parameters = signature.parameters
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        raise ValueError(f"{title} takes *arguments, expected arguments with names")
    for name in ("query", "key", "value", "mask", "bias", "module"):
        given = options[name]
        if given not in parameters and not (given is None and name in ("mask", "bias", "module")):
            raise ValueError(
                f"{name} is {given!r}, expected the name of an argument of {title}: {', '.join(parameters)}"
            )
    for name, kinds in (
        ("causal", bool), ("scale", (int, float, type(None))), ("softcap", (int, float, type(None))),
        ("dropout", (int, float)),
    ):  # fmt: skip
        given = options[name]
        if isinstance(given, str) and given.partition(".")[0] in parameters:
            continue
        if isinstance(given, str) or not isinstance(given, kinds):
            what = {"causal": "True, False", "dropout": "a number"}.get(name, "a number, None")
            raise ValueError(
                f"{name} is {given!r}, expected {what}, or a path that begins with an argument of {title}: "
                f"{', '.join(parameters)}"
            )
    for name, known in (("layout", _LAYOUTS), ("key_layout", _KEY_LAYOUTS), ("output", _OUTPUTS)):
        if options[name] not in known:
            raise ValueError(f"{name} is {options[name]!r}, expected one of {', '.join(map(repr, known))}")
    if (options["mask"] is None) != (options["mask_means"] is None) or options["mask_means"] not in (
        None,
        *MASK_MEANINGS,
    ):
        raise ValueError(
            f"mask is {options['mask']!r} and mask_means is {options['mask_means']!r}, expected neither, or both: an "
            f"argument of {title}, and one of {', '.join(map(repr, MASK_MEANINGS))}"
        )
    if options["mask_is_causal"] and options["mask"] is None:
        raise ValueError("mask_is_causal is True and mask is None, expected a mask that hides later keys")
    return signature


def attention_function(
    *,
    query: str,
    key: str,
    value: str,
    scale: float | str | None,
    causal: bool | str,
    mask: str | None = None,
    mask_means: str | None = None,
    mask_is_causal: bool = False,
    bias: str | None = None,
    softcap: float | str | None = None,
    dropout: float | str = 0.0,
    layout: str = "bhnd",
    key_layout: str | None = None,
    output: str | None = None,
    module: str | None = None,
) -> Callable[[Callable], Callable]:
    """Marks a function or method as attention, so that ``swap_attention`` finds the layers that use it::

        @torch_sluice.attention_function(query="q", key="k", value="v", scale=None, causal=True)
        def attend(q, k, v):
            n = q.shape[2]
            scores = (q @ k.mT / q.shape[3] ** 0.5).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
            return scores.softmax(-1) @ v

    The function stays what it is. In a swapped layer the operator takes its place where it computes the same. Nothing
    is guessed and nothing believed: what is said of it is tried at the swap, on small random tensors, for each layer.
    A model of others is marked in one line, ``Layer._attn = attention_function(...)(Layer._attn)``.

    Where a number or a flag is asked for, a string is a path: the name of an argument, or attributes of one, as
    ``"self.softmax_scale"``. It is read at each call.

    Args:
        query, key, value: names of the arguments that hold q, k and v.
        scale: of the scores: a number, a path, None: 1 / sqrt(head_dim).
        causal: whether the function itself hides later keys: True, False, a path.
        mask: name of the argument that holds the mask, which broadcasts to [batch, heads, n_q, n_k]; None: it has none.
        mask_means: "added", numbers that are added to the scores; "seen", booleans, True where a pair may be looked at;
            "hidden", booleans, True where not; "sdpa", as of ``scaled_dot_product_attention``: "added" or "seen".
        mask_is_causal: the masks that a model hands over hide later keys, so that the layer is a decoder's.
        bias: name of an argument of numbers that are added to the scores beside a mask (positions, ALiBi).
        softcap: scores are bent to softcap * tanh(scores / softcap); a number, a path, None.
        dropout: of the weights: a number, a path; of an ``nn.Dropout`` its p while it trains.
        layout: of q, k and v: "bhnd" is [batch, heads, tokens, head_dim], "bnhd" [batch, tokens, heads, head_dim],
            "bnd" [batch, tokens, head_dim], of one head.
        key_layout: of k, if it is another; also "bhdn" and "bdn", transposed.
        output: of the result, if it is another; also "bnc", heads side by side. The result may be a tuple or list, of
            the output and maybe the weights.
        module: name of the argument that holds the layer; default ``self`` of a method.

    Returns:
        a decorator.

    Raises:
        ValueError: there is no such argument, an option is of another kind, or an argument without default is not said
            to be anything.
    """
    given = dict(
        query=query, key=key, value=value, mask=mask, mask_means=mask_means, mask_is_causal=mask_is_causal, bias=bias,
        causal=causal, scale=scale, softcap=softcap, dropout=dropout, layout=layout,
        key_layout=key_layout or layout, output=output or layout, module=module,
    )  # fmt: skip

    def mark(function: Callable) -> Callable:
        parameters = _check(function, given).parameters
        is_method = module is None and next(iter(parameters), None) == "self"
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        one = {name: p for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
        marked = Marked(
            function,
            tuple(name for name, p in one.items() if p.kind in kinds),
            {name: p.default for name, p in one.items() if p.default is not p.empty},
            tuple(name for name, p in one.items() if p.default is p.empty),
            **(given | dict(module="self") if is_method else given),
        )
        left = [name for name in marked.required if name not in marked.said()]
        if left:
            raise ValueError(
                f"{left[0]} of {marked.title} has no default, expected it to be said what it is, or a default with "
                "which the function is plain attention"
            )

        @functools.wraps(function)
        def attend(*args, **kwargs):
            if any(isinstance(mode, Answers) for mode in _get_current_function_mode_stack()):
                return handle_torch_function(attend, (), *args, **kwargs)
            return function(*args, **kwargs)

        attend.sluice_marked = marked
        return attend

    return mark


def marked_of(value: Any) -> Marked | None:
    """What is said of a function, if it is marked."""
    function = getattr(value, "__func__", value)
    marked = vars(function).get("sluice_marked") if inspect.isfunction(function) else None
    return marked if isinstance(marked, Marked) else None


def _own(module: nn.Module) -> Iterator[Callable]:
    """Marked functions that a module holds, or that its class has or names."""
    cls = type(module)
    members = [member for base in cls.__mro__ if base is not nn.Module for member in vars(base).values()]
    for value in (*members, *vars(module).values()):
        if marked_of(value) is not None:
            yield getattr(value, "__func__", value)
    for function in functions_of(cls):
        yield from (value for value in values_in(function) if marked_of(value) is not None)


def marked_functions(module: nn.Module, *, within: bool = False) -> dict[Callable, nn.Module]:
    """{marked function: the module that has it, whose class names or holds it}; of the module itself, else, if
    ``within``, of those in it."""
    found = dict.fromkeys(_own(module), module)
    if not found and within:
        for inner in module.modules():
            for function in _own(inner):
                found.setdefault(function, inner)
    return found


def is_forward(module: nn.Module) -> bool:
    """Whether the module's forward is itself a marked function: q, k and v are all that it sees."""
    return marked_of(type(module).forward) is not None

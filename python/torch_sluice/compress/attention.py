"""Attention layers as pruning sees them: which projections make the heads, and how the dependency graph passes them.

Heads never reach outside of their layer, so they make a group of their own; and the graph, which follows channels
from layer to layer, sees each attention layer as one opaque node that reads and writes the model's width.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torch_sluice.attention import Gate
from torch_sluice.compress.slicing import Member
from torch_sluice.modules import GatedAttention

# Names of the projections to queries, keys and values, and then of the one that joins the heads, in the libraries'
# models; "output.dense" hangs on the parent, as BERT's does.
_PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"))
_FUSED = ("qkv", "to_qkv", "in_proj", "qkv_proj")
_JOINS = ("o_proj", "out_proj", "out_lin", "o", "proj", "to_out", "c_proj")
_HEAD_DIMS = ("head_dim", "attention_head_size", "key_value_proj_dim", "dim_head", "d_head")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads", "num_attn_heads")
_COUNTS = {  # attribute of the layer -> what it counts
    **dict.fromkeys(_HEADS, "heads"),
    **dict.fromkeys(("kv_heads", "num_key_value_heads"), "kv_heads"),
    **dict.fromkeys(("all_head_size", "inner_dim"), "rows"),
}


@dataclass
class AttentionLayer:
    """One attention layer of a model; paths are names of ``model.named_modules()``."""

    path: str
    query: str
    key: str
    value: str  # the same as query and key where one projection gives all three
    join: str | None  # None: the heads themselves are the layer's output
    join_inside: bool  # whether the joining projection is a submodule of the layer
    heads: int
    kv_heads: int
    head_dim: int
    gate: str | None = None
    has_dim: bool = False  # an attribute `dim` holds its width
    counts: list[tuple[str, str, str]] = field(default_factory=list)  # (path, attribute, what it counts)

    @property
    def fused(self) -> bool:
        return self.query == self.key

    def projections(self) -> list[str]:
        return [self.query] if self.fused else [self.query, self.key, self.value]

    def head_members(self) -> list[Member]:
        """What is cut with unit u: key head number u and the query heads that share it."""
        d, share, units = self.head_dim, self.heads // self.kv_heads, range(self.kv_heads)
        heads = [tuple(range(u * share, (u + 1) * share)) for u in units]
        rows = [tuple(range(u * share * d, (u + 1) * share * d)) for u in units]
        keys = [tuple(range(u * d, (u + 1) * d)) for u in units]
        if self.fused:
            start, width = self.heads * d, self.kv_heads * d
            fused = [
                (*of_query, *(start + i for i in of_key), *(start + width + i for i in of_key))
                for of_query, of_key in zip(rows, keys, strict=True)
            ]
            members = [Member(self.query, "out", tuple(fused))]
        else:
            members = [Member(self.query, "out", tuple(rows))]
            members += [Member(path, "out", tuple(keys)) for path in (self.key, self.value)]
        if self.join is not None:
            members.append(Member(self.join, "in", tuple(rows)))
        if self.gate is not None:
            members.append(Member(self.gate, "queries", tuple(heads)))
            members.append(Member(self.gate, "keys", tuple((u,) for u in units)))
        counted = {"heads": heads, "rows": rows, "kv_heads": [(u,) for u in units]}
        members += [Member(path, f"count {name}", tuple(counted[what])) for path, name, what in self.counts]
        return members

    def width_members(self, side: str, indices: tuple[tuple[int, ...], ...]) -> list[Member] | None:
        """What is cut when the layer's input ("in") or output loses channels; None if it cannot be."""
        if side == "out":
            return [Member(self.join, "out", indices)] if self.join is not None and self.join_inside else None
        members = [Member(path, "in", indices) for path in self.projections()]
        if self.gate is not None:
            members.append(Member(self.gate, "in", indices))
        if self.has_dim:
            members.append(Member(self.path, "count dim", indices))
        return members


def find_attention(model: nn.Module) -> tuple[list[AttentionLayer], list[str]]:
    """The attention layers whose heads can be pruned, and sentences about those whose heads cannot."""
    modules = dict(model.named_modules())
    found, notes = [], []
    for path, module in modules.items():
        if isinstance(module, nn.MultiheadAttention):
            notes.append(f"{path}: its heads stay, because nn.MultiheadAttention ties them to its width")
            continue
        try:
            layer = _describe(path, module, modules)
        except ValueError as reason:
            notes.append(f"{path}: its heads stay, because {reason}")
            continue
        if layer is not None:
            found.append(layer)
    return found, notes


def _describe(path: str, module: nn.Module, modules: dict[str, nn.Module]) -> AttentionLayer | None:
    inside = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    names = next((names for names in _PROJECTIONS if all(name in inside for name in names)), None)
    fused = None if names else next((name for name in _FUSED if name in inside), None)
    if names is None and fused is None:
        return None
    prefix = f"{path}." if path else ""
    join = next((prefix + name for name in _JOINS if name in inside), None)
    join_inside = join is not None
    parent = path.rpartition(".")[0]
    if join is None and isinstance(modules.get(f"{parent}.output.dense" if parent else "output.dense"), nn.Linear):
        join = f"{parent}.output.dense" if parent else "output.dense"
    gate = next((prefix + n for n, child in module.named_children() if isinstance(child, Gate)), None)
    if fused:
        heads, kv_heads, head_dim = _fused_sizes(module, inside[fused])
        query = key = value = prefix + fused
    else:
        query, key, value = (prefix + name for name in names)
        heads, kv_heads, head_dim = _sizes(module, *(inside[name].out_features for name in names))
    if join is None and not isinstance(module, GatedAttention):
        raise ValueError("the projection behind its heads is not known")
    if join is not None and modules[join].in_features != heads * head_dim:
        raise ValueError(
            f"{join} reads {modules[join].in_features} channels, expected {heads} heads of {head_dim} channels"
        )
    counts = [(path, name, what) for name, what in _COUNTS.items() if isinstance(_own(module, name), int)]
    if gate is not None:
        counts += [(gate, "heads", "heads"), (gate, "kv_heads", "kv_heads")]
    has_dim = isinstance(module, GatedAttention)
    return AttentionLayer(path, query, key, value, join, join_inside, heads, kv_heads, head_dim, gate, has_dim, counts)


def _own(module: nn.Module, name: str):
    return module.__dict__.get(name)


def _sizes(module: nn.Module, query: int, key: int, value: int) -> tuple[int, int, int]:
    head_dim = next((_own(module, n) for n in _HEAD_DIMS if isinstance(_own(module, n), int)), None)
    if head_dim is None:
        heads = next((_own(module, n) for n in _HEADS if isinstance(_own(module, n), int)), None)
        if heads is None or query % heads:
            raise ValueError("it does not tell how many heads it has")
        head_dim = query // heads
    if query % head_dim or key % head_dim or key != value or (query // head_dim) % (key // head_dim):
        raise ValueError(f"its projections of {query}, {key} and {value} channels are no heads of {head_dim} channels")
    return query // head_dim, key // head_dim, head_dim


def _fused_sizes(module: nn.Module, projection: nn.Linear) -> tuple[int, int, int]:
    if isinstance(module, GatedAttention):
        return module.heads, module.kv_heads, module.dim // module.heads
    heads = next((_own(module, n) for n in _HEADS if isinstance(_own(module, n), int)), None)
    if heads is None or projection.out_features % (3 * heads):
        raise ValueError("it does not tell how many heads it has")
    return heads, heads, projection.out_features // (3 * heads)


class _Opaque(torch.autograd.Function):
    """The output of an attention layer as if it came from its inputs in one step."""

    @staticmethod
    def forward(ctx, output: Tensor, *inputs: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("only for tracing")


def _hide_inside(module: nn.Module, args, kwargs, output):
    inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
    if isinstance(output, Tensor):
        return _Opaque.apply(output.detach(), *inputs)
    return (_Opaque.apply(output[0].detach(), *inputs), *output[1:])


def make_opaque(model: nn.Module, layers: list[AttentionLayer]) -> Iterator[type]:
    """Lets a model that is only traced pass its attention layers in one step. Yields the classes of these layers."""
    opaque = [model.get_submodule(layer.path) for layer in layers]
    opaque += [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    for module in opaque:
        module.register_forward_hook(_hide_inside, with_kwargs=True)
        yield type(module)

"""Which integers of a model's modules count what a group's units are made of, and so fall when units leave.

Attributes have no meaning that could be looked up: ``num_heads`` may be read by forward(), or be a leftover. So these
are guesses, in the order in which they are tried; verify.py tells which one is right.
"""

from torch import nn

from torch_sluice.compress.graph import ChannelGroup
from torch_sluice.compress.module_sizes import sizes_of
from torch_sluice.compress.slicing import SizeMember

# Names that libraries use for counts of heads and for widths.
_KNOWN = frozenset(
    (
        *("num_heads", "num_attention_heads", "n_heads", "heads", "num_attn_heads", "n_head", "nhead", "kv_heads"),
        *("num_key_value_heads", "num_kv_heads", "n_kv_heads", "all_head_size", "inner_dim", "split_size"),
        *("embed_dim", "dim", "d_model", "hidden_size", "hidden_dim", "hidden_dims", "in_proj_dim", "num_channels"),
    )
)
_WIDTHS = ("hidden_size", "embed_dim", "dim", "d_model")
_LEVELS = 3  # of modules above a parameter that are looked at
_MOST_SINGLE = 6


def ways_to_count(model: nn.Module, group: ChannelGroup) -> list[list[SizeMember]]:
    """Sets of attributes that may count this group's units, the likelier first, without repetitions."""
    found = _matching(model, group)
    known = [member for member in found if member.attribute in _KNOWN]
    ways = [[], known, found]
    if group.kind == "heads":  # counts of heads are kept right also where this forward() doesn't read them
        ways.insert(0, [member for member in known if member.attribute not in _WIDTHS])
    distinct = {(m.attribute, m.place) for m in found}
    for one in sorted(distinct, key=str)[:_MOST_SINGLE]:
        ways.append([m for m in found if (m.attribute, m.place) == one])
        ways.append([m for m in found if (m.attribute, m.place) != one])
    unique: list[list[SizeMember]] = []
    for way in ways:
        if way not in unique:
            unique.append(way)
    return unique


def _matching(model: nn.Module, group: ChannelGroup) -> list[SizeMember]:
    """All attributes that hold one of the group's counts, of modules that have its parameters below them, and of norms
    without parameters beside those."""
    modules = dict(model.named_modules())
    paths: dict[str, None] = {}
    for member in group.members:
        path = member.path
        for _ in range(_LEVELS):
            paths.setdefault(path)
            if not path:
                break
            path = path.rpartition(".")[0]
    near = tuple(f"{path}." if path else "" for path in paths)
    for path, module in modules.items():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.weight is None and path.startswith(near):
            paths.setdefault(path)
    found = []
    for path in paths:
        module = modules.get(path)
        if module is None or "parametrizations" in path:
            continue
        own = set(sizes_of_safely(module))
        for attribute, value in module.__dict__.items():
            if attribute.startswith("_") or attribute in own:
                continue
            found += _members(path, attribute, value, group)
    return found


def _members(path: str, attribute: str, value, group: ChannelGroup) -> list[SizeMember]:
    if isinstance(value, int) and not isinstance(value, bool) and value in group.counts:
        return [SizeMember(path, attribute, None, value // group.width)]
    if isinstance(value, (tuple, list)) and len(value) <= 8:
        return [
            SizeMember(path, attribute, place, part // group.width)
            for place, part in enumerate(value)
            if isinstance(part, int) and not isinstance(part, bool) and part in group.counts
        ]
    return []


def sizes_of_safely(module: nn.Module) -> dict:
    """sizes_of(), nothing for what cannot be cut."""
    try:
        return sizes_of(module)
    except (ValueError, AttributeError, TypeError):
        return {}

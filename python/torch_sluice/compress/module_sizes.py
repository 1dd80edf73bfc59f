"""The sizes that torch's layers, and transformers' Conv1D, keep of their own parameters."""

from typing import Any

from torch import nn

from torch_sluice.compress.multihead import SlicedMultiheadAttention, head_sizes

_GATES = {"LSTM": 4, "GRU": 3}


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.out_channels > 1


def sizes_of(module: nn.Module) -> dict[str, Any]:
    """Attributes of a layer as its parameters have them now; "__class__" where another class has to run it. Empty for
    a layer that is not known."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return {"out_features": weight.shape[0], "in_features": weight.shape[1]}
    if isinstance(module, nn.Bilinear):
        names = ("out_features", "in1_features", "in2_features")
        return dict(zip(names, weight.shape, strict=True))
    if isinstance(module, nn.modules.conv._ConvNd):
        return _of_convolution(module)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return {"num_embeddings": weight.shape[0], "embedding_dim": weight.shape[1]}
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
        tensor = weight if weight is not None else module.running_mean
        return {} if tensor is None else {"num_features": len(tensor)}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return {} if weight is None else {"normalized_shape": tuple(weight.shape)}
    if isinstance(module, nn.GroupNorm):
        return {} if weight is None else {"num_channels": len(weight)}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": len(weight)}
    if isinstance(module, nn.RNNBase):
        gates = _GATES.get(module.mode, 1)
        sizes = {
            "input_size": module.weight_ih_l0.shape[1],
            "hidden_size": module.weight_hh_l0.shape[0] // gates,
        }
        return {**sizes, "proj_size": module.weight_hh_l0.shape[1]} if module.proj_size else sizes
    if isinstance(module, nn.RNNCellBase):
        return {"input_size": module.weight_ih.shape[1], "hidden_size": module.weight_hh.shape[1]}
    if isinstance(module, nn.MultiheadAttention):
        if type(module) not in (nn.MultiheadAttention, SlicedMultiheadAttention):
            return {}
        return {"__class__": SlicedMultiheadAttention, **head_sizes(module)}
    if type(module).__name__ == "Conv1D" and weight is not None and hasattr(module, "nf"):
        return {"nx": weight.shape[0], "nf": weight.shape[1]}
    return {}


def _of_convolution(conv) -> dict[str, int]:
    rows, columns = conv.weight.shape[:2]
    one_each = columns == 1 and conv.groups == conv.in_channels > 1
    if conv.transposed:
        groups = rows if one_each else conv.groups
        return {"in_channels": rows, "out_channels": columns * groups, "groups": groups}
    groups = rows * conv.in_channels // conv.out_channels if one_each else conv.groups
    return {"out_channels": rows, "in_channels": columns * groups, "groups": groups}

"""Replaces the attention of an existing model in place, keeping its weights, and puts it back."""

import os
from collections.abc import Callable, Iterable

from torch import nn

from torch_sluice.attention import Gate
from torch_sluice.swap import changes, gate_file, hugging_face
from torch_sluice.swap.call import GateOptions
from torch_sluice.swap.marked import attention_function

__all__ = ["attention_function", "gate_parameters", "load_gates", "restore", "save_gates", "swap_attention"]


def swap_attention(
    model: nn.Module,
    *,
    target_density: float | None = None,
    tau: float = 0.5,
    opening: float = 0.95,
    window: int = 32,
    sinks: int = 4,
    cross: bool = False,
    modules: Iterable[str | nn.Module] | Callable[[str, nn.Module], bool] | None = None,
    example: tuple | dict | None = None,
) -> nn.Module:
    """Replaces the attention of ``model`` by Sluice's, in place. Its weights stay the tensors that they are.

    Without ``target_density`` the gates are exactly open: the model gives its old outputs within floating-point error,
    and has no new parameters. With it every self-attention layer gets a ``torch_sluice.attention.Gate`` as submodule
    ``sluice_gate``: new trainable parameters, part of ``model.parameters()`` and of its ``state_dict()``, at first
    ``g = opening`` everywhere. They learn with the model, under ``torch_sluice.attention.DensityController``. They are
    float32, whatever the model is: before FSDP2 shards it, call ``torch_sluice.attention.shard_gates``.

    Three kinds of attention are known, and may be mixed in one model:

    - layers of Hugging Face transformers models that use its AttentionInterface and whose own function, "sdpa" or
      "eager", is plain attention (it is tried on small tensors). They then ask for ``attn_implementation="sluice"``,
      which may also be set without this function, for open gates. Padding on the left or right of the causal or full
      mask, sliding windows and generation with any cache run on the operator. Cross attention stays open without
      ``cross``.
    - ``nn.MultiheadAttention``, also within ``nn.TransformerEncoderLayer`` and ``nn.TransformerDecoderLayer``.
    - modules that call ``F.scaled_dot_product_attention`` themselves, or a function that ``attention_function`` marks:
      those of whose class some method names that function, and those given in ``modules``. Their calls are caught
      while their ``forward`` runs; the gate reads the first floating-point [B, N, dim] argument of that forward.

    With open gates, what the operator does not take (dropout, a bias or another pattern as mask, attention weights) is
    done as before the swap. With gates, all of these are the operator's but masks that show a causal layer later keys,
    which are computed densely, with a warning, and without dropout.

    Args:
        model: the model, of any kind above; training or not.
        target_density: share in (0, 1] of the pairs that shall be kept after training, to which
            ``DensityController(model, steps=...)`` drives the gates; None: no gates.
        tau: pairs with a gate below this are dropped, in [0, 1).
        opening: gate of all pairs at the start, in (0, 1).
        window: the last ``window`` keys of each query are kept and not gated.
        sinks: nor are the first ``sinks`` keys of each sequence, behind its padding.
        cross: the cross attention of transformers models gets gates, too: a of its queries, b of what its keys are made
            of. Neither has a place in the other's text, so that there is no window.
        modules: the layers to swap, as names, modules, or a predicate (name, module) -> bool; default all.
        example: positional (tuple) or keyword (dict) inputs of the model. With them the swap proves itself: the model
            runs on them with open gates and as it was, and must give the same within rounding (1e-4 of the largest
            output in float32). They also tell the sizes of layers of the third kind where attributes do not, and which
            layers can't have a gate.

    Returns:
        model.

    Raises:
        ValueError: the model has no attention of these kinds that computes what the operator does, gives other outputs
            on example, is swapped already, or an argument is out of its range. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}, expected an nn.Module")
    if any(hasattr(module, "_sluice_swap") for module in model.modules()):
        raise ValueError("model is swapped already, expected one that is not: call torch_sluice.restore(model) first")
    if target_density is not None and not 0 < target_density <= 1:
        raise ValueError(f"target_density is {target_density}, expected a number in (0, 1], or None for open gates")
    if window < 0 or sinks < 0:
        raise ValueError(f"window is {window} and sinks is {sinks}, expected both at least 0")
    options = GateOptions(window, sinks)
    if example is not None:
        changes.verify(model, options, modules, example)
    gate_arguments = dict(tau=tau, opening=opening, target_density=target_density)
    swap = changes.swap_layers(model, target_density, options, modules, example, gate_arguments, cross)
    if example is not None and target_density is not None:
        try:
            changes.try_gates(model, example)
        except BaseException:
            swap.undo()
            raise
    model._sluice_swap = swap
    model._sluice_swap.arguments = {**gate_arguments, "window": window, "sinks": sinks}
    return model


def _swapped_in(model: nn.Module) -> nn.Module | None:
    """The module that ``swap_attention`` was given: model, or what a wrap of another library holds (DDP, peft)."""
    found = [module for module in model.modules() if "_sluice_swap" in vars(module)]
    return found[0] if len(found) == 1 else None


def restore(model: nn.Module) -> nn.Module:
    """Undoes :func:`swap_attention`: the model's forward, config, hooks and ``state_dict`` keys are what they were.

    Gates are dropped; keep ``model.state_dict()`` first if they shall not be lost. Returns model.

    Raises:
        ValueError: model was not swapped.
    """
    root = _swapped_in(model)
    if root is None:
        raise ValueError("model is not swapped, expected the one that was given to torch_sluice.swap_attention")
    root._sluice_swap.undo()
    del root._sluice_swap
    return model


def save_gates(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes the gates of a swapped model, and the arguments of its swap, into a safetensors file of their own.

    ``model.save_pretrained`` of transformers keeps the weights of the model; with this file beside them
    ``load_gates(Model.from_pretrained(folder), path)`` is the gated model again.

    Raises:
        ValueError: model was not swapped, or without ``target_density``.
        ImportError: safetensors is not installed.
        OSError: the file can't be written; one that was there is as before.
    """
    root = _swapped_in(model)
    gates = {} if root is None else gate_file.gates_of(root)
    if not gates:
        raise ValueError(
            f"model is {'not swapped' if root is None else 'swapped with open gates'}, expected one that "
            "torch_sluice.swap_attention(model, target_density=...) gave gates"
        )
    gate_file.write(path, gates, root._sluice_swap.arguments)


def load_gates(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Gives a model the gates of a file that :func:`save_gates` wrote: swaps the same layers with the same arguments
    where the model is not swapped yet, else puts the numbers into the gates that it has. Returns model.

    Raises:
        FileNotFoundError, ImportError: there is no such file; safetensors is not installed.
        ValueError: the file is none of gates, or damaged; the model lacks its layers, has others, of other sizes, or
            was swapped with other arguments. The model is as it was.
    """
    layers, config = gate_file.read(path)
    root = _swapped_in(model)
    if root is None:
        swap_attention(model, modules=list(layers), cross=True, **config)
        try:
            gate_file.put(gate_file.gates_of(model), layers, path)
        except BaseException:
            restore(model)
            raise
        return model
    arguments = root._sluice_swap.arguments
    for name in ("tau", "window", "sinks"):
        if arguments[name] != config[name]:
            raise ValueError(
                f"model was swapped with {name}={arguments[name]}, expected {config[name]}, with which the gates "
                f"of {path} were trained: torch_sluice.restore(model) first, and load_gates swaps it"
            )
    gate_file.put(gate_file.gates_of(root), layers, path)
    return model


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all gates of a model, for a learning rate of their own (5 to 20 times) and no weight decay::

    gates = torch_sluice.gate_parameters(model)
    others = [p for p in model.parameters() if all(p is not g for g in gates)]
    optimizer = torch.optim.AdamW(
        [{"params": others, "lr": lr}, {"params": gates, "lr": 10 * lr, "weight_decay": 0.0}]
    )
    """
    return [p for module in model.modules() if isinstance(module, Gate) for p in module.parameters()]


hugging_face.register_when_imported()

"""How a model is called on what the user gave: one tensor, a tuple, or a dict; and what is checked about it."""

import contextlib
import copy
import random
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


def copy_model(model: nn.Module, share: bool = False) -> nn.Module:
    """A copy in eval mode. A tensor that a hook computed, as that of ``nn.utils.spectral_norm``, is copied as a value,
    which the copy's own hook computes anew.

    Args:
        share: the copy's parameters are its own, but lie in the memory of the model's: for a copy whose parameters are
            replaced and never written to.

    Raises:
        ValueError: something in the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    if share:
        for parameter in model.parameters():
            if type(parameter) is nn.Parameter:
                memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    try:
        return copy.deepcopy(model, memo).eval()
    except Exception as error:
        raise ValueError(
            f"model cannot be copied, expected one that copy.deepcopy takes: {describe_error(error)}"
        ) from error


def call_model(model: nn.Module, inputs: Any) -> Any:
    """The model on a tensor, on a tuple or list of positional inputs, or on a dict of keyword inputs."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def writes_into_inputs(model: nn.Module, inputs: Any) -> bool:
    """Whether a call changes a tensor that it is given. It is tried on a copy; a model that fails does not tell."""
    tried = tree_map(_copy_tensor, dict(inputs) if isinstance(inputs, Mapping) else inputs)
    tensors = [leaf for leaf in tree_leaves(tried) if isinstance(leaf, Tensor)]
    with evaluating(model), torch.no_grad(), seeded(), contextlib.suppress(Exception):
        call_model(model, tried)
    return any(tensor._version for tensor in tensors)


def give_copies(model: nn.Module) -> None:
    """From now on the model, and every copy of it, is called on copies of its inputs: what writes into them would
    change the data that the next candidate is measured on, and the user's own."""
    model.register_forward_pre_hook(_copy_inputs, with_kwargs=True)


def give_inputs(model: nn.Module) -> None:
    """Undoes ``give_copies``."""
    for number, hook in list(model._forward_pre_hooks.items()):
        if hook is _copy_inputs:
            del model._forward_pre_hooks[number]
            model._forward_pre_hooks_with_kwargs.pop(number, None)


def _copy_inputs(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return tree_map(_copy_tensor, args), tree_map(_copy_tensor, kwargs)


def _copy_tensor(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


@contextlib.contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Random numbers on the CPU, of torch and of ``random``, are the same each time; what follows goes on as before.

    So a forward that draws some is compared with itself, and not with another draw.
    """
    generator = torch.default_generator  # torch.manual_seed would queue calls for devices that are not in use
    states = generator.get_state(), random.getstate()
    try:
        generator.manual_seed(seed)
        random.seed(seed)
        yield
    finally:
        generator.set_state(states[0])
        random.setstate(states[1])


def describe_error(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def float_outputs(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output, of whatever structure."""
    if isinstance(output, Mapping):  # a ModelOutput of transformers is one, and no pytree to every version
        leaves = [leaf for value in output.values() for leaf in float_outputs(value)]
        return leaves
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def check_example(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """The model's outputs on the example.

    Raises:
        ValueError: the model does not run on it, gives no floating-point tensor, or gives NaN or infinity.
    """
    advice = "give the inputs of one call: a tensor, a tuple of positional inputs, or a dict of keyword inputs"
    try:
        with torch.no_grad():
            outputs = float_outputs(call_model(model, example_inputs))
    except Exception as error:
        raise ValueError(
            f"example_inputs does not match the model, whose forward raised {describe_error(error)}; expected inputs "
            f"that it takes: {advice}"
        ) from error
    if not outputs:
        raise ValueError(
            "the model returns no floating-point tensor for example_inputs, expected at least one to measure"
        )
    if not all(out.isfinite().all() for out in outputs):
        raise ValueError(
            "the model's outputs for example_inputs are not finite, expected finite numbers: look for inf or NaN in "
            "its weights (torch.isfinite) and in example_inputs first"
        )
    return outputs


def describe_shapes(tensors: list[Tensor]) -> list[list[int]]:
    return [list(tensor.shape) for tensor in tensors]


class evaluating:
    """A context in which a model is in eval mode, after which every module is in the mode that it was in."""

    def __init__(self, model: nn.Module):
        self._modules = list(model.modules())

    def __enter__(self):
        self._modes = [module.training for module in self._modules]
        for module in self._modules:
            module.training = False

    def __exit__(self, *_):
        for module, mode in zip(self._modules, self._modes, strict=True):
            module.training = mode

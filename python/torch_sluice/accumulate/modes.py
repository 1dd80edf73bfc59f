"""Which of torch's modes a look at ``.grad`` comes in."""

import contextlib
import sys

import torch


def in_backward() -> bool:
    """Whether this thread is in the middle of a backward pass."""
    return torch._C._current_graph_task_id() != -1


def is_for_autograd_grad() -> bool:
    """Whether the gradient that a hook of a leaf is called with goes to ``torch.autograd.grad``, not into ``.grad``."""
    node = torch._C._current_autograd_node()
    if node is None:
        return False
    try:
        torch._C._will_engine_execute_node(node)
    except RuntimeError:  # which it raises for a leaf in such a call, and only there
        return True
    return False


def outside_inference_mode() -> contextlib.AbstractContextManager:
    """For making a gradient: what is made in inference mode can't be added to by a backward pass."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()


def compiled_autograd_runs() -> bool:
    """Whether compiled autograd runs a backward pass."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and module.in_compiled_autograd_region

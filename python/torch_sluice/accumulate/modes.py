"""Which of torch's modes a look at ``.grad`` comes in."""

import contextlib
import sys

import torch


def in_backward() -> bool:
    """Whether this thread is in the middle of a backward pass."""
    return torch._C._current_graph_task_id() != -1


def outside_inference_mode() -> contextlib.AbstractContextManager:
    """For making a gradient: what is made in inference mode can't be added to by a backward pass."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()


def compiled_autograd_runs() -> bool:
    """Whether compiled autograd runs a backward pass."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and module.in_compiled_autograd_region

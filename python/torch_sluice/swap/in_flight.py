"""Hands the gate logits of a layer from its forward pre-hook to the attention function that its forward then calls.

Each thread has its own: a model that serves several requests at once gives each the gates of its own tokens. Nothing
is left on the module, which may be copied, pickled or run again in backward meanwhile. A compiler sees both ends in
one graph, and there the module carries them.
"""

import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

_NAME = "_sluice_in_flight"


class _Thread(threading.local):
    def __init__(self) -> None:
        self.logits: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # of modules whose forward runs


_thread = _Thread()


def put(module: nn.Module, logits: Any) -> None:
    if torch.compiler.is_compiling():
        setattr(module, _NAME, logits)
    else:
        _thread.logits[module] = logits


def take(module: nn.Module) -> Any:
    """What was put for this call of the module, once; None."""
    logits = getattr(module, _NAME, None)
    if logits is not None:
        setattr(module, _NAME, None)
        return logits
    return None if torch.compiler.is_compiling() else _thread.logits.pop(module, None)


def drop(module: nn.Module) -> None:
    """Forgets what a forward has put that ended without asking for it."""
    module.__dict__.pop(_NAME, None)
    _thread.logits.pop(module, None)

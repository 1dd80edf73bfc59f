"""Makes torch.amp.GradScaler hold back with the optimizer.

A GradScaler looks at the gradients before it calls ``optimizer.step()``, and divides them by its scale. While any
session is open its ``unscale_``, ``step`` and ``update`` are replaced by ones that do nothing for an optimizer whose
step would be held back by ``every=N`` (so the scale stays the same within a window), and that tell the session when the
scaler left a step out. Optimizers without a session are treated as ever.
"""

import weakref

from torch.amp import GradScaler

_sessions = weakref.WeakKeyDictionary()  # optimizer -> session
_held, _acted = weakref.WeakSet(), weakref.WeakSet()  # scalers, since their last update()
_originals = {}


def attach(optimizer, session) -> None:
    """Registers the session of an optimizer. Raises RuntimeError if it has one already."""
    if optimizer in _sessions:
        raise RuntimeError("the optimizer is accumulating in another torch_sluice.accumulate already; leave that first")
    _sessions[optimizer] = session
    if not _originals:
        for name, replacement in (("unscale_", _unscale), ("step", _step), ("update", _update)):
            _originals[name] = getattr(GradScaler, name)
            setattr(GradScaler, name, replacement)


def detach(optimizer, session) -> None:
    """Forgets the session of an optimizer; after the last one GradScaler is as it was."""
    if _sessions.get(optimizer) is session:
        del _sessions[optimizer]
    if not _sessions:
        for name, original in _originals.items():
            setattr(GradScaler, name, original)
        _originals.clear()


def _session_of(scaler, optimizer):
    session = _sessions.get(optimizer) if scaler.is_enabled() else None
    if session is not None and session.options.low_memory:
        raise RuntimeError("low_memory=True hides gradients from GradScaler, which must look at them: use one of both")
    return session


def _unscale(self, optimizer):
    session = _session_of(self, optimizer)
    if session is None or not session.window.is_held:
        return _originals["unscale_"](self, optimizer)
    return None


def _step(self, optimizer, *args, **kwargs):
    session = _session_of(self, optimizer)
    if session is not None and session.window.is_held:
        _held.add(self)
        session.hold_step()
        return None
    _acted.add(self)
    if session is None:
        return _originals["step"](self, optimizer, *args, **kwargs)
    before = session.steps + session.skipped_steps
    result = _originals["step"](self, optimizer, *args, **kwargs)
    if session.steps + session.skipped_steps == before:  # it found infinities and did not call the optimizer
        session.skip_step()
    return result


def _update(self, new_scale=None):
    held = self in _held and self not in _acted
    _held.discard(self)
    _acted.discard(self)
    if not held:
        _originals["update"](self, new_scale)

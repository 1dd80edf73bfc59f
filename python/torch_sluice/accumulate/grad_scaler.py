"""Makes torch.amp.GradScaler hold back with the optimizer.

A GradScaler looks at the gradients before it calls ``optimizer.step()``, and fails if there are none, as in a window
that is still open. While any session is open its ``unscale_``, ``step`` and ``update`` are replaced by ones that do
nothing for an optimizer whose step would be held back (so the scale stays the same within a window), and that show the
gradients first where the step acts. Optimizers without a session are treated as ever.
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


def detach(optimizer) -> None:
    """Forgets the session of an optimizer; after the last one GradScaler is as it was."""
    _sessions.pop(optimizer, None)
    if not _sessions:
        for name, original in _originals.items():
            setattr(GradScaler, name, original)
        _originals.clear()


def _session_of(scaler, optimizer):
    return _sessions.get(optimizer) if scaler.is_enabled() else None


def _unscale(self, optimizer):
    session = _session_of(self, optimizer)
    if session is None or session.prepare_step():
        return _originals["unscale_"](self, optimizer)
    return None


def _step(self, optimizer, *args, **kwargs):
    session = _session_of(self, optimizer)
    if session is not None and not session.prepare_step():
        _held.add(self)
        session.hold_step()
        return None
    _acted.add(self)
    if session is None:
        return _originals["step"](self, optimizer, *args, **kwargs)
    windows = session.windows
    result = _originals["step"](self, optimizer, *args, **kwargs)
    if session.windows == windows:  # it found infinities and did not call the optimizer
        session.skip_step()
    return result


def _update(self, new_scale=None):
    held = self in _held and self not in _acted
    _held.discard(self)
    _acted.discard(self)
    if not held:
        _originals["update"](self, new_scale)

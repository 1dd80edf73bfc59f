"""When a result in a given precision counts as right: three rules at once."""

import torch

FEW = 16  # numbers, of which one rounding more or less moves the root mean square
RMS_LIMIT = 0.005


def assert_close_as_torch(name, actual, truth, peer, floor=0.0, *, drawn=False):
    """Fails unless ``actual`` is as good as torch is at its precision.

    1. NaN and infinities are where they are in the truth, once that is rounded to the dtype of ``actual``.
    2. The largest error is at most twice that of ``peer``, plus four units in the last place of the largest value.
    3. The root mean square of the error is below 0.5 % of that of the truth.

    Args:
        name: of the tensor, for the message.
        actual: what is judged.
        truth: the same in float64.
        peer: the same maths in torch, in the precision of ``actual``.
        floor: added to both limits. For results that are a difference of larger terms, and may be 0: the rounding
            error of those terms.
        drawn: the call was drawn at random. Rule 3 then leaves out what it cannot judge: fewer than ``FEW`` numbers,
            and results for which ``peer`` itself is above it, where ours may be at half as much again.
    """
    assert actual.shape == truth.shape, f"{name}: shape {list(actual.shape)}, expected {list(truth.shape)}"
    rounded = truth.to(actual.dtype)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        wrong = kind(actual) != kind(rounded)
        assert not wrong.any(), f"{name}: {kind.__name__} differs at {wrong.nonzero()[:5].tolist()}"
    finite = rounded.isfinite()
    if not finite.any():
        return
    actual, truth, eps = actual.double()[finite], truth[finite], torch.finfo(actual.dtype).eps
    error = (actual - truth).abs()
    peer_error = (peer.double()[finite] - truth).abs().nan_to_num(0.0)
    limit = 2 * peer_error.max() + 4 * eps * truth.abs().max() + floor
    assert error.max() <= limit, f"{name}: largest error {error.max():.3g}, expected at most {limit:.3g}"
    if drawn and error.numel() < FEW:
        return
    rms, truth_rms, peer_rms = (x.square().mean().sqrt() for x in (error, truth, peer_error))
    limit = max(RMS_LIMIT * truth_rms, 1.5 * peer_rms if drawn else 0.0) + floor
    assert rms <= limit, f"{name}: rms error {rms:.3g} of {truth_rms:.3g}, expected at most {limit:.3g}"

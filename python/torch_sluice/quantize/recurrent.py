"""LSTM and GRU layers on packed weights; ops/sluice/quantize_recurrent.h has the formulas."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_sluice.quantize.functional import (
    DEFAULT_OUTLIER_RATIO,
    DEFAULT_TARGET_SQNR,
    _call,
    _number_of_bits,
    _refuse_gradient,
)

DEFAULT_STATE_BITS = 16  # what is rounded in the state comes back in every later step


class PackedMatrix(NamedTuple):
    """A weight as :func:`torch_sluice.quantize.pack_linear_weight` packs it, with what it was packed with."""

    packed: Tensor  #: uint8 [bytes]
    scale: Tensor  #: float32 [groups, padded outputs]
    bits: int = 8
    group_size: int = 0


def _sizes(matrices: Sequence[PackedMatrix]) -> tuple[list[int], list[int]]:
    return [matrix.bits for matrix in matrices], [matrix.group_size for matrix in matrices]


def lstm_dynamic(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_ih: PackedMatrix,
    weight_hh: PackedMatrix,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    weight_hr: PackedMatrix | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    activation_bits: int | str = "sqnr",
    state_bits: int | str = DEFAULT_STATE_BITS,
    target_sqnr: float = DEFAULT_TARGET_SQNR,
    outlier_ratio: float = DEFAULT_OUTLIER_RATIO,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer of an LSTM in one direction, on integers: x and the state are quantised as they come.

    Args:
        x: float32, bfloat16 or float16 [steps, batch, inputs]; with batch_sizes [rows, inputs], the data of a
            ``torch.nn.utils.rnn.PackedSequence``.
        h0: x's dtype [batch, hidden_size], or with a projection [batch, proj_size].
        c0: x's dtype [batch, hidden_size].
        weight_ih, weight_hh: [4 hidden_size, inputs] and [4 hidden_size, hidden_size or proj_size], packed, in torch's
            order of gates.
        bias_ih, bias_hh: [4 hidden_size], or None.
        weight_hr: the projection [proj_size, hidden_size], packed, or None.
        batch_sizes: int64 [steps] on the CPU: how many sequences have a row in each step, not increasing.
        reverse: run from the last step to the first; out stays in x's order.
        activation_bits: the width of x's rows, as ``bits`` of :func:`torch_sluice.quantize.quantize_dynamic`.
        state_bits: likewise, of what weight_hh and weight_hr are multiplied by.
        target_sqnr: in dB, for the width "sqnr".
        outlier_ratio: as of :func:`torch_sluice.quantize.linear_dynamic`, for x.

    Returns:
        out, like x with hidden_size (or proj_size) columns; h_n and c_n, like h0 and c0; bits, int8 [2 or 3, rows]: the
        width of each row of x, of the state before it, and of what is projected. A sequence with an infinity or NaN is
        NaN from there on; other sequences are not touched.

    Raises:
        ValueError: an argument is not allowed; the message names it.
        RuntimeError: an argument requires a gradient.
    """
    _refuse_gradient("lstm_dynamic", x, h0, c0, bias_ih, bias_hh)
    matrices = [weight_ih, weight_hh, *([] if weight_hr is None else [weight_hr])]
    packed_hr, scale_hr = (None, None) if weight_hr is None else weight_hr[:2]
    return _call(
        torch.ops.sluice.lstm_dynamic.default,
        *(x, h0, c0, *weight_ih[:2], *weight_hh[:2], packed_hr, scale_hr, bias_ih, bias_hh, batch_sizes),
        *(*_sizes(matrices), reverse),
        *(_number_of_bits("activation_bits", activation_bits), _number_of_bits("state_bits", state_bits)),
        *(target_sqnr, outlier_ratio),
    )


def gru_dynamic(
    x: Tensor,
    h0: Tensor,
    weight_ih: PackedMatrix,
    weight_hh: PackedMatrix,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    activation_bits: int | str = "sqnr",
    state_bits: int | str = DEFAULT_STATE_BITS,
    target_sqnr: float = DEFAULT_TARGET_SQNR,
    outlier_ratio: float = DEFAULT_OUTLIER_RATIO,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer of a GRU in one direction, on integers, with the reset gate after the product, as torch has it.

    Args:
        x, h0, batch_sizes, reverse, activation_bits, state_bits, target_sqnr, outlier_ratio: as of
            :func:`lstm_dynamic`.
        weight_ih, weight_hh: [3 hidden_size, inputs] and [3 hidden_size, hidden_size], packed, in torch's order of
            gates.
        bias_ih, bias_hh: [3 hidden_size], or None.

    Returns:
        out, h_n and bits, as :func:`lstm_dynamic`.

    Raises:
        ValueError: an argument is not allowed; the message names it.
        RuntimeError: an argument requires a gradient.
    """
    _refuse_gradient("gru_dynamic", x, h0, bias_ih, bias_hh)
    return _call(
        torch.ops.sluice.gru_dynamic.default,
        *(x, h0, *weight_ih[:2], *weight_hh[:2], bias_ih, bias_hh, batch_sizes),
        *(*_sizes([weight_ih, weight_hh]), reverse),
        *(_number_of_bits("activation_bits", activation_bits), _number_of_bits("state_bits", state_bits)),
        *(target_sqnr, outlier_ratio),
    )


def _check_kind(kind: str) -> None:
    if kind not in ("lstm", "gru"):
        raise ValueError(f"kind is {kind!r}, expected 'lstm' or 'gru'")


def run_recurrent(
    kind: str,
    input: Tensor,
    hx: Tensor | tuple[Tensor, Tensor],
    weights: Sequence[PackedMatrix | Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    *,
    on_bits: Callable[[Tensor], None] | None = None,
    **options,
) -> tuple[Tensor, ...]:
    """What ``torch._VF.lstm`` and ``torch._VF.gru`` do in inference, on packed weights: all layers and directions.

    Args:
        kind: "lstm" or "gru".
        input: [steps, batch, inputs], [batch, steps, inputs] with batch_first, or [rows, inputs] with batch_sizes.
        hx: the initial state [num_layers * directions, batch, hidden_size], for an LSTM (h0, c0).
        weights: flat, in torch's order: of each layer and direction weight_ih, weight_hh, with has_biases bias_ih and
            bias_hh, and with a projection weight_hr. Weights are :class:`PackedMatrix` or tuples like it; biases are
            tensors.
        has_biases, num_layers, bidirectional: of the module.
        batch_first: input and output have the batch first; not read with batch_sizes.
        batch_sizes: of a ``PackedSequence``.
        on_bits: called with the widths of each layer and direction, int8 [2 or 3, rows].
        options: activation_bits, state_bits, target_sqnr, outlier_ratio of :func:`lstm_dynamic`.

    Returns:
        out, h_n and, for an LSTM, c_n.

    Raises:
        ValueError: an argument is not allowed; the message names it.
        RuntimeError: an argument requires a gradient.
    """
    _check_kind(kind)
    directions = 2 if bidirectional else 1
    runs = num_layers * directions
    each = len(weights) // runs if runs > 0 else 0
    biases = 2 if has_biases else 0
    projected = each == 3 + biases
    if runs < 1 or len(weights) != runs * (2 + biases + projected) or (projected and kind == "gru"):
        raise ValueError(
            f"weights has {len(weights)} entries, expected {2 + biases}"
            f"{'' if kind == 'gru' else f' (or with a projection {3 + biases})'} for each of {num_layers} layers in "
            f"{directions} directions"
        )
    states = (hx,) if kind == "gru" else tuple(hx)
    if len(states) != (1 if kind == "gru" else 2):
        raise ValueError(f"hx has {len(states)} tensors, expected h0 and c0")
    for name, state in zip(("h0", "c0"), states, strict=False):
        if state.dim() != 3 or state.shape[0] != runs:
            raise ValueError(
                f"{name} has shape {list(state.shape)}, expected [num_layers * directions, batch, size] = [{runs}, ...]"
            )
    if torch.is_autocast_enabled(input.device.type):  # torch casts them all; a layer before may have made input half
        states = tuple(state.to(input.dtype) for state in states)
    transposed = batch_first and batch_sizes is None
    layer_input = input.transpose(0, 1) if transposed else input
    ends = []
    for layer in range(num_layers):
        outs = []
        for direction in range(directions):
            number = layer * directions + direction
            own = weights[number * each : (number + 1) * each]
            matrices = [PackedMatrix(*matrix) for matrix in (*own[:2], *own[2 + biases :])]
            shared = dict(options, batch_sizes=batch_sizes, reverse=direction == 1)
            if projected:
                shared["weight_hr"] = matrices.pop()
            run = lstm_dynamic if kind == "lstm" else gru_dynamic
            initial = (state[number] for state in states)
            out, *end, bits = run(layer_input, *initial, *matrices, *own[2 : 2 + biases], **shared)
            if on_bits is not None:
                on_bits(bits)
            outs.append(out)
            ends.append(end)
        layer_input = outs[0] if directions == 1 else torch.cat(outs, -1)
    out = layer_input.transpose(0, 1) if transposed else layer_input
    return (out, *(torch.stack(state) for state in zip(*ends, strict=True)))


def run_recurrent_cell(
    kind: str,
    input: Tensor,
    hx: Tensor | tuple[Tensor, Tensor],
    weight_ih: PackedMatrix,
    weight_hh: PackedMatrix,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    on_bits: Callable[[Tensor], None] | None = None,
    **options,
) -> Tensor | tuple[Tensor, Tensor]:
    """What ``torch._VF.lstm_cell`` and ``torch._VF.gru_cell`` do in inference, on packed weights: one step.

    Args:
        kind: "lstm" or "gru".
        input: [batch, inputs].
        hx: the state [batch, hidden_size], for an LSTM (h, c).
        weight_ih, weight_hh, bias_ih, bias_hh: as of :func:`lstm_dynamic` and :func:`gru_dynamic`.
        on_bits, options: as of :func:`run_recurrent`.

    Returns:
        h, for an LSTM (h, c).

    Raises:
        ValueError: an argument is not allowed; the message names it.
        RuntimeError: an argument requires a gradient.
    """
    _check_kind(kind)
    run = lstm_dynamic if kind == "lstm" else gru_dynamic
    states = hx if kind == "lstm" else (hx,)
    if torch.is_autocast_enabled(input.device.type):
        states = tuple(state.to(input.dtype) for state in states)
    matrices = PackedMatrix(*weight_ih), PackedMatrix(*weight_hh)
    _, *ends, bits = run(input.unsqueeze(0), *states, *matrices, bias_ih, bias_hh, **options)
    if on_bits is not None:
        on_bits(bits)
    return tuple(ends) if kind == "lstm" else ends[0]

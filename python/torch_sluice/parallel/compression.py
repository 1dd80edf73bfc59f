"""The formats in which gradients travel between ranks, and the two exchanges that are made of them.

A format turns float32 values, a multiple of BLOCK of them, into a message of bytes and back. A sum is never formed in
the format itself: every rank decodes what the others sent and adds in float32, in the order of the ranks, so that
nothing overflows and the bits don't depend on the backend.
"""

import torch
from torch import distributed

from torch_sluice.accumulate import operators
from torch_sluice.accumulate.operators import BLOCK

_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny

# Torch 2.13 gives two collectives new names and warns at the old ones.
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
plain_reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


class Int8Format:
    """round(x * 127 / amax) with the float32 step amax / 127 of each block behind the values."""

    name = "int8"

    def message_bytes(self, elements: int) -> int:
        return elements + 4 * (elements // BLOCK)

    def encode(self, values: torch.Tensor, message: torch.Tensor) -> int:
        """Writes float32 [elements] to uint8 [message_bytes(elements)]. Returns how many elements underflowed."""
        blocks, elements = values.view(-1, BLOCK), values.numel()
        steps = torch.linalg.vector_norm(blocks, ord=float("inf"), dim=1).div_(127)
        # A step below float32's normal range has no finite inverse; such a block is sent as zeros. One that is not
        # finite makes every value of its block NaN on the other side.
        inverse = torch.where(steps >= _SMALLEST_NORMAL, 1 / steps, 0)
        scaled = (blocks * inverse.unsqueeze(1)).round_().nan_to_num_(0, 127, -127)
        message[:elements].view(torch.int8).view(-1, BLOCK).copy_(scaled)
        message[elements:].view(torch.float32).copy_(steps)
        return 0

    def decode(self, message: torch.Tensor, values: torch.Tensor) -> None:
        """Writes what a message holds to float32 [elements]."""
        elements = values.numel()
        steps = message[elements:].view(torch.float32).unsqueeze(1)
        torch.mul(message[:elements].view(torch.int8).view(-1, BLOCK), steps, out=values.view(-1, BLOCK))


class Float16Format:
    """The scaled float16 of ops/sluice/accumulate.h: the power of two of each block behind the values."""

    name = "float16"

    def message_bytes(self, elements: int) -> int:
        return 2 * elements + -(-(elements // BLOCK) // 8) * 8

    def _parts(self, message: torch.Tensor, elements: int) -> tuple[torch.Tensor, torch.Tensor]:
        exponents = message[2 * elements : 2 * elements + elements // BLOCK].view(torch.int8)
        return message[: 2 * elements].view(torch.float16), exponents

    def encode(self, values: torch.Tensor, message: torch.Tensor) -> int:
        halves, exponents = self._parts(message, values.numel())
        stats = operators.accumulate_(halves, exponents, values, 1.0, True, None)
        return int(stats[5])

    def decode(self, message: torch.Tensor, values: torch.Tensor) -> None:
        halves, exponents = self._parts(message, values.numel())
        operators.read_accumulator(halves, exponents, 1.0, values)


class BFloat16Format:
    """Rounded to nearest even; no scale, for the range is float32's."""

    name = "bfloat16"

    def message_bytes(self, elements: int) -> int:
        return 2 * elements

    def encode(self, values: torch.Tensor, message: torch.Tensor) -> int:
        message.view(torch.bfloat16).copy_(values)
        return 0

    def decode(self, message: torch.Tensor, values: torch.Tensor) -> None:
        values.copy_(message.view(torch.bfloat16))


FORMATS = {format.name: format for format in (Int8Format(), Float16Format(), BFloat16Format())}


def part_elements(elements: int, ranks: int) -> int:
    """Elements of one rank's part, where so many are cut into parts of whole blocks."""
    return -(-elements // (ranks * BLOCK)) * BLOCK


def reduce_scatter(parts: torch.Tensor, format, group, decoded: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """This rank's part of the sum over ranks.

    Args:
        parts: float32 [ranks, elements], elements a multiple of BLOCK; ``parts[i]`` goes to rank i.
        decoded: float32 like parts; receives what the others understand of this rank's parts. None: not wanted.

    Returns:
        The sum, float32 [elements], and how many elements of ``parts`` underflowed in the format.
    """
    ranks, elements = parts.shape
    sent = torch.empty(ranks, format.message_bytes(elements), dtype=torch.uint8, device=parts.device)
    underflow = sum(format.encode(part, message) for part, message in zip(parts, sent, strict=True))
    received = torch.empty_like(sent)
    distributed.all_to_all_single(received, sent, group=group)
    if decoded is not None:
        for message, part in zip(sent, decoded, strict=True):
            format.decode(message, part)
    total, addend = torch.empty_like(parts[0]), torch.empty_like(parts[0])
    format.decode(received[0], total)
    for message in received[1:]:
        format.decode(message, addend)
        total += addend
    return total, underflow


def all_gather(part: torch.Tensor, format, group, out: torch.Tensor) -> None:
    """Every rank's part, float32 [elements], to ``out``, float32 [ranks, elements]: the same bits on every rank."""
    sent = torch.empty(format.message_bytes(part.numel()), dtype=torch.uint8, device=part.device)
    format.encode(part, sent)
    received = torch.empty(len(out) * sent.numel(), dtype=torch.uint8, device=part.device)
    _all_gather(received, sent, group=group)
    for message, decoded in zip(received.view(len(out), -1), out, strict=True):
        format.decode(message, decoded)


def gather_rows(row: list[float], group, device: torch.device) -> list[list[float]]:
    """The row of numbers that each rank gave."""
    ranks = distributed.get_world_size(group)
    mine = torch.tensor(row, dtype=torch.float64, device=device)
    rows = torch.empty(ranks * len(row), dtype=torch.float64, device=device)
    _all_gather(rows, mine, group=group)
    return rows.view(ranks, -1).tolist()

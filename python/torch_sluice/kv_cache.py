"""A paged KV cache for gated attention: memory in blocks, sequences of any lengths, and keys that can be dropped."""

from collections.abc import Sequence
from itertools import count
from operator import index

import torch
from torch import Tensor

from torch_sluice import eviction
from torch_sluice._errors import check_tensors


class KVCache:
    """Keys, values and key gates of one layer, in blocks that sequences take as they grow.

    ``k_cache`` [num_blocks, block_size, kv_heads, head_dim], ``v_cache`` [.., head_dim_v] and ``b_cache`` [num_blocks,
    block_size, kv_heads] are what :func:`torch_sluice.gated_attention_paged` reads, with ``block_table(sequences)``
    and ``seqlens_k(sequences)``. In memory a head's rows lie one behind the other, across neighbouring blocks too, so
    that they are read in streams. The memory is taken at the start; a block belongs to one sequence.

    Args:
        num_blocks: blocks in all.
        block_size: tokens a block. Small blocks waste less at a sequence's end and let more keys be dropped, large ones
            have shorter tables.
        kv_heads, head_dim: of the keys; head_dim_v: of the values, default head_dim.
        dtype: of keys and values. The gates are float32 (float64 with float64).
        device: default that of torch. gated_attention_paged runs on the CPU.

    Raises:
        ValueError: a size below 1, or a dtype that is no floating-point one.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        sizes = dict(
            num_blocks=num_blocks, block_size=block_size, kv_heads=kv_heads, head_dim=head_dim, head_dim_v=head_dim_v
        )
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} is {size!r}, expected an integer of at least 1")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}, expected a floating-point one")
        gates = torch.float64 if dtype == torch.float64 else torch.float32
        rows = (kv_heads, num_blocks, block_size)
        self.k_cache = torch.empty(*rows, head_dim, dtype=dtype, device=device).movedim(0, 2)
        self.v_cache = torch.empty(*rows, head_dim_v, dtype=dtype, device=device).movedim(0, 2)
        self.b_cache = torch.empty(rows, dtype=gates, device=device).movedim(0, 2)
        self._free = list(range(num_blocks))[::-1]  # the next one last
        self._lengths: dict[int, int] = {}  # of each sequence
        self._rows: dict[int, int] = {}  # of each sequence in the table
        self._free_rows: list[int] = []
        self._names = count()
        self._table = torch.empty(0, 0, dtype=torch.int32, device=device)

    @property
    def block_size(self) -> int:
        """Tokens a block."""
        return self.k_cache.shape[1]

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return self.k_cache.shape[0]

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence has."""
        return len(self._free)

    @property
    def sequences(self) -> list[int]:
        """Those that are allocated, oldest first."""
        return list(self._lengths)

    def allocate(self) -> int:
        """A new, empty sequence; its number is not used again."""
        if not self._free_rows:
            rows, columns = self._table.shape
            self._reserve(max(8, 2 * rows), columns)
            self._free_rows = list(range(rows, self._table.shape[0]))[::-1]
        sequence = next(self._names)
        self._rows[sequence] = self._free_rows.pop()
        self._lengths[sequence] = 0
        return sequence

    def free(self, sequence: int) -> None:
        """Gives back the sequence and its blocks."""
        (row,) = self._rows_of([sequence])
        self._release(row, self._held_columns(sequence))
        self._free_rows.append(self._rows.pop(sequence))
        del self._lengths[sequence]

    def length(self, sequence: int) -> int:
        """Tokens of the sequence, dropped ones included: the place of the next."""
        self._rows_of([sequence])
        return self._lengths[sequence]

    def blocks_held(self, sequence: int) -> int:
        """Blocks that the sequence has."""
        self._rows_of([sequence])
        return len(self._held_columns(sequence))

    def append(self, sequences: int | Sequence[int], k: Tensor, v: Tensor, b: Tensor) -> None:
        """Puts n tokens behind the last of each sequence.

        Args:
            sequences: one, or B different ones.
            k: [B, kv_heads, n, head_dim] and v: [B, kv_heads, n, head_dim_v], of the cache's dtype and device.
            b: [B, kv_heads, n] gate logits of the keys, floating-point.

        What is stored has no gradient.

        Raises:
            ValueError: a tensor of a wrong shape, dtype or device, or a sequence twice.
            KeyError: a sequence that is not allocated.
            RuntimeError: outside inference mode, of a cache that was made in it.
            MemoryError: too few free blocks; the message has how many are needed. Nothing is stored then.
        """
        sequences = self._as_list(sequences)
        rows = self._rows_of(sequences)
        self._check_once(sequences)
        if not sequences:
            return
        n = self._check_tokens(len(sequences), k, v, b)
        needed = [range(self._columns(self._lengths[s]), self._columns(self._lengths[s] + n)) for s in sequences]
        total = sum(map(len, needed))
        if total > len(self._free):
            raise MemoryError(
                f"{n} tokens for {len(sequences)} sequences need {total} blocks of {self.block_size}, and "
                f"{self.free_blocks} of {self.num_blocks} are free: free sequences, evict keys, or make a larger cache"
            )
        if self.k_cache.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                "the cache was made under torch.inference_mode(), expected to be appended to under it, too: make it "
                "outside, or under torch.no_grad()"
            )
        self._reserve(self._table.shape[0], max((columns.stop for columns in needed), default=0))
        for row, columns in zip(rows, needed, strict=True):
            if columns:
                taken = [self._free.pop() for _ in columns]
                self._table[row, columns.start : columns.stop] = torch.tensor(taken, dtype=torch.int32)
        device = self._table.device
        starts = torch.tensor([self._lengths[s] for s in sequences], dtype=torch.int64, device=device)
        places = starts[:, None] + torch.arange(n, device=device)
        blocks = self._table[torch.tensor(rows, device=device)[:, None], places // self.block_size]
        where = (blocks.long(), places % self.block_size)
        with torch.no_grad():
            self.k_cache[where] = k.detach().transpose(1, 2)
            self.v_cache[where] = v.detach().transpose(1, 2)
            self.b_cache[where] = b.detach().transpose(1, 2).to(self.b_cache.dtype)
        for sequence in sequences:
            self._lengths[sequence] += n

    def block_table(self, sequences: int | Sequence[int] | None = None) -> Tensor:
        """[B, max_blocks] int32, as gated_attention_paged takes it; -1 where a block was dropped and behind the end.

        sequences: one, or several; default all, oldest first.
        """
        sequences = self._as_list(sequences)
        rows = torch.tensor(self._rows_of(sequences), dtype=torch.int64, device=self._table.device)
        width = max((self._columns(self._lengths[s]) for s in sequences), default=0)
        return self._table[:, :width].index_select(0, rows)

    def seqlens_k(self, sequences: int | Sequence[int] | None = None) -> Tensor:
        """[B] int64: the tokens of each sequence, dropped ones included. sequences: as of ``block_table``."""
        sequences = self._as_list(sequences)
        self._rows_of(sequences)
        return torch.tensor([self._lengths[s] for s in sequences], dtype=torch.int64, device=self._table.device)

    def evict(
        self,
        sequences: int | Sequence[int] | None = None,
        *,
        tau: float | Tensor = 0.0,
        a_max: float | Tensor = eviction.GATE_LOGIT_LIMIT,
        window: int = 0,
        sinks: int = 0,
        sliding_window: int = 0,
        budget: int | None = None,
    ) -> int:
        """Drops blocks of keys that no query can reach any more, and on a budget those of the least interest.

        A key is out of reach if no query from the last token's on sees it: it is beyond the sliding window; or it is
        no sink, beyond the window, and for every query head ``b_j < logit(tau) - a_max``. A block goes when all of its
        keys are; its entry in the table becomes -1, so that places stay what they are. Outputs of queries with
        a <= a_max do not change by a bit, as long as they are asked for with the same tau, window, sinks and
        sliding_window, and there is no NaN among the values that go.

        Args:
            sequences: one, or several; default all.
            tau: the threshold that attention is called with: a number, or [Hq], Hq being a multiple of kv_heads.
            a_max: bound on the gate logits of all queries to come: a number, or [Hq]. Logits are clamped to 40, so the
                default always holds, and drops little.
            window, sinks, sliding_window: as attention is called with.
            budget: blocks that each sequence may keep. Where more are left, those go whose largest b over keys and
                heads is lowest, the oldest first among equals; never with sinks, the window or the last token in them.
                This does change outputs.

        Returns:
            The number of blocks that were freed.

        Raises:
            ValueError: a wrong argument, or a budget below the blocks that must stay. Nothing is dropped then.
            KeyError: a sequence that is not allocated.
        """
        rule = eviction.Rule(tau, a_max, window, sinks, sliding_window, budget)
        rule.check(self.b_cache)
        sequences = self._as_list(sequences)
        rows, doomed = self._rows_of(sequences), []
        self._check_once(sequences)
        for sequence, row in zip(sequences, rows, strict=True):
            columns = self._held_columns(sequence)
            b = self.b_cache[self._table[row, columns].long()]
            doomed.append(columns[eviction.choose(rule, columns, self._lengths[sequence], b)])
        for row, columns in zip(rows, doomed, strict=True):
            self._release(row, columns)
        return sum(map(len, doomed))

    def _columns(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _as_list(self, sequences: int | Sequence[int] | None) -> list[int]:
        if sequences is None:
            return self.sequences
        if hasattr(sequences, "__index__") and not (isinstance(sequences, Tensor) and sequences.dim()):
            return [index(sequences)]
        return [index(sequence) for sequence in sequences]

    @staticmethod
    def _check_once(sequences: list[int]) -> None:
        if len(set(sequences)) < len(sequences):
            raise ValueError(f"sequences is {sequences}, expected each but once")

    def _rows_of(self, sequences: list[int]) -> list[int]:
        for sequence in sequences:
            if sequence not in self._rows:
                raise KeyError(f"sequence {sequence!r} is not allocated, expected one of {self.sequences}")
        return [self._rows[sequence] for sequence in sequences]

    def _held_columns(self, sequence: int) -> Tensor:
        """Columns of the table, in order, in which the sequence has a block."""
        row = self._table[self._rows[sequence], : self._columns(self._lengths[sequence])]
        return (row >= 0).nonzero()[:, 0]

    def _release(self, row: int, columns: Tensor) -> None:
        self._free += self._table[row, columns].tolist()[::-1]
        self._table[row, columns] = -1

    def _reserve(self, rows: int, columns: int) -> None:
        """A table of at least this size."""
        old_rows, old_columns = self._table.shape
        if rows <= old_rows and columns <= old_columns:
            return
        if columns > old_columns:
            columns = max(columns, 2 * old_columns)
        table = self._table.new_full((max(rows, old_rows), max(columns, old_columns)), -1)
        table[:old_rows, :old_columns] = self._table
        self._table = table

    def _check_tokens(self, batch: int, k: Tensor, v: Tensor, b: Tensor) -> int:
        check_tensors(k=k, v=v, b=b)
        heads = self.k_cache.shape[2]
        n = k.shape[2] if k.dim() == 4 else 0
        for name, tensor, cache, channels in (
            ("k", k, self.k_cache, self.k_cache.shape[3:]),
            ("v", v, self.v_cache, self.v_cache.shape[3:]),
            ("b", b, self.b_cache, ()),
        ):
            if tensor.shape != (batch, heads, n, *channels):
                tokens = n if tensor is not k else "n"
                expected = ", ".join(map(str, (batch, heads, tokens, *channels)))
                raise ValueError(f"{name} has shape {list(tensor.shape)}, expected [{expected}]")
            if tensor.device != cache.device:
                raise ValueError(f"{name} is on {tensor.device}, expected the cache's device, {cache.device}")
            if tensor.dtype != cache.dtype and not (name == "b" and tensor.is_floating_point()):
                expected = "floating-point gate logits" if name == "b" else f"the cache's dtype, {cache.dtype}"
                raise ValueError(f"{name} is {tensor.dtype}, expected {expected}")
        return n

"""What the C core is compared with: MPI by mpi4py, and the backends of torch.distributed by their names.

An engine has a name and prepare(case, buffers), which gives what to time. Imports stay inside: a rank has one MPI, and
torch only where it is asked for.
"""

from collections.abc import Callable

from benchmarks.collective_cases import ITEM_BYTES, Buffers, Case


class MpiEngine:
    """MPI.COMM_WORLD under the name of whose it is."""

    def __init__(self, name: str):
        from mpi4py import MPI

        self.name, self._mpi, self._comm = name, MPI, MPI.COMM_WORLD
        self.rank, self.size = self._comm.rank, self._comm.size

    def exchange_text(self, text: bytes | None) -> bytes:
        """What rank 0 gave."""
        return self._comm.bcast(text, root=0)

    def sums_exactly(self, case: Case) -> bool:
        """False for bfloat16 where this MPI has none; it then adds 16-bit integers, which is no more work."""
        return case.dtype == "float32" or self._type_of(case) != self._mpi.UINT16_T

    def _type_of(self, case: Case):
        if case.dtype == "float32":
            return self._mpi.FLOAT
        brain = getattr(self._mpi, "BFLOAT16_T", self._mpi.DATATYPE_NULL)
        return self._mpi.UINT16_T if brain == self._mpi.DATATYPE_NULL else brain

    def prepare(self, case: Case, buffers: Buffers) -> Callable[[], None]:
        mpi, comm, type_ = self._mpi, self._comm, self._type_of(case)
        part = case.elements // self.size
        given, taken = [buffers.input, case.elements, type_], [buffers.output, case.elements, type_]
        if case.op == "barrier":
            return comm.Barrier
        if case.op == "all_reduce":
            return lambda: comm.Allreduce(mpi.IN_PLACE, given, mpi.SUM)
        if case.op == "broadcast":
            return lambda: comm.Bcast(given, root=0)
        if case.op == "all_gather":
            return lambda: comm.Allgather(given, taken)
        if case.op == "all_to_all":
            parts = [buffers.input, part, type_], [buffers.output, part, type_]
            return lambda: comm.Alltoall(*parts)
        if case.op == "reduce_scatter":
            parts = [buffers.input, part, type_], [buffers.output, part, type_]
            return lambda: comm.Reduce_scatter_block(*parts, mpi.SUM)
        partner = self.rank ^ 1
        if partner >= self.size:
            return lambda: None
        if self.rank < partner:
            return lambda: (comm.Send(given, partner), comm.Recv(taken, partner))
        return lambda: (comm.Recv(taken, partner), comm.Send(taken, partner))


class TorchEngine:
    """A group of all ranks on one backend of torch.distributed."""

    def __init__(self, backend: str, label: str | None = None):
        import torch
        from torch import distributed

        self.name, self._torch, self._distributed = label or backend, torch, distributed
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self._group = distributed.new_group(backend=backend)

    def prepare(self, case: Case, buffers: Buffers) -> Callable[[], None]:
        dist, group = self._distributed, self._group
        if case.op == "barrier":
            return lambda: dist.barrier(group=group)
        dtype = getattr(self._torch, case.dtype)
        assert dtype.itemsize == ITEM_BYTES[case.dtype]
        given = self._torch.from_numpy(buffers.input).view(dtype)
        taken = self._torch.from_numpy(buffers.output).view(dtype)
        if case.op == "all_reduce":
            return lambda: dist.all_reduce(given, group=group)
        if case.op == "broadcast":
            return lambda: dist.broadcast(given, 0, group=group)
        if case.op == "all_gather":
            return lambda: dist.all_gather_into_tensor(taken, given, group=group)
        if case.op == "all_to_all":
            return lambda: dist.all_to_all_single(taken, given, group=group)
        if case.op == "reduce_scatter":
            return lambda: dist.reduce_scatter_tensor(taken, given, group=group)
        partner = self.rank ^ 1
        if partner >= self.size:
            return lambda: None
        if self.rank < partner:
            return lambda: (dist.send(given, partner, group=group), dist.recv(taken, partner, group=group))
        return lambda: (dist.recv(taken, partner, group=group), dist.send(taken, partner, group=group))


def begin_torch(rank: int, size: int, port: int) -> Callable[[bytes | None], bytes]:
    """Joins torch.distributed by the store that the launcher keeps; returns an exchange of texts over that store."""
    import datetime

    import torch
    from torch import distributed

    import torch_sluice_backend

    torch_sluice_backend.register()  # an installed one has been found by torch already
    torch.set_num_threads(1)
    store = distributed.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=datetime.timedelta(minutes=5)
    )

    def exchange_text(text: bytes | None) -> bytes:
        if text is not None:
            store.set("benchmark/handle", text)
        return store.get("benchmark/handle")

    return exchange_text

"""Makes process groups: by the functions of libsluice_c10d.so, which are plain C, and the other backends that it needs.

Objects of c10d go to and fro under a name in torch's own registry of process groups.
"""

import ctypes
import functools
import itertools
from dataclasses import fields

import torch
from torch import distributed
from torch._C._distributed_c10d import _register_process_group, _resolve_process_group, _unregister_process_group
from torch.distributed import distributed_c10d

from torch_sluice import _library
from torch_sluice.parallel import build, tuning

_ERROR_BYTES = 4096
_ERRORS = {1: distributed.DistBackendError, 2: distributed.DistStoreError}
_numbers = itertools.count()

_FACTORY = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_size_t
)


def create(options) -> distributed_c10d.Backend:
    """The backend for the group that torch's ``_DistributedBackendOptions`` describe. All its ranks call this."""
    library = load_library()
    ranks = list(options.global_ranks_in_group)
    name = f"sluice/new/{next(_numbers)}"
    group = distributed.ProcessGroup(options.store, options.group_rank, options.group_size)
    error = ctypes.create_string_buffer(_ERROR_BYTES)
    _register_process_group(name, group)
    try:
        code = library.sluice_c10d_create(
            name.encode(),
            str(options.group_id).encode(),
            round(options.timeout.total_seconds() * 1000),
            (ctypes.c_int64 * len(ranks))(*ranks),
            len(ranks),
            error,
            _ERROR_BYTES,
        )
    finally:
        _unregister_process_group(name)
    if code:
        raise _ERRORS[code](error.value.decode(errors="replace"))
    return group._get_backend(torch.device("cpu"))


@functools.cache
def load_library() -> ctypes.CDLL:
    """The functions of libsluice_c10d.so, ready for use."""
    _library.load()  # libsluice_torch.so, which holds the C core
    library = ctypes.CDLL(str(build.library()))
    text = ctypes.c_char_p
    library.sluice_c10d_create.argtypes = [
        *(text, text, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64), ctypes.c_size_t, text, ctypes.c_size_t)
    ]
    library.sluice_c10d_read_statistics.argtypes = [ctypes.POINTER(ctypes.c_uint64)]
    library.sluice_c10d_set_factory.argtypes = [_FACTORY]
    library.sluice_c10d_set_factory(_make_other_backend)
    library.sluice_c10d_set_tuning.argtypes = [ctypes.c_int, *[ctypes.c_size_t] * len(fields(tuning.Tuning))]
    tuning.apply_tunings(library)
    return library


def loaded_library():
    """libsluice_c10d.so as ctypes sees it, or None in a process that has made no group with it."""
    return load_library() if load_library.cache_info().currsize else None


# Called from C++ by whichever thread first needs it; torch keeps it alive as long as this module.
@_FACTORY
def _make_other_backend(kind, name, timeout_ms, error, error_bytes):
    try:
        group = _resolve_process_group(name.decode())
        backend = _other_backend(kind.decode(), group, timeout_ms)
        device = torch.device("cuda" if kind == b"nccl" else "cpu")
        group._register_backend(device, distributed.ProcessGroup.BackendType.CUSTOM, backend)
        return 0
    except Exception as problem:
        text = f"the backend {kind.decode()}, which this call needs, can't be made: {problem}"
        ctypes.memmove(error, text.encode()[: error_bytes - 1] + b"\0", min(len(text.encode()) + 1, error_bytes))
        return 1


def _other_backend(kind, group, timeout_ms):
    options = distributed_c10d._DistributedBackendOptions()
    options.store = group.get_group_store()
    options.group_rank, options.group_size = group.rank(), group.size()
    options.timeout = distributed_c10d.timedelta(milliseconds=timeout_ms)
    options.group_id = f"{kind} of sluice"
    # Torch 2.14 makes its own backends the way it makes others.
    if hasattr(distributed.Backend, "_ensure_backend_registered"):
        distributed.Backend._ensure_backend_registered(kind)
    plugin = distributed.Backend._plugins.get(kind.upper())
    if plugin is not None:
        return plugin.creator_fn(options, None)
    if kind == "gloo":
        if not distributed.is_gloo_available():
            raise RuntimeError("this build of torch has no Gloo, which groups of several hosts need")
        gloo = distributed_c10d.ProcessGroupGloo
        return gloo(options.store, options.group_rank, options.group_size, timeout=options.timeout)
    if not distributed.is_nccl_available():
        raise RuntimeError("this build of torch has no NCCL, which CUDA tensors need")
    nccl_options = distributed_c10d.ProcessGroupNCCL.Options()
    nccl_options._timeout = options.timeout
    return distributed_c10d.ProcessGroupNCCL(options.store, options.group_rank, options.group_size, nccl_options)

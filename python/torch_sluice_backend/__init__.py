"""Makes the process-group backend known to torch.distributed by its name: ``init_process_group("sluice")``.

Torch calls this at the end of ``import torch``, by the entry point ``torch.backends``; from torch 2.14 on also when the
name is first asked for, by ``torch.distributed.backends``. So it is a package of its own that imports nothing but what
torch has imported by then. Everything else is loaded when the first group is made.
"""

_NAME = "sluice"


def register() -> None:
    """Registers the backend; a second call does nothing."""
    from torch import distributed

    if not distributed.is_available() or _NAME.upper() in distributed.Backend._plugins:
        return
    defaults = distributed.Backend.default_device_backend_map
    before = dict(defaults)
    distributed.Backend.register_backend(_NAME, _create, extended_api=True, devices=["cpu", "cuda"])
    # Registering may have made it the default of devices that had none so far. Whoever wants it says so.
    defaults.clear()
    defaults.update(before)


def _create(options, backend_options):
    from torch_sluice.parallel.backend import create

    return create(options)

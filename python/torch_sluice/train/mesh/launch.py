"""Starts the ranks of a run on this machine, passes Ctrl-C on to them, and leaves none behind."""

import os
import signal
import sys

import torch
from torch import distributed, multiprocessing

from torch_sluice.train.errors import TrainError
from torch_sluice.train.loop import StopRequest

_STARTED_HERE = "TORCH_SLUICE_STARTED_RANKS"
_GRACE_SECONDS = 60.0  # for ranks to end once another has failed
# Ranks are forked from a process that has imported these: each by itself would take seconds of a processor.
_PRELOADED = ["torch_sluice.train.mesh.main", "transformers.models.llama.modeling_llama"]


def is_rank() -> bool:
    """Whether this process is one rank of a job: of torchrun's, or of ``start_ranks``."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def was_started_here() -> bool:
    """Whether ``start_ranks`` of another process started this rank; that process holds the folder."""
    return _STARTED_HERE in os.environ


def start_ranks(arguments: list[str], ranks: int) -> bool:
    """Runs ``torch-sluice ARGUMENTS`` on every rank to its end. Returns whether it was asked to stop before that.

    Raises:
        TrainError: a rank failed; the others have been ended.
    """
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        _STARTED_HERE: "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here, and no rank has to make one
    }
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    with StopRequest() as stop:
        job = multiprocessing.start_processes(
            _run_rank, (arguments, shared), nprocs=ranks, join=False, start_method="forkserver"
        )
        try:
            told = False
            while not job.join(timeout=0.2, grace_period=_GRACE_SECONDS):
                if stop.requested and not told:
                    told = True
                    for process in job.processes:
                        process.terminate()
        except (multiprocessing.ProcessExitedException, multiprocessing.ProcessRaisedException) as error:
            if told:  # before it trained
                return True
            raise TrainError(f"rank {error.error_index} {_describe(error)}, and all ranks were ended") from None
        finally:
            for process in job.processes:
                if process.is_alive():
                    process.kill()
                process.join()
    return told


def _describe(error) -> str:
    code = getattr(error, "exit_code", 1)
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"failed with exit code {code}"


def _run_rank(rank: int, arguments: list[str], shared: dict[str, str]) -> None:
    os.setsid()  # Ctrl-C in the terminal reaches the process that started this one, which passes it on
    os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
    from torch_sluice.cli import main

    sys.exit(main(arguments))


def choose_threads(threads: int) -> None:
    """As many as are asked for; 0: what the processor has, divided by the ranks of this machine."""
    if not threads:
        threads = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(threads)


def join_group(backend: str, ranks: int) -> None:
    """Makes the default process group."""
    if int(os.environ["WORLD_SIZE"]) != ranks:
        raise TrainError(f"--mesh has {ranks} ranks, expected as many as were started: {os.environ['WORLD_SIZE']}")
    import torch_sluice  # noqa: F401 (registers the backend)

    distributed.init_process_group(backend)


def was_restarted() -> bool:
    """Whether torchrun has started this job again, after a rank had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0

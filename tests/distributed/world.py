"""Cases that run in several processes at once, on the gloo backend."""

from __future__ import annotations

import faulthandler
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

import xattn_kernels

RANKS = 4
TIMEOUT = timedelta(seconds=60)
"""Of one collective, such as one that another rank does not take part in."""

GRACE = 5.0
"""Seconds that ranks have left after one of them failed."""

Case = Callable[[], None]


LIMIT = 240.0
"""Seconds after which a rank shows where it is, and ends."""

PYTEST_LIMIT = 2 * LIMIT


def run(cases: Sequence[Case]) -> list[str]:
    """Run functions one after the other on `RANKS` processes; return what failed, with tracebacks.

    A rank stops at its first failure; the others, which may wait for it, are killed soon after.
    """
    context = torch.multiprocessing.get_context("spawn")
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        address = f"file://{folder}/rendezvous"
        processes, pipes = [], {}
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, address, cases, theirs))
            process.start()
            theirs.close()
            processes.append(process)
            pipes[ours] = rank
        end = time.monotonic() + LIMIT + GRACE
        while pipes:
            ready = wait(list(pipes), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                failures += [f"rank {rank}: no answer" for rank in pipes.values()]
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = pipes.pop(pipe)
                try:
                    failures += [f"rank {rank}: {text}" for text in pipe.recv()]
                except EOFError:
                    failures.append(f"rank {rank}: died")
                if failures:
                    end = min(end, time.monotonic() + GRACE)
        for process in processes:
            process.join(timeout=5 if not pipes else 0)
            if process.is_alive():
                process.kill()
                process.join()
    return failures


def _work(rank: int, address: str, cases: Sequence[Case], answer: Any) -> None:
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory starts as NaN
    failures = []
    dist.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=RANKS, timeout=TIMEOUT
    )
    for case in cases:
        try:
            torch.manual_seed(0)  # the same on all ranks
            with xattn_kernels.backend("reference"):
                case()
        except Exception:
            failures.append(f"{case}\n{traceback.format_exc()}")
            break
    answer.send(failures)
    if not failures:
        dist.barrier()
        dist.destroy_process_group()
    os._exit(0)  # a broken group may wait for others when it is destroyed

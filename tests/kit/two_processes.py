"""What the tests of distributed losses share: run a function in two gloo processes."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _worker(rank, compute, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    try:
        torch.save(compute(rank), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def in_two_processes(compute, folder):
    """Return ``compute(0)`` and ``compute(1)``, each from a process of its own in one group.

    Args:
        compute: a function of a test file; what it returns must be what ``torch.load`` takes.
        folder: an empty folder.
    """
    mp.spawn(_worker, args=(compute, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]

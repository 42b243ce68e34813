"""How the processes of a run find each other."""

import os
from datetime import timedelta

import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from entroformer_lib.errors import TrainingError


def machines() -> int:
    """How many machines a run has that torchrun or Slurm started; 1 for any other."""
    if TorchElasticEnvironment.detect():
        return int(os.environ["GROUP_WORLD_SIZE"])
    return int(os.environ["SLURM_NNODES"]) if SLURMEnvironment.detect() else 1


def meet(fabric: Fabric, seconds: float) -> None:
    """Connects the processes that torchrun or Slurm started. What Fabric starts itself (--devices) it also connects.

    Two things are better here than in `init_process_group` alone. A process that never comes is named after a stated
    time. And each restart of torchrun meets under a name of its own: the store of torchrun outlives the processes, so
    that a new one can read the address of one that is gone, and is refused.

    Args:
        seconds: how long each process waits for the others.

    Raises:
        TrainingError: some did not come.
    """
    around = getattr(fabric.strategy, "cluster_environment", None)
    if not isinstance(around, TorchElasticEnvironment | SLURMEnvironment) or around.world_size() == 1:
        return
    rank, count, wait = around.global_rank(), around.world_size(), timedelta(seconds=seconds)
    host, port = around.main_address, around.main_port
    kept_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        first = rank == 0 and not kept_by_torchrun
        store = dist.TCPStore(host, port, None, is_master=first, timeout=wait, wait_for_workers=False)
    except dist.DistError:
        raise TrainingError(f"Process 0 of {count} did not answer at {host}:{port} within {seconds:g} s.") from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt {attempt}", store)
    store.set(f"here {rank}", "yes")
    try:
        store.wait([f"here {r}" for r in range(count)], wait)
    except dist.DistError:
        late = [str(r) for r in range(count) if not store.check([f"here {r}"])]
        raise TrainingError(
            f"Of {count} processes, these did not come within {seconds:g} s: {', '.join(late)}."
        ) from None
    store.set_timeout(dist.default_pg_timeout)
    dist.init_process_group(store=store, rank=rank, world_size=count)

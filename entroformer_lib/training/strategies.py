"""How the processes of a run share its model.

`ddp`: each process has the whole model, and gradients are averaged. `fsdp`: each has a part of every weight, of its
gradient and of what the optimizer keeps of it; a block of the network is put together while it is computed. The second
is for models that do not fit, and costs more communication. Checkpoints hold whole tensors in either case, so that any
number of processes reads them with either strategy.
"""

import torch
from lightning.fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from entroformer_lib.models.attention import Block
from entroformer_lib.models.groupedmixer import MixerPair
from entroformer_lib.models.transforms import Analysis, ConvBlock, Synthesis

# What is put together, computed, and taken apart again. The rest of the network is whole during a step.
UNITS = (Block, MixerPair, ConvBlock, Analysis, Synthesis)


def strategy_of(name: str) -> str | ModelParallelStrategy:
    """`ddp` or `fsdp` as Fabric takes it. (Its own FSDPStrategy is the older one, which refuses the CPU.)"""
    return "auto" if name == "ddp" else Sharding()


class Sharding(ModelParallelStrategy):
    """FSDP over all processes, whatever their number."""

    def __init__(self):
        super().__init__(sharded, tensor_parallel_size=1)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def sharded(module: nn.Module, mesh) -> nn.Module:
    """The module, with a part of every weight in each process."""
    for part in reversed(list(module.modules())):  # from the inside out
        if isinstance(part, UNITS):
            fully_shard(part, mesh=mesh["data_parallel"])
    return fully_shard(module, mesh=mesh["data_parallel"])


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, put together from the parts that the processes have; all of them must call this. Other
    tensors as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def collected(state, here: bool):
    """A state whose tensors are whole, for a file. Tensors in parts are put together one after the other, and kept, on
    the CPU, only where `here` is true. All processes must call this."""

    def one(value):
        if not isinstance(value, DTensor):
            return value
        tensor = value.full_tensor()
        return tensor.cpu() if here else None

    return tree_map(one, state)


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor of which this process keeps the same part as of a parameter."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def model_state(model: nn.Module, state: dict) -> dict:
    """A whole state as `load_state_dict` of the model takes it."""
    own = model.state_dict()
    return {name: like(value, own[name]) if name in own else value for name, value in state.items()}


def optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """The same for an optimizer."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [i for group in state["param_groups"] for i in group["params"]]
    owners = dict(zip(numbers, parameters, strict=True))
    parts = {
        i: {name: like(v, owners[i]) if torch.is_tensor(v) else v for name, v in values.items()}
        for i, values in state["state"].items()
    }
    return {**state, "state": parts}

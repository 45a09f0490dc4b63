"""How modules are wrapped, losses are differentiated and processes are counted: Accelerate, and nothing else.

Today's engine is DDP (or a single process). Every player has its own wrapper, so that the one that is active
is the only one whose gradients are reduced.
"""

import inspect
import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from ppreid_dist import distributed
from ppreid_dist.errors import ConfigError
from ppreid_dist.models.batchnorm import convert_batchnorm
from ppreid_dist.settings import Settings, option

_DDP_OPTIONS = inspect.signature(nn.parallel.DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_OPTIONS else "broadcast_buffers"  # torch 2.13


@dataclass(kw_only=True)
class EngineConfig(Settings):
    precision: str = option(
        "no",
        "bf16 runs the models under autocast; parameters, statistics and closed forms stay fp32",
        choices=("no", "bf16"),
    )
    timeout: float = option(
        1800.0, "seconds after which a process that waits for another gives it up; a probe must end sooner", more_than=0
    )
    trackers: list[str] = option(
        [], "besides metrics.jsonl: these trackers, through Accelerate (extra: track)", choices=("tensorboard", "wandb")
    )


class Engine:
    """One process's hold on the group: device, precision, wrapping and backward."""

    def __init__(self, config: EngineConfig, *, run_folder: Path, loggers: Sequence[Any] = ()):
        expected = int(os.environ.get("WORLD_SIZE", "1"))
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision=config.precision,
            log_with=list(loggers) or None,
            project_dir=str(run_folder),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout))],
        )
        if self.accelerator.num_processes != expected or distributed.world_size() != expected:
            raise ConfigError(
                f"WORLD_SIZE: the launcher started {expected} processes but Accelerate sees "
                f"{self.accelerator.num_processes}; on CPU use `accelerate launch --multi_gpu --num_processes N`"
            )

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def autocast(self) -> AbstractContextManager[None]:
        return self.accelerator.autocast()

    def place(self, module: nn.Module) -> nn.Module:
        """The module on this process's device, its BatchNorm synchronised when several processes train.

        Channels last: tensor cores want it, and on CPUs MobileNetV2's training is half as fast again by it.
        """
        return convert_batchnorm(module.to(self.device, memory_format=torch.channels_last))  # type: ignore[call-overload]

    def wrap(self, module: nn.Module) -> nn.Module:
        """What the active player's forward must be called through. Frozen players are called bare."""
        if distributed.world_size() == 1:
            return module
        devices = [self.device.index] if self.device.type == "cuda" else None
        # Buffers are equal on all ranks, since BatchNorm is synchronised: broadcasting them would be wasted.
        buffers: dict[str, Any] = {_SYNC_BUFFERS: False}
        # A Linear of one output has a gradient of other strides in an axis of length 1, which costs nothing.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        return nn.parallel.DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True, **buffers)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """End the trackers, and forget Accelerate's global state: a process may train again, otherwise."""
        self.accelerator.end_training()
        AcceleratorState._reset_state()

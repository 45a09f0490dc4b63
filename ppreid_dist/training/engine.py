"""How modules are wrapped, losses are differentiated and processes are counted: Accelerate, and nothing else.

An :class:`Engine` is a process's hold on the group; what it takes over it holds by ``training.held``. Here is the one
for DDP and for a single process; ``training.zero`` has DeepSpeed's ZeRO. Every player has its own wrapper and
optimiser, so that the one that is active is the only one whose gradients are reduced.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import nn

from ppreid_dist import distributed
from ppreid_dist.errors import ConfigError, MissingExtra, RunError
from ppreid_dist.models.batchnorm import convert_batchnorm
from ppreid_dist.settings import Settings, option
from ppreid_dist.training.finite import FiniteWatch
from ppreid_dist.training.held import Held, Split, Whole
from ppreid_dist.training.launcher import KINDS, PRECISIONS, Launched, meet_again
from ppreid_dist.training.optimiser import OptimiserConfig
from ppreid_dist.transfer import exact_products


@dataclass(kw_only=True)
class EngineConfig(Settings):
    kind: str = option(
        "auto",
        "how processes share a player: ddp (each has all of it), or DeepSpeed's zero1 (each has part of the moments), "
        "zero2 (of the gradients, too), zero3 (of the weights, too); auto takes the launcher's word, else ddp",
        choices=("auto", *KINDS),
    )
    precision: str = option(
        "auto",
        "bf16 runs the models under autocast; parameters, statistics and closed forms stay fp32; auto takes the "
        "launcher's word, else no",
        choices=("auto", *PRECISIONS),
    )
    compile: str = option(
        "no",
        "torch.compile of each player's forward, by this backend (under ddp; not of a critic under R1, which is "
        "differentiated twice); reduce-overhead is inductor with CUDA graphs, for one process",
        choices=("no", "inductor", "reduce-overhead", "aot_eager"),
    )
    accumulate: int = option(
        0,
        "pieces in which a process's pictures pass the extractor's backbone, one after another: less memory, a forward "
        "more of time, the same gradient; not for a backbone with batch norm; 0 takes the launcher's "
        "gradient_accumulation_steps, else 1",
        at_least=0,
    )
    gradient_checkpointing: bool = option(
        False,
        "the extractor's blocks make their activations again in the backward: less memory, a forward more of time, the "
        "same gradient; not compiled",
    )
    timeout: float = option(
        1800.0, "seconds after which a process that waits for another gives it up; a probe must end sooner", more_than=0
    )
    trackers: list[str] = option(
        [], "besides metrics.jsonl: these trackers, through Accelerate (extra: track)", choices=("tensorboard", "wandb")
    )

    def __post_init__(self) -> None:
        for key in ("precision", "compile"):
            if getattr(self, key) == "False":
                setattr(self, key, "no")  # YAML reads a bare no as false
        super().__post_init__()


def check_gpus(kind: str) -> None:
    """ConfigError where this machine's processes have too few GPUs for an engine of this ``kind``."""
    here = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1 + int(os.environ.get("LOCAL_RANK", "0")))
    gpus = torch.cuda.device_count()
    # Each process's own, as Slurm binds them; those of accelerate and torchrun have their launcher's.
    bound = "CUDA_VISIBLE_DEVICES" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    own = gpus == 1 and bound
    if 0 < gpus < here and not own:
        raise ConfigError(
            f"LOCAL_WORLD_SIZE: {here} processes on a machine where {gpus} GPUs are visible; say --num_processes {gpus}"
        )
    if gpus < here and own and kind != "ddp":
        raise ConfigError(f"engine.kind: {kind} counts a machine's GPUs, so each process must see all {here} of them")


class Engine:
    """One process's hold on the group: device, precision, players. This one is DDP's, or a single process's."""

    def __init__(
        self,
        kind: str,
        precision: str,
        *,
        accumulate: int,
        compile: str,
        launched: Launched,
        timeout: float,
        run_folder: Path,
        loggers: Sequence[Any] = (),
    ):
        self.kind, self.precision, self.accumulate, self.compile = kind, precision, accumulate, compile
        self.launched = launched
        expected = int(os.environ.get("WORLD_SIZE", "1"))
        exact_products()
        check_gpus(kind)  # first, since what opens the group by ZeRO fails there in words of its own
        options = self._options(timeout)
        try:
            meet_again(timeout)
            self.accelerator = Accelerator(log_with=list(loggers) or None, project_dir=str(run_folder), **options)
        except dist.DistError as error:
            self.forget()
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            what = " ".join(str(error).split())[:200]
            if "EADDRINUSE" in what:
                raise RunError(f"MASTER_PORT: something else listens at {where}; choose another port") from error
            raise RunError(
                f"WORLD_SIZE: the {expected} processes didn't meet at {where} within {timeout:g} s (engine.timeout): "
                f"{what}"
            ) from error
        seen = self.accelerator.num_processes
        if seen != expected or distributed.world_size() != expected:
            self.forget()
            raise ConfigError(
                f"WORLD_SIZE: the launcher started {expected} processes but Accelerate sees {seen}; on CPU "
                "use `accelerate launch --multi_gpu --num_processes N`"
            )
        if compile == "reduce-overhead" and seen > 1:
            self.forget()
            raise ConfigError(f"engine.compile: {compile} is for one process, not for {seen}; use inductor")
        self.watch = FiniteWatch(self.device)

    def _options(self, timeout: float) -> dict[str, Any]:
        """What Accelerate is to be opened with."""
        return {
            "cpu": not torch.cuda.is_available(),
            "mixed_precision": self.precision,
            "gradient_accumulation_plugin": one_step(),
            "kwargs_handlers": [InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))],
        }

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def place(self, module: nn.Module) -> nn.Module:
        """The module on this process's device, its BatchNorm synchronised when several processes train.

        Channels last: tensor cores want it, and on CPUs MobileNetV2's training is half as fast again by it.
        """
        return convert_batchnorm(module.to(self.device, memory_format=torch.channels_last))  # type: ignore[call-overload]

    def hold(self, name: str, module: nn.Module, config: OptimiserConfig, *, twice: bool = False) -> Held:
        """Take a player's module over, for good: placed, wrapped, with an optimiser.

        ``twice`` says that a loss holds a gradient of the module, so that it is differentiated twice.
        """
        return Whole(name, self.place(module), config, compile="no" if twice else self.compile, **self._how())

    def hold_split(self, name: str, module: nn.Module, config: OptimiserConfig, *, rows: int) -> Held:
        """Take over a module whose parameters are this process's share of ``rows`` rows."""
        return Split(name, module.to(self.device), config, rows=rows, **self._how())

    def _how(self) -> dict[str, Any]:
        return {"backward": self.accelerator.backward, "watch": self.watch}

    def wait(self) -> None:
        """For all processes."""
        if distributed.world_size() > 1:
            # Accelerate would name the GPU by the process's number: a process that sees its own one only hasn't that.
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def close(self) -> None:
        """End the trackers and the group; this process may train again."""
        self.accelerator.end_training()
        self.forget()

    def forget(self) -> None:
        """Drop Accelerate's global state, and nothing that would wait for a process that may be lost."""
        AcceleratorState._reset_state()


def one_step() -> GradientAccumulationPlugin:
    """For Accelerate, which would otherwise divide losses by the launcher's number: a step is one backward here."""
    return GradientAccumulationPlugin(num_steps=1)


def open_engine(config: EngineConfig, *, run_folder: Path, loggers: Sequence[Any] = ()) -> Engine:
    """The engine that configuration and launcher agree on. ConfigError where they contradict each other."""
    launched = Launched.read()
    kind, precision, accumulate = launched.agreed(config.kind, config.precision, config.accumulate)
    if accumulate > 1 and config.compile != "no":
        raise ConfigError(f"engine.accumulate: {accumulate} isn't compiled; use engine.compile=no")
    if config.gradient_checkpointing and config.compile != "no":
        raise ConfigError("engine.gradient_checkpointing: isn't compiled; use engine.compile=no")
    made = Engine
    if kind != "ddp":
        if find_spec("deepspeed") is None:
            raise MissingExtra(f"engine.kind={kind}", "deepspeed")
        if config.compile != "no":
            raise ConfigError(f"engine.compile: {config.compile} is for engine.kind=ddp, not for {kind}")
        from ppreid_dist.training.zero import ZeroEngine

        made = ZeroEngine
    return made(
        kind,
        precision,
        accumulate=accumulate,
        compile=config.compile,
        launched=launched,
        timeout=config.timeout,
        run_folder=run_folder,
        loggers=loggers,
    )

"""DeepSpeed's ZeRO through Accelerate: each process keeps a part of the moments (stage 1), of the gradients too (2), of
the weights too (3).

Learnt by trying, and held by tests/test_engines.py:
- Accelerate takes one model an ``Accelerator`` under DeepSpeed, so every player has its own, and its own plugin.
- Without ``backend="gloo"`` it trains one process on every rank where there is no GPU, and says nothing.
- A torch optimiser goes in, so none of DeepSpeed's is compiled; its shared-memory collective still is, at first use.
"""

import copy
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.utils.cpp_extension import get_default_build_root

from ppreid_dist import distributed
from ppreid_dist.errors import ConfigError
from ppreid_dist.kernels import choice
from ppreid_dist.models.batchnorm import convert_batchnorm
from ppreid_dist.training.engine import Engine, one_step
from ppreid_dist.training.finite import FiniteWatch
from ppreid_dist.training.held import Held
from ppreid_dist.training.optimiser import OptimiserConfig, make_optimiser

_log = logging.getLogger(__name__)
_MOMENTS = ("exp_avg", "exp_avg_sq")
_FLAG = "ACCELERATE_USE_DEEPSPEED"
_BUCKET = 500_000_000  # DeepSpeed's own default


class _Plugin(DeepSpeedPlugin):
    def _deepspeed_config_checks(self) -> None:
        """Nothing: `training.launcher` has looked at the launcher's flags, which Accelerate wants absent here."""

    def set_deepspeed_weakref(self) -> None:
        """Nothing: transformers would be told of stage 3, and make every backbone in parts from then on."""


def zero_optimization(said: Mapping[str, Any], stage: int, elements: int) -> dict[str, Any]:
    """DeepSpeed's settings of that name for a player of so many trainable elements; ``said`` is the user's file's.

    Gradients are reduced in a buffer of ``reduce_bucket_size`` elements, which stage 3 keeps for good: by DeepSpeed's
    default 2 GB for each player, so it gets no more than the player fills, unless the file asks for a size.
    """
    settings = {**said, "stage": stage}
    if settings.get("reduce_bucket_size", "auto") == "auto":
        settings["reduce_bucket_size"] = min(_BUCKET, elements)
    return settings


def name_locks() -> None:
    """Where a compilation is under way, or was killed, say so: torch waits at its lock for ever, and silently."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in sorted([*root.glob("deepspeed*/lock"), *root.glob("*/deepspeed*/lock")]):
        _log.warning("%s: waiting for whoever compiles it; if nobody does any more, remove this file", lock)


class ZeroEngine(Engine):
    """One process's hold on a group that trains by ZeRO."""

    @property
    def stage(self) -> int:
        return int(self.kind.removeprefix("zero"))

    def _options(self, timeout: float) -> dict[str, Any]:
        if "LOCAL_RANK" not in os.environ:
            raise ConfigError(
                f"engine.kind: {self.kind} shares players over processes, but nothing has launched any; use "
                f"`accelerate launch` or torchrun, or engine.kind=ddp"
            )
        self._flag = os.environ.get(_FLAG)
        warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)  # DeepSpeed's own calls
        backend = {} if torch.cuda.is_available() else {"backend": "gloo"}
        if backend and os.environ["LOCAL_RANK"] == "0":
            name_locks()
        if not re.fullmatch(r"[\d,]*", os.environ.get("CUDA_VISIBLE_DEVICES", "")):
            # Of GPUs that are named otherwise (GPU-…, MIG-…) it asks NVML by numbers, and fails; without it, torch.
            from deepspeed.accelerator import cuda_accelerator

            cuda_accelerator.pynvml = None
        return {
            "deepspeed_plugins": {"": self._plugin(self.stage, 0.0, _BUCKET)},  # of no player
            "gradient_accumulation_plugin": one_step(),
            "kwargs_handlers": [InitProcessGroupKwargs(timeout=timedelta(seconds=timeout), **backend)],
        }

    def _plugin(self, stage: int, clip: float, elements: int) -> DeepSpeedPlugin:
        said = copy.deepcopy(self.launched.deepspeed)
        settings = said | {
            "zero_optimization": zero_optimization(said.get("zero_optimization", {}), stage, elements),
            # The size of the batch serves DeepSpeed's clock only.
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": 1,
            # That waits for the GPU at every forward and step.
            "timers": said.get("timers", {"throughput": {"enabled": False}}),
            "gradient_accumulation_steps": 1,
            "gradient_clipping": clip,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            # Autocast leaves weights and BatchNorm's statistics in fp32, which DeepSpeed's own bf16 would not. No layer
            # counts as "safe": the gradients of such are summed over processes in bf16.
            "torch_autocast": {
                "enabled": self.precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": [],
            },
        }  # fmt: skip
        return _Plugin(hf_ds_config=settings, zero3_init_flag=False)

    def place(self, module: nn.Module) -> nn.Module:
        # Not channels last, as elsewhere: DeepSpeed lays all weights end to end, and can't send any that lie otherwise.
        return convert_batchnorm(module.to(self.device))

    def hold(self, name: str, module: nn.Module, config: OptimiserConfig, *, twice: bool = False) -> Held:
        clip = self.launched.deepspeed.get("gradient_clipping", "auto")
        if clip != "auto" and float(clip) != config.clip:
            raise ConfigError(
                f"optimiser.clip: {config.clip} for the {name}, but the launcher's gradient_clipping is {clip}"
            )
        state = self.accelerator.state
        key = f"{len(state.deepspeed_plugins)} {name}"
        # Stage 3 takes a layer's weights away after its gradient, and fails where that gradient is differentiated.
        stage = min(2, self.stage) if twice else self.stage
        elements = sum(p.numel() for p in module.parameters() if p.requires_grad)
        state.deepspeed_plugins[key] = self._plugin(stage, config.clip, elements)
        state.select_deepspeed_plugin(key)
        return _Partitioned(name, self.place(module), config, stage=stage, watch=self.watch)

    def hold_split(self, name: str, module: nn.Module, config: OptimiserConfig, *, rows: int) -> Held:
        raise ConfigError(f"identity.head: a split head trains under engine.kind=ddp, not under {self.kind}")

    def forget(self) -> None:
        super().forget()
        if self._flag is None:  # Accelerate set it, and would take it for the launcher's word next time
            os.environ.pop(_FLAG, None)


class _Partitioned(Held):
    """A player of which every process has a part."""

    parameters: list[Any]  # to which DeepSpeed adds attributes

    def __init__(self, name: str, module: nn.Module, config: OptimiserConfig, *, stage: int, watch: FiniteWatch):
        super().__init__(name, module, config)
        self._partitioned, self._watch = stage == 3, watch
        self._device = next(module.parameters()).device
        # What DeepSpeed has taken over can't be copied: it holds hooks, groups and, in stage 3, empty weights.
        self._shape = copy.deepcopy(module).to("meta")
        self._accelerator = Accelerator(gradient_accumulation_plugin=one_step())
        try:
            self.forward, _ = self._accelerator.prepare(module, make_optimiser(self.parameters, config))
        except ValueError as error:  # how Accelerate and DeepSpeed refuse a setting
            raise ConfigError(f"DeepSpeed's settings: {' '.join(str(error).split())}") from error
        self._zero = self.forward.optimizer
        self._steps = 0
        self._fused = choice.of("adam", self._device).implementation == "fused"

    def step(self, loss: Tensor, lr: float, beside: Sequence[Held] = ()) -> Tensor:
        # DeepSpeed's own engine, since Accelerate's backward would step and hide how that went: DeepSpeed looks at the
        # norm of the reduced gradient, the same on every rank, and if it isn't finite leaves all as it was, silently.
        for group in self._zero.param_groups:
            group["lr"] = lr
        self.forward.backward(loss)
        self.forward.step()
        if not self.forward.was_step_applied():
            raise self._watch.failure(self.name)
        self._steps += 1
        return torch.as_tensor(self.forward.get_global_grad_norm())

    def weights(self, *, to_save: bool = False) -> Mapping[str, Tensor]:
        if not self._partitioned:
            return self.module.state_dict()
        with self._gathered():
            if to_save and distributed.rank() > 0:
                return {}
            return {
                key: tensor.detach().to("cpu" if to_save else tensor.device, copy=True)
                for key, tensor in self.module.state_dict().items()
            }

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        with self._gathered(modifier_rank=0):
            self.module.load_state_dict(state)
        self._zero.refresh_fp32_params()

    def _gathered(self, modifier_rank: int | None = None) -> AbstractContextManager[None]:
        """Within it the module is whole; nothing happens where it is so anyway."""
        import deepspeed

        everything = list(self.module.parameters())
        return deepspeed.zero.GatheredParameters(everything, modifier_rank, enabled=self._partitioned)

    def moments(self) -> dict[str, dict[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state as full

        if not self._steps:
            return {}
        with self._trainable():
            return {
                str(number): {"step": torch.tensor(float(self._steps))} | {key: full(p, key).cpu() for key in _MOMENTS}
                for number, p in enumerate(self.parameters)
            }

    def load_moments(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not saved:
            return
        self._steps = int(next(iter(saved.values()))["step"])
        # Adam makes its state in the first step, and there is nothing to write into before. What is there already stays
        # where it is: DeepSpeed gives each parameter a view of it, once and for all.
        for flat in self._flat:
            known = self._zero.optimizer.state[flat]
            # Torch's fused form counts on the weights' device.
            known["step"] = torch.tensor(float(self._steps), device=flat.device if self._fused else None)
            for key in _MOMENTS:
                known.setdefault(key, torch.zeros_like(flat))
        if not self._partitioned:
            self._zero._lazy_init_hp_params_optimizer_state()
        with self._trainable():
            for number, parameter in enumerate(self.parameters):
                for key in _MOMENTS:
                    whole = saved[str(number)][key].to(self._device)
                    if self._partitioned:
                        # Not the full one, which fails where the processes don't share a parameter evenly.
                        safe_set_local_optimizer_state(parameter, _part(whole, parameter.ds_tensor.numel()), key)
                    else:
                        safe_set_full_optimizer_state(parameter, whole, key)

    @property
    def _flat(self) -> list[Tensor]:
        """This process's part of the weights, as the optimiser sees it."""
        if self._partitioned:
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)

    @contextmanager
    def _trainable(self) -> Iterator[None]:
        """DeepSpeed has no moments to show of a parameter that is frozen for the moment."""
        before = [p.requires_grad for p in self.parameters]
        for p in self.parameters:
            p.requires_grad_(True)
        try:
            yield
        finally:
            for p, was in zip(self.parameters, before, strict=True):
                p.requires_grad_(was)

    @torch.no_grad()
    def copy(self) -> Any:
        twin = copy.deepcopy(self._shape).to_empty(device=self._device)
        twin.load_state_dict(self.weights())
        for into, buffer in zip(twin.buffers(), self.module.buffers(), strict=True):  # some are not in the state
            into.copy_(buffer)
        return twin.eval().requires_grad_(False)

    def alone(self) -> Any:
        return self.copy() if self._partitioned else self.module


def _part(whole: Tensor, size: int) -> Tensor:
    """This process's ``size`` elements of a tensor that all of them share, the last one's filled up with zeros."""
    flat = whole.flatten()
    flat = nn.functional.pad(flat, (0, size * distributed.world_size() - len(flat)))
    return flat[distributed.rank() * size :][:size]

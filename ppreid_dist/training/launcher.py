"""What `accelerate launch` says by its environment: the engine, the precision and DeepSpeed's settings.

A user's own `accelerate config` file arrives here. Nothing of it is dropped silently: what can't be done is refused.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ppreid_dist.errors import ConfigError, DataError
from ppreid_dist.files import read_json

KINDS = ("ddp", "zero1", "zero2", "zero3")
PRECISIONS = ("no", "bf16")
_PREFIX = "ACCELERATE_"
_FOREIGN = {"USE_FSDP": "FSDP", "USE_MEGATRON_LM": "Megatron-LM", "USE_PARALLELISM_CONFIG": "a parallelism_config"}
_STEPS = "gradient_accumulation_steps"
_FIELDS = {"zero_stage", "gradient_clipping", _STEPS, "offload_optimizer_device", "offload_param_device"}
_OFFLOADS = ("offload_optimizer", "offload_param")
_Value = TypeVar("_Value", str, int)


@dataclass(frozen=True)
class Launched:
    """``kind``, ``precision`` and ``accumulate`` are None where it doesn't say; ``deepspeed`` is what it says to
    DeepSpeed."""

    kind: str | None = None
    precision: str | None = None
    accumulate: int | None = None
    deepspeed: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> "Launched":
        """Of this process's environment. ConfigError for what no engine here can do."""
        said = {key.removeprefix(_PREFIX): value for key, value in environment.items() if key.startswith(_PREFIX)}
        for flag, what in _FOREIGN.items():
            if said.get(flag, "false").lower() == "true":
                raise ConfigError(
                    f"engine.kind: the launcher says {what}; there are {', '.join(KINDS)}: launch as MULTI_GPU or "
                    f"DEEPSPEED, as the files in configs/accelerate do"
                )
        if (backend := said.get("DYNAMO_BACKEND", "no").lower()) != "no":
            raise ConfigError(
                f"engine.compile: the launcher says {backend}, which isn't followed: launch with --dynamo_backend no "
                f"and choose by engine.compile"
            )
        precision = said.get("MIXED_PRECISION", "no").lower()
        if precision not in PRECISIONS:
            raise ConfigError(f"engine.precision: the launcher says {precision}; there are {', '.join(PRECISIONS)}")
        # The launcher says "no" whether or not its user did.
        found = None if precision == "no" else precision
        if said.get("USE_DEEPSPEED", "false").lower() != "true":
            return cls(precision=found, accumulate=_steps(said.get(_STEPS.upper())))
        deepspeed = _deepspeed(said)
        if "torch_autocast" in deepspeed:
            here = "bf16" if _on(deepspeed, "torch_autocast") else "no"
            if found not in (None, here):
                raise ConfigError(
                    f"engine.precision: the launcher's mixed_precision is {found}, its DeepSpeed settings say {here} "
                    "(torch_autocast.enabled)"
                )
            found = here
        return cls(
            kind=f"zero{deepspeed['zero_optimization']['stage']}",
            precision=found,
            accumulate=_steps(deepspeed.get(_STEPS)),
            deepspeed=deepspeed,
        )

    def agreed(self, kind: str, precision: str, accumulate: int) -> tuple[str, str, int]:
        """``engine.kind``, ``precision`` and ``accumulate``, with `auto` and 0 resolved. ConfigError for a
        contradiction."""
        return (
            _agreed("kind", kind, self.kind, auto="auto", otherwise="ddp"),
            _agreed("precision", precision, self.precision, auto="auto", otherwise="no"),
            _agreed("accumulate", accumulate, self.accumulate, auto=0, otherwise=1),
        )


def _agreed(key: str, configured: _Value, launched: _Value | None, *, auto: _Value, otherwise: _Value) -> _Value:
    if configured == auto:
        return otherwise if launched is None else launched
    if launched not in (None, configured):
        raise ConfigError(
            f"engine.{key}: the configuration says {configured} but the launcher says {launched}; leave it at {auto}, "
            f"or launch without it"
        )
    return configured


def _steps(said: Any) -> int | None:
    """Gradient accumulation as the launcher says it: 1 is its default and contradicts nothing."""
    try:
        steps = 1 if said in (None, "auto") else int(str(said))
    except ValueError:
        steps = 0
    if steps < 1:
        raise ConfigError(f"engine.accumulate: the launcher's {_STEPS} is {said}, not a number from 1 on")
    return steps if steps > 1 else None


def meet_again(timeout: float) -> None:
    """Form the process group where a launcher has started its processes again (``--max_restarts``).

    Its store still holds what those before wrote, and torch 2.13 takes their addresses for the present ones: by
    chance it fails or hangs. Under a name of their own the new ones find each other only. Else Accelerate forms the
    group.
    """
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restart == "0":
        return
    wait = timedelta(seconds=timeout)
    store, rank, processes = next(dist.rendezvous("env://", timeout=wait))
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=dist.PrefixStore(f"restart {restart}", store),
        rank=rank,
        world_size=processes,
        timeout=wait,
    )


def _deepspeed(said: Mapping[str, str]) -> dict[str, Any]:
    """The launcher's DeepSpeed settings, from its JSON file or its flags, checked."""
    if (where := said.get("DEEPSPEED_CONFIG_FILE", "none")) != "none":
        try:
            settings = read_json(Path(where))
        except DataError as error:
            raise ConfigError(str(error)) from None
        if beside := _FIELDS & set(said.get("CONFIG_DS_FIELDS", "").split(",")):
            raise ConfigError(f"{where}: say {', '.join(sorted(beside))} there, not in the launcher's file beside it")
    else:
        where = "the launcher's deepspeed_config"
        offload = {
            f"offload_{what}": {"device": said.get(f"DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none")}
            for what in ("optimizer", "param")
        }
        settings = {
            "zero_optimization": {"stage": int(said.get("DEEPSPEED_ZERO_STAGE", "2")), **offload},
            _STEPS: said.get(_STEPS.upper(), "auto"),
            "gradient_clipping": said.get("GRADIENT_CLIPPING", "auto"),
        }
    for section in ("zero_optimization", "bf16", "fp16", "torch_autocast"):
        if not isinstance(settings, dict) or not isinstance(settings.get(section, {}), dict):
            raise ConfigError(f"{where}: {section}: not a section of settings")
    zero = settings.get("zero_optimization", {})
    for key in _OFFLOADS:
        if zero.get(key, {}) is None:
            del zero[key]  # DeepSpeed's own default, where Accelerate wants a section
        if not isinstance(zero.get(key, {}), dict):
            raise ConfigError(f"{where}: zero_optimization.{key}: not a section of settings")
    for wrong, reason in (
        (zero.get("stage") not in (1, 2, 3), "zero_optimization.stage: 1, 2 or 3 (without ZeRO, launch as MULTI_GPU)"),
        (_on(settings, "bf16"), "bf16: it rounds weights and BatchNorm's statistics; use torch_autocast"),
        (_on(settings, "fp16"), "fp16: there is no loss scaling here; use torch_autocast with bfloat16"),
        (
            _on(settings, "torch_autocast") and settings["torch_autocast"].get("dtype") not in ("bfloat16", "bf16"),
            "torch_autocast.dtype: only bfloat16",
        ),
        (
            "lower_precision_safe_modules" in settings.get("torch_autocast", {}),
            "torch_autocast.lower_precision_safe_modules: gradients are summed over processes in fp32",
        ),
        (
            settings.get("communication_data_type") not in (None, "fp32"),
            "communication_data_type: gradients are summed over processes in fp32",
        ),
        ("amp" in settings, "amp: use torch_autocast"),
        (
            settings.get("compute_grad_norm", True) is not True,
            "compute_grad_norm: by the norm it is seen that a gradient isn't finite",
        ),
        ("optimizer" in settings, "optimizer: every player has its own, see optimiser.name"),
        ("scheduler" in settings, "scheduler: every player has its own, see optimiser.decay"),
        (
            any(settings.get(key, "auto") != "auto" for key in ("train_batch_size", "train_micro_batch_size_per_gpu")),
            "train_batch_size, train_micro_batch_size_per_gpu: auto, since data says it",
        ),
        (not _is_clip(settings.get("gradient_clipping", "auto")), "gradient_clipping: a number, or auto"),
        (
            any(zero.get(key, {}).get("device", "none") != "none" for key in _OFFLOADS),
            "zero_optimization.offload_…: not tried with a GPU, and without one there is nothing to move",
        ),
    ):
        if wrong:
            raise ConfigError(f"{where}: {reason}")
    return settings


def _on(settings: Mapping[str, Any], section: str) -> bool:
    return str(settings.get(section, {}).get("enabled", False)).lower() == "true"


def _is_clip(said: Any) -> bool:
    try:
        return said == "auto" or float(said) >= 0
    except (TypeError, ValueError):
        return False

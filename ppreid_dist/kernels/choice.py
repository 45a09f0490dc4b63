"""Which implementation of an operation runs on a device, and why: the one place that decides.

Asked for nothing ("auto"), an operation takes the first of its implementations, in the order below, that can run: what
measured faster stands before what measured slower, and what nobody has measured isn't taken. NVIDIA Apex and our Triton
kernels are such: they run if asked for by key, until ``tools/bench.py kernels`` shows them faster on a GPU.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

from ppreid_dist.errors import ConfigError
from ppreid_dist.settings import Settings, option

OPERATIONS = ("adam", "clip", "cross_entropy", "ssim", "batch_hard", "nearer")
TILED_FROM = 4096 * 4096  # distances: more than 64 MB of them, and as much again for each mask, isn't held at once
_APEX, _TRITON = "NVIDIA Apex only where asked for", "Triton only where asked for"
# In order of preference; the last one runs anywhere.
_AUTO = {
    "adam": (
        ("fused", f"torch's own, all parameters in one kernel; {_APEX}"),
        ("plain", "torch's loop over the parameters"),
    ),
    "clip": (("foreach", f"torch's own, all gradients in a few kernels; {_APEX}"),),
    "cross_entropy": (("plain", f"torch's own, which smooths labels, too; {_APEX}"),),
    "ssim": (("plain", f"blurring by two small matrix products; {_TRITON}"),),
    "batch_hard": (
        ("plain", f"all distances at once, up to {TILED_FROM:,}; more in tiles; {_TRITON}"),
        ("tiled", f"more than {TILED_FROM:,} distances, never all at once; {_TRITON}"),
    ),
    "nearer": (
        ("screened", "float32 first, whole numbers where that can't tell"),
        ("plain", f"products of whole numbers, sorted into their places; {_TRITON}"),
    ),
}
_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class KernelsConfig(Settings):
    """One key an operation. No result depends on them but by rounding."""

    adam: str = option(
        "auto",
        "the optimisers' step: torch's fused form, its foreach form, its plain loop, or NVIDIA Apex's FusedAdam",
        choices=("auto", "fused", "foreach", "plain", "apex"),
    )
    clip: str = option(
        "auto",
        "the gradient's norm and its clipping: torch's foreach form, its plain loop, or NVIDIA Apex's multi-tensor one",
        choices=("auto", "foreach", "plain", "apex"),
    )
    cross_entropy: str = option(
        "auto", "the identity loss: torch's own, or NVIDIA Apex's xentropy", choices=("auto", "plain", "apex")
    )
    ssim: str = option(
        "auto", "structural similarity: a Triton kernel, or matrix products", choices=("auto", "triton", "plain")
    )
    batch_hard: str = option(
        "auto",
        "the triplets' mining: a Triton kernel or tiles, which never hold all distances, or all of them at once",
        choices=("auto", "triton", "tiled", "plain"),
    )
    nearer: str = option(
        "auto",
        "a ranking's count of nearer items: a Triton kernel that never stores similarities, a screen in float32 on a "
        "CPU, or exact products",
        choices=("auto", "triton", "screened", "plain"),
    )
    strict: bool = option(False, "stop where what one of these keys asks for can't run, instead of taking another")


@dataclass(frozen=True)
class Choice:
    operation: str
    implementation: str
    why: str


_asked, _partitioned = KernelsConfig(), False


@contextmanager
def using(config: KernelsConfig, device: torch.device, *, partitioned: bool = False) -> Iterator[None]:
    """Within it :func:`of` gives what ``config`` asks for, where that can run on ``device``.

    What can't is said in one warning, or is a ConfigError under ``strict``. ``partitioned``: the optimisers' state is
    ZeRO's.
    """
    global _asked, _partitioned
    for operation in OPERATIONS:
        asked = getattr(config, operation)
        reason = "" if asked == "auto" else _why_not(operation, asked, device.type, partitioned)
        if reason and config.strict:
            raise ConfigError(f"kernels.{operation}: {asked} can't run here: {reason}")
        if reason:
            taken = _choose(operation, asked, device.type, False, partitioned).implementation
            _log.warning("kernels.%s: %s can't run here: %s; using %s instead", operation, asked, reason, taken)
    before = _asked, _partitioned
    _asked, _partitioned = config, partitioned
    try:
        yield
    finally:
        _asked, _partitioned = before


def of(operation: str, device: torch.device, *, distances: int = 0) -> Choice:
    """What is chosen for an operation on a device; ``distances`` is how many a mining needs."""
    return _choose(operation, getattr(_asked, operation), device.type, distances > TILED_FROM, _partitioned)


@cache
def _choose(operation: str, asked: str, device: str, large: bool, partitioned: bool) -> Choice:
    refused = ""
    if asked != "auto":
        reason = _why_not(operation, asked, device, partitioned)
        if not reason:
            return Choice(operation, asked, f"asked for by kernels.{operation}")
        refused = f"; {asked}, asked for by kernels.{operation}, can't run here: {reason}"
    passed = ""
    for implementation, why in _AUTO[operation]:
        reason = _why_not(operation, implementation, device, partitioned)
        if reason:
            passed += f"; not {implementation}: {reason}"
        elif not (implementation == "plain" and large):
            return Choice(operation, implementation, why + (refused or passed))
    raise AssertionError(f"nothing runs {operation} on {device}")


def _why_not(operation: str, implementation: str, device: str, partitioned: bool) -> str:
    """Why an implementation can't run on a kind of device; empty where it can."""
    if implementation == "apex":
        if missing := nvidia_apex_lacks(operation):
            return missing
        if device != "cuda":
            return "NVIDIA Apex needs a CUDA device"
        if operation == "adam" and partitioned:
            return "ZeRO keeps its own count of steps, which Apex's FusedAdam can't be given"
    if implementation == "screened" and device != "cpu":
        return "it is for CPUs"
    if implementation == "triton":
        if find_spec("triton") is None:
            return "Triton isn't installed"
        if device != "cuda" and not interpreted():
            return "Triton needs a CUDA device"
        return _triton_fails(device)
    return ""


def nvidia_apex_lacks(operation: str) -> str:
    """What of NVIDIA Apex an operation needs and isn't there; empty where nothing is missing.

    The package of that name on the index is another project: NVIDIA's has compiled parts, each built if asked for.
    """
    if not (find_spec("amp_C") and find_spec("apex")):
        return "NVIDIA Apex isn't installed"
    if operation == "cross_entropy" and not find_spec("xentropy_cuda"):
        return "NVIDIA Apex was built without its xentropy (APEX_XENTROPY=1)"
    return ""


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on any device and slowly; settled before their first import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _triton_fails(device: str) -> str:
    """How a first small kernel fails; empty where it runs. Triton wants a C compiler and a driver that it knows."""
    try:
        from ppreid_dist.kernels.ssim_triton import ssim_map

        x_BCHW = torch.rand(1, 1, 4, 4, device=device)
        if not torch.allclose(ssim_map(x_BCHW, x_BCHW), torch.ones_like(x_BCHW), atol=1e-4):
            return "Triton's first kernel is wrong"
    except Exception as error:  # whatever it is, there is another implementation
        return f"Triton's first kernel failed: {' '.join(str(error).split())[:200] or type(error).__name__}"
    return ""

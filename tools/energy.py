"""Energy that this machine's counters know: the GPU's by NVML, else the CPU packages' by the kernel's powercap."""

from importlib.util import find_spec
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")


def joules() -> float | None:
    """Spent since some moment in the past, the same for all calls; None where it can't be read.

    A package's counter begins anew after some kilojoules (minutes to an hour): a difference may come out negative.
    """
    if torch.cuda.is_available():
        return _gpu()
    try:
        zones = [file.parent for file in POWERCAP.glob("*-rapl:*/name") if file.read_text().startswith("package")]
        counters = [zone / "energy_uj" for zone in zones]  # other zones are parts of these, or hold them
        return sum(float(file.read_text()) for file in counters) / 1e6 if counters else None
    except OSError:  # for root only, on many machines
        return None


def _gpu() -> float | None:
    if find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        # By its name: NVML's numbers don't heed CUDA_VISIBLE_DEVICES.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    except pynvml.NVMLError:
        return None


def spent(before: float | None, times: int) -> dict[str, float]:
    """``joules`` of each of so many pieces of work since ``before``; nothing where it isn't known."""
    after = joules()
    if before is None or after is None or after < before:
        return {}
    return {"joules": (after - before) / times}

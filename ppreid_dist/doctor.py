"""What this machine and installation can do, one finding a line; nothing is changed and nothing downloaded."""

import importlib.metadata
import importlib.util
import io
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ppreid_dist.data.decode import Decoder
from ppreid_dist.kernels import choice


@dataclass(frozen=True)
class Finding:
    mark: str  # ok, none (optional and absent) or FAIL
    what: str
    says: str


def examine() -> list[Finding]:
    """Findings in the order of the way the data goes."""
    return list(_findings())


def _findings() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    yield Finding(
        "ok", "python", f"{platform.python_version()}, {cores} cores, torch uses {torch.get_num_threads()} threads"
    )
    yield Finding("ok", "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}")
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        yield Finding("ok", "gpu", f"{torch.cuda.device_count()} × {', '.join(sorted(names))}")
    else:
        yield Finding("none", "gpu", "no CUDA device: training runs on the CPU over gloo")
    for package in ("accelerate", "transformers", "webdataset", "safetensors"):
        yield Finding("ok", package, importlib.metadata.version(package))
    yield _try("decode by Pillow", lambda: _decode("pillow", "cpu"))
    if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
        yield _try("decode by DALI on the CPU", lambda: _decode("dali-cpu", "cpu"))
        if torch.cuda.is_available():
            yield _try("decode by DALI on the GPU", lambda: _decode("dali-mixed", "cuda"))
    else:
        yield _absent("DALI", "gpu")
    for module, extra in (
        ("deepspeed", "deepspeed"),
        ("diffusers", "diffusion"),
        ("onnxruntime", "onnx"),
        ("ray", "sweep"),
        ("wandb", "track"),
        ("tensorboard", "track"),
    ):
        if importlib.util.find_spec(module):
            # Its build for GPUs is the distribution onnxruntime-gpu.
            distribution = importlib.metadata.packages_distributions().get(module, [module])[0]
            yield Finding("ok", module, importlib.metadata.version(distribution))
        else:
            yield _absent(module, extra)
    absent = choice.nvidia_apex_lacks("adam")
    yield Finding(
        "none" if absent else "ok", "NVIDIA Apex", "absent: torch's own forms are used" if absent else "installed"
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for operation in choice.OPERATIONS:
        chosen = choice.of(operation, device)
        yield Finding("ok", f"kernels.{operation}", f"{chosen.implementation} ({chosen.why})")


def _absent(what: str, extra: str) -> Finding:
    return Finding("none", what, f"absent: pip install 'ppreid_dist[{extra}]'")


def _try(what: str, work: Callable[[], str]) -> Finding:
    try:
        return Finding("ok", what, work())
    except Exception as error:  # whatever breaks, the other findings are still wanted
        return Finding("FAIL", what, " ".join(str(error).split()) or type(error).__name__)


def _decode(backend: str, device: str) -> str:
    colour = (200, 100, 50)
    jpeg = io.BytesIO()
    Image.new("RGB", (64, 128), colour).save(jpeg, "JPEG", quality=95)
    x_13HW = Decoder(backend, (64, 32), device).decode([jpeg.getvalue()], ["test picture"]).cpu().float()
    error = float(np.abs(x_13HW.mean((0, 2, 3)).numpy() - np.array(colour)).max())
    if error > 4:
        raise ValueError(f"the colours are wrong by {error:.1f} levels")
    return f"a JPEG came out within {error:.1f} levels"

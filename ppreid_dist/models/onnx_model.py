"""An image model from an .onnx file, by ONNX Runtime: anybody's ReID model as a judge. Nothing of it is code.

Shapes: N pictures, B those of one call, H×W the model's input, D feature dim.
"""

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppreid_dist.errors import MissingExtra, RunError
from ppreid_dist.files import sha256_of
from ppreid_dist.pixels import to_float
from ppreid_dist.settings import Settings, option

_log = logging.getLogger(__name__)
_CUDA = "CUDAExecutionProvider"
SIZE = (256, 128)  # of a model that takes any: what ReID models are mostly trained with
BATCH = 64


@dataclass(kw_only=True)
class OnnxConfig(Settings):
    mean: tuple[float, float, float] = option((0.485, 0.456, 0.406), "the pictures' mean, as the model was trained")
    std: tuple[float, float, float] = option((0.229, 0.224, 0.225), "their standard deviation", more_than=0)


class OnnxModel:
    """Pictures (N, 3, H, W), uint8 or float in [0, 1], at ``size`` (H, W) to float32 features (N, D) on ``device``.

    The model's one input is a float tensor N×3×H×W, normalised by ``config``; H and W are ``SIZE`` where it takes any.
    Its first output is N×D, or N×D×1×1. Where it fixes N to 1 it is called for each picture. It runs on the GPU where
    ``device`` is one and ONNX Runtime can.

    MissingExtra without ONNX Runtime; RunError naming ``file`` if it can't be loaded or run, or is no such model.
    """

    def __init__(self, file: Path, config: OnnxConfig, device: torch.device):
        if importlib.util.find_spec("onnxruntime") is None:
            raise MissingExtra(f"{file}: a model in ONNX", "onnx")
        self.file, self.device = file, device
        try:
            self.digest = sha256_of(file)
        except OSError as error:
            raise RunError(f"{file}: can't be read: {error.strerror}") from None
        self.session = self._open()
        self.input = self._check_input()
        self.mean, self.std = (torch.tensor(of, device=device).view(3, 1, 1) for of in (config.mean, config.std))

    def _open(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what is wrong is said by the exception
        options.intra_op_num_threads = torch.get_num_threads()
        providers: list[Any] = ["CPUExecutionProvider"]
        if self.device.type == "cuda" and _CUDA in onnxruntime.get_available_providers():
            onnxruntime.preload_dlls()  # those that came with torch
            # By the clock, its default, another run might choose another algorithm, which rounds otherwise.
            providers.insert(0, (_CUDA, dict(device_id=self.device.index or 0, cudnn_conv_algo_search="HEURISTIC")))
        try:
            session = onnxruntime.InferenceSession(str(self.file), options, providers=providers)
            if len(providers) > len(session.get_providers()):
                _log.warning("%s: runs on the CPU: ONNX Runtime can't load its libraries for the GPU", self.file)
            return session
        except Exception as error:  # its exceptions have no common class of their own
            raise RunError(f"{self.file}: not an ONNX model that can be loaded: {_line(error)}") from None

    def _check_input(self) -> str:
        """The input's name; sets ``size`` and ``batch``."""
        inputs = self.session.get_inputs()
        if len(inputs) != 1 or inputs[0].type != "tensor(float)":
            types = ", ".join(f"{one.name} {one.type}" for one in inputs)
            raise RunError(f"{self.file}: takes {types or 'nothing'}, not one float tensor of pictures")
        shape = inputs[0].shape
        if len(shape) != 4:
            raise RunError(f"{self.file}: takes a tensor of rank {len(shape)}, not pictures N×3×H×W")
        # An axis that may be anything is a name, None or, from some exporters, not positive.
        batch, channels, height, width = (one if isinstance(one, int) and one > 0 else None for one in shape)
        if channels not in (3, None):
            raise RunError(f"{self.file}: takes {channels} channels, not 3: pictures are N×3×H×W")
        if batch not in (1, None):
            raise RunError(f"{self.file}: takes {batch} pictures at a time; export it with a free batch axis or with 1")
        self.batch, self.size = batch or BATCH, (height or SIZE[0], width or SIZE[1])
        return str(inputs[0].name)

    @torch.no_grad()
    def __call__(self, images_N3HW: Tensor) -> Tensor:
        return torch.cat([self._run(x_B3HW.to(self.device)) for x_B3HW in images_N3HW.split(self.batch)])

    def _run(self, x_B3HW: Tensor) -> Tensor:
        x_B3HW = to_float(x_B3HW)
        x = ((x_B3HW - self.mean) / self.std).cpu().numpy()
        try:
            found = self.session.run([self.session.get_outputs()[0].name], {self.input: x})[0]
        except Exception as error:
            raise RunError(f"{self.file}: can't be run on pictures {x.shape}: {_line(error)}") from None
        shape = np.shape(found)
        if len(shape) < 2 or shape[0] != len(x) or shape[2:] not in ((), (1, 1)):
            raise RunError(f"{self.file}: gives {shape} for {len(x)} pictures, not a feature (N, D) of each")
        features_BD = torch.from_numpy(np.asarray(found, dtype=np.float32).reshape(len(x), -1))
        if not bool(torch.isfinite(features_BD).all()):
            raise RunError(f"{self.file}: gives features with NaN or infinity")
        return features_BD.to(self.device)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

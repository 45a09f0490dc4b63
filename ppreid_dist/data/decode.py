"""JPEG, PNG and BMP bytes to uint8 pictures of one size, through DALI or Pillow.

All backends honour EXIF orientation, drop alpha, and resize with an antialiased triangular filter. They differ by at
most one level, except along the outermost rows and columns of a picture made smaller, where Pillow shrinks the filter
and DALI repeats the edge (mean difference below 0.5 levels on noise, the worst case).

B pictures, H height, W width.
"""

import importlib.util
import io
import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ppreid_dist.errors import ConfigError, DataError, MissingExtra
from ppreid_dist.transfer import to_device

BACKENDS = ("auto", "pillow", "dali-cpu", "dali-mixed")
_MOST_THREADS = 16  # of DALI: each has buffers of its own, in device memory and pinned, of 32 MB an operator
_log = logging.getLogger(__name__)


@cache
def _say_once(line: str) -> None:
    _log.info(line)


def choose_backend(backend: str, device: torch.device) -> str:
    """``auto`` resolved for this machine, said once in a logged line; another name is checked and returned.

    Raises MissingExtra when DALI is asked for and not installed, ConfigError for ``dali-mixed`` on another device than
    a GPU.
    """
    present = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if backend.startswith("dali") and not present:
        raise MissingExtra("DALI decoding", "gpu")
    if backend == "dali-mixed" and device.type != "cuda":
        raise ConfigError(f"data.stream.backend: dali-mixed decodes on a GPU, and this runs on {device}; use dali-cpu")
    if backend == "auto":
        backend = "pillow" if not present else "dali-mixed" if device.type == "cuda" else "dali-cpu"
        _say_once(f"decoding by {backend} (DALI {'installed' if present else 'absent'}, device {device})")
    return backend


def available_threads() -> int:
    """This process's share of the CPU cores it may run on. Slurm says a task's, even where it doesn't bind them."""
    share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(share, int(os.environ.get("SLURM_CPUS_PER_TASK", share))))


class Decoder:
    """Decodes batches to ``size`` (height, width) on ``device``; safe to call from several threads.

    ``backend`` is one of BACKENDS; ``dali-mixed`` (nvJPEG) needs ``device`` to be CUDA's.
    """

    def __init__(self, backend: str, size: tuple[int, int], device: torch.device | str):
        self.size, self.device = size, torch.device(device)
        self.backend = choose_backend(backend, self.device)
        self._decode: Callable[[Sequence[bytes]], Tensor]
        if self.backend == "pillow":
            pool = ThreadPoolExecutor(available_threads(), thread_name_prefix="decode")
            self._decode = partial(_pillow_batch, pool, size)
        else:
            self._decode = _Dali(size, self.device, mixed=self.backend == "dali-mixed")

    def decode(self, data: Sequence[bytes], keys: Sequence[str]) -> Tensor:
        """uint8 (B,3,H,W) on the device. DataError naming the key of a picture that can't be decoded, and the
        backend's own error where it decodes no picture any more."""
        try:
            x_BHW3 = self._decode(data)
        except Exception as error:  # DALI's RuntimeErrors and Pillow's many don't say which picture it was
            if not self._works():
                raise
            for one, key in zip(data, keys, strict=True):
                try:
                    self._decode([one])
                except Exception as reason:
                    raise DataError(f"{key}: can't be decoded by {self.backend}: {in_one_line(reason)}") from error
            raise
        return to_device(x_BHW3, self.device).permute(0, 3, 1, 2).contiguous()

    def _works(self) -> bool:
        """Whether a sound picture is decoded: not by a device that failed, or whose memory is full."""
        try:
            self._decode([_sound_picture()])
        except Exception:
            return False
        return True


def in_one_line(error: Exception) -> str:
    """The first line of what a decoder says, without the object in memory that Pillow names as the file."""
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r" <_io\.BytesIO object at \w+>", "", first_line)


@cache
def _sound_picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, "JPEG")
    return stream.getvalue()


def _pillow_batch(pool: ThreadPoolExecutor, size: tuple[int, int], data: Sequence[bytes]) -> Tensor:
    return torch.from_numpy(np.stack(list(pool.map(partial(_pillow_one, size), data))))


def _pillow_one(size: tuple[int, int], data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as picture:
        upright = ImageOps.exif_transpose(picture).convert("RGB")
    return np.asarray(upright.resize(size[::-1], Image.Resampling.BILINEAR))


class _Dali:
    """DALI's dynamic mode, imported (a second or two) when first needed; runs without a driver where ``mixed`` is off.

    An evaluation context must not be active in two threads at once, hence the lock. Operators run in the thread that
    asks (``sync_cpu``): DALI's own thread would go back to device 0 after each, and leave a CUDA context there for
    every process. On CUDA it works on torch's current stream, so that what follows on that stream needs no
    synchronisation. The JPEG engine of Hopper and Ampere gets nothing (``hw_decoder_load``): it rounds otherwise than
    the CUDA decoder that takes the rest of a batch, so that a picture's values would depend on its place; and it has
    been seen to write before what stands before it on the stream has ended (torchcodec, pull request 1634).
    On the CPU what it gives lies in memory that it takes back, pinned where there is a driver: on its way to a GPU it
    is copied first.
    """

    def __init__(self, size: tuple[int, int], device: torch.device, *, mixed: bool):
        from nvidia.dali import types
        from nvidia.dali.experimental import dynamic

        self._dynamic, self._size, self._lock = dynamic, size, threading.Lock()
        self._copy = True if device.type == "cuda" and not mixed else None  # None: only where it must
        self._context: Any
        threads = min(available_threads(), _MOST_THREADS)
        if mixed:
            stream = torch.cuda.current_stream(device)
            self._context = dynamic.EvalContext(num_threads=threads, device_id=stream.device_index, cuda_stream=stream)
        else:
            self._context = dynamic.EvalContext(num_threads=threads)
        self._image = partial(
            dynamic.decoders.image,
            device="gpu" if mixed else "cpu",
            output_type=types.RGB,
            hw_decoder_load=0.0,
            jpeg_fancy_upsampling=True,  # without it nvJPEG's chroma differs from libjpeg's
        )
        self._resize = partial(dynamic.resize, size=size, interp_type=types.INTERP_TRIANGULAR)

    def __call__(self, data: Sequence[bytes]) -> Tensor:
        with self._lock, self._context, self._dynamic.EvalMode.sync_cpu:
            encoded = self._dynamic.as_batch([np.frombuffer(one, dtype=np.uint8) for one in data])
            return self._resize(self._image(encoded)).torch(copy=self._copy)


def decode_masks(data: Sequence[bytes], keys: Sequence[str], size: tuple[int, int]) -> Tensor:
    """Masks (a picture's pixel is the person's where it isn't 0) to uint8 0/1 (B,1,H,W) on the CPU: 1 where at least
    half of what falls on a pixel of ``size`` is the person. DataError naming the key of one that can't be decoded."""
    masks = []
    for one, key in zip(data, keys, strict=True):
        try:
            with Image.open(io.BytesIO(one)) as picture:
                person = picture.convert("L").point(lambda level: 255 if level else 0)
        except Exception as error:
            raise DataError(f"{key}: its mask can't be decoded: {in_one_line(error)}") from None
        masks.append(np.asarray(person.resize(size[::-1], Image.Resampling.BILINEAR)) >= 128)
    return torch.from_numpy(np.stack(masks)[:, None].astype(np.uint8))

"""Stored features of a user's own pictures: ``ppreid features RUN PICTURE… --out FILE.safetensors``.

FILE.safetensors    features (N, S), float32, in the order of FILE.keys.txt
FILE.keys.txt       the pictures' files, a line each

N pictures, S the stored dim.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from ppreid_dist.data.decode import Decoder
from ppreid_dist.errors import ConfigError, DataError, RunError
from ppreid_dist.evaluation.export import save_features, stored_features
from ppreid_dist.experiment import load_run
from ppreid_dist.models.folder import load_extractor
from ppreid_dist.progress import progress_bar
from ppreid_dist.transfer import default_device

_BATCH = 256  # as evaluation's, so that what follows from it in the last bits is alike
_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp")


def write_features(run: Path, pictures: Sequence[Path], out: Path, *, progress: bool = True) -> torch.Size:
    """What the finished ``run`` stores of ``pictures``, a person each, files or folders of files; returns (N, S).

    They are decoded as `ppreid evaluate` decodes: the same file gives the same feature. DataError naming a picture that
    can't be read, RunError where ``out`` is there or the run isn't finished; then nothing is written.
    """
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out: {out} must end in .safetensors")
    if out.exists():
        raise RunError(f"{out}: already exists; choose another --out")
    files = [file for picture in pictures for file in _files(picture)]
    config, device = load_run(run), default_device()
    saved = load_extractor(run / "model", device)
    decoder, parts = Decoder(config.data.stream.backend, saved.size, device), []
    for start in progress_bar(range(0, len(files), _BATCH), desc="features", shown=progress):
        some = files[start : start + _BATCH]
        images_B3HW = decoder.decode([_read(file) for file in some], [str(file) for file in some])
        parts.append(stored_features(saved.extractor, images_B3HW).cpu())
    features_NS = torch.cat(parts)
    save_features(out, features_NS, files)
    return features_NS.shape


def _files(picture: Path) -> list[Path]:
    if not picture.is_dir():
        return [picture]
    found = sorted(file for file in picture.rglob("*") if file.suffix.lower() in _ENDINGS)
    if not found:
        raise DataError(f"{picture}: no picture in it ({', '.join(_ENDINGS)})")
    return found


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: can't be read: {error.strerror}") from None

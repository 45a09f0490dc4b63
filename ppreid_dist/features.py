"""Stored features of a user's own pictures: ``ppreid features RUN PICTURE… --out FILE.safetensors``.

FILE.safetensors    features (N, S), float32, in the order of FILE.keys.txt, or packed
                    (`models.stores.base.Store.packed`); in its metadata, as the JSON `about`, a digest of the model
                    and how it stores (`evaluation.export.provenance`)
FILE.keys.txt       the pictures' files, a line each; of entries that are folders, these

N pictures, or entries of several, S the stored dim, D the embedding's.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ppreid_dist.data.decode import Decoder
from ppreid_dist.errors import ConfigError, DataError, RunError
from ppreid_dist.evaluation.export import provenance, save_features, stored_features
from ppreid_dist.evaluation.tracklets import padded, stored_means, unit_embeddings
from ppreid_dist.experiment import load_run
from ppreid_dist.files import check_writable
from ppreid_dist.models.folder import load_extractor
from ppreid_dist.progress import progress_bar, say
from ppreid_dist.transfer import default_device

_BATCH = 256  # as evaluation's, so that what follows from it in the last bits is alike
_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp")


def write_features(
    run: Path,
    pictures: Sequence[Path],
    out: Path,
    *,
    by_folder: bool = False,
    packed: bool = False,
    progress: bool = True,
) -> torch.Size:
    """What the finished ``run`` stores of ``pictures``, a person each, files or folders of files; returns (N, S).

    ``by_folder``: all pictures that lie in one folder, a person's by one camera, are one entry
    (:mod:`ppreid_dist.evaluation.tracklets`), and its key is the folder.
    Of folders, names that begin with a dot are passed over, other endings than a picture's are counted and told. They
    are decoded as `ppreid evaluate` decodes: the same file gives the same feature (of ``adversarial`` only where the
    same library decodes it). DataError naming a picture that can't be read, or whose name can't be a line of UTF-8;
    RunError where ``out`` is there, the run isn't finished, or what it stores isn't ``packed``; then nothing is
    written.
    """
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out: {out} must end in .safetensors")
    if os.path.lexists(out):
        raise RunError(f"{out}: already exists; choose another --out")
    check_writable(out)  # or it would be known only when all is embedded
    files = [file for picture in pictures for file in _files(picture, told=progress)]
    for file in files:
        _check_name(file)
    config, device = load_run(run), default_device()
    saved = load_extractor(run / "model", device)
    store = saved.extractor.store
    about = provenance(run / "model", store.config)
    if packed and not store.packs:
        raise RunError(
            f"--packed: {run} stores float32 numbers ({about['stored']}); signs, codes, cells and int8 are packed"
        )
    decoder = Decoder(config.data.stream.backend, saved.size, device)
    see = unit_embeddings if by_folder else stored_features
    seen = torch.empty(len(files), saved.extractor.feature_dim if by_folder else store.dim)
    for start in progress_bar(range(0, len(files), _BATCH), desc="features", shown=progress):
        some = files[start : start + _BATCH]
        images_B3HW = decoder.decode([_read(file) for file in some], [str(file) for file in some])
        seen[start : start + len(some)] = see(saved.extractor, images_B3HW)
    keys, features_NS = files, seen
    if by_folder:
        keys = list(dict.fromkeys(file.parent for file in files))
        rows_ET = padded([[row for row, file in enumerate(files) if file.parent == key] for key in keys])
        features_NS = stored_means(saved.extractor, seen.to(device), rows_ET).cpu()
    save_features(out, store.packed(features_NS) if packed else {"features": features_NS}, keys, about)
    return features_NS.shape


def _files(picture: Path, *, told: bool) -> list[Path]:
    if not picture.is_dir():
        return [picture]
    seen = [file for file in sorted(picture.rglob("*")) if not file.is_dir() and not _hidden(file.relative_to(picture))]
    found = [file for file in seen if file.suffix.lower() in _ENDINGS]
    if not found:
        raise DataError(f"{picture}: no picture in it ({', '.join(_ENDINGS)})")
    if told and len(found) < len(seen):
        say(f"{picture}: files skipped that don't end in {', '.join(_ENDINGS)}: {len(seen) - len(found):,}")
    return found


def _hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def _check_name(file: Path) -> None:
    name = str(file)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(f"{name!a}: its name isn't UTF-8; rename it") from None
    if name.splitlines() != [name]:
        raise DataError(f"{name!a}: its name holds a line break; rename it")


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: can't be read: {error.strerror}") from None

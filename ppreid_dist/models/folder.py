"""A finished extractor as a folder, all that evaluation and attacks need of a run.

model/
    extractor.safetensors   its weights without the identity head
    extractor.json          its settings, input size and what it was trained on
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ppreid_dist.errors import ConfigError, RunError
from ppreid_dist.files import read_json, read_tensors, write_json, write_tensors, write_text
from ppreid_dist.models.extractor import Extractor, ExtractorConfig
from ppreid_dist.settings import load_settings, to_dict

_HEAD = "classifier."


@dataclass(frozen=True)
class SavedExtractor:
    """An extractor in eval mode and what was kept about it."""

    extractor: Extractor
    size: tuple[int, int]
    about: dict[str, Any]


def save_extractor(
    folder: Path, extractor: Extractor, config: ExtractorConfig, size: tuple[int, int], about: dict[str, Any]
) -> None:
    """Write ``folder`` whole, over an earlier one's files."""
    weights = {name: value for name, value in extractor.state_dict().items() if not name.startswith(_HEAD)}
    write_tensors(folder / "extractor.safetensors", weights)
    shape: Any = extractor.backbone.model.config
    write_text(folder / "backbone" / "config.json", shape.to_json_string())
    write_json(folder / "extractor.json", {"settings": to_dict(config), "size": list(size), "about": about})


def load_extractor(folder: Path, device: torch.device | str) -> SavedExtractor:
    """Read what :func:`save_extractor` wrote; RunError naming the file that is missing or doesn't fit."""
    if not folder.is_dir():
        raise RunError(f"{folder}: no finished extractor there; train the run to its end first")
    saved, file = read_json(folder / "extractor.json"), folder / "extractor.safetensors"
    try:
        kept = {name: value for name, value in saved["settings"].items() if name != "backbone"}
        settings = [f"{name}={'null' if value is None else value}" for name, value in kept.items()]
        config, size, about = load_settings(ExtractorConfig, None, settings), tuple(saved["size"]), saved["about"]
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder / 'extractor.json'}: not what an extractor is kept with: {error}") from None
    # Shape and weights come from the folder, not from where the training began.
    extractor = Extractor(replace(config, backbone=str(folder / "backbone"), pretrained=False), num_classes=0)
    try:
        extractor.load_state_dict(read_tensors(file))
    except RuntimeError as error:
        raise RunError(f"{file}: doesn't hold this extractor: {' '.join(str(error).split())[:200]}") from None
    extractor.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
    return SavedExtractor(extractor, size, about)

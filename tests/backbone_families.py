"""Tiny configurations of every family of backbones, and folders that hold them."""

import json
from pathlib import Path

FAMILIES: dict[str, dict[str, object]] = {
    "resnet": dict(embedding_size=8, hidden_sizes=[8, 16, 16, 24], depths=[1, 1, 1, 2], layer_type="basic"),
    "mobilenet_v2": dict(depth_multiplier=0.1, min_depth=4, depth_divisible_by=4),
    "vit": dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=32, patch_size=8
    ),
    "dinov2": dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14
    ),
    "swin": dict(embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=7, image_size=56, patch_size=4),
}


def write_backbone(place: Path, family: str, **changes: object) -> str:
    """A folder of ``place`` with a config.json of the family, as a backbone's name."""
    folder = place / family
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": family, **FAMILIES.get(family, {}), **changes}))
    return str(folder)

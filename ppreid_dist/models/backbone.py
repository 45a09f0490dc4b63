"""Image backbones from `transformers`: a hub id or a local folder in, a feature map out.

Shapes: B batch, H×W picture, C channels, h×w positions of the map, N tokens.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn

from ppreid_dist.errors import ConfigError

FAMILIES = ("resnet", "mobilenet_v2", "vit", "dinov2", "swin")
_REPOSITORY = Path(__file__).resolve().parents[2]
_LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, StrictDataclassError)


class FeatureMap(NamedTuple):
    map_BChw: Tensor
    class_BC: Tensor | None  # the class token, where the family has one


class Backbone(nn.Module):
    """A normalised picture (B, 3, H, W) to a :class:`FeatureMap` of ``channels`` channels."""

    has_class_token = False
    signed = False  # whether the map takes negative values, which GeM would cut off

    def __init__(self, model: nn.Module, channels: int):
        super().__init__()
        self.model, self.channels = model, channels


class ConvolutionalBackbone(Backbone):
    """ResNet, MobileNetV2: the map after the last ReLU."""

    def forward(self, x_B3HW: Tensor) -> FeatureMap:
        return FeatureMap(self.model(x_B3HW, return_dict=True).last_hidden_state, None)


class PatchBackbone(Backbone):
    """ViT, DINOv2: the patch tokens as a map, and the class token. Pixels beyond a whole number of patches
    are left out, and position embeddings are interpolated to the picture's shape."""

    has_class_token = True
    signed = True

    def __init__(self, model: nn.Module, channels: int, patch: int, arguments: dict[str, Any]):
        super().__init__(model, channels)
        self.patch, self.arguments = patch, arguments

    def forward(self, x_B3HW: Tensor) -> FeatureMap:
        tokens_BNC = self.model(x_B3HW, **self.arguments).last_hidden_state
        map_BCN = tokens_BNC[:, 1:].transpose(1, 2)
        return FeatureMap(map_BCN.unflatten(2, (x_B3HW.shape[2] // self.patch, -1)), tokens_BNC[:, 0])


class SwinBackbone(Backbone):
    """Swin: the last stage's tokens as a map; it pads, so sizes round up."""

    signed = True

    def __init__(self, model: nn.Module, channels: int, stride: int):
        super().__init__(model, channels)
        self.stride = stride

    def forward(self, x_B3HW: Tensor) -> FeatureMap:
        # Without always_partition a map smaller than the window (8×4 of a 256×128 picture) shrinks the window
        # but not its table of position biases, and the model fails.
        tokens_BNC = self.model(x_B3HW, interpolate_pos_encoding=True, always_partition=True).last_hidden_state
        rows = -(-x_B3HW.shape[2] // self.stride)
        return FeatureMap(tokens_BNC.transpose(1, 2).unflatten(2, (rows, -1)), None)


class InstanceBatchNorm(nn.Module):
    """IBN-a: instance norm on the first half of the channels, batch norm on the rest (Pan et al., ECCV 2018).

    Takes over the weights and statistics of ``norm``, so that a pretrained backbone starts near itself.
    """

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        half = norm.num_features // 2
        self.instance = nn.InstanceNorm2d(half, eps=norm.eps, affine=True)
        self.batch = nn.BatchNorm2d(norm.num_features - half, eps=norm.eps, momentum=norm.momentum)
        old = norm.state_dict()
        self.instance.load_state_dict({name: old[name][:half] for name in ("weight", "bias")})
        self.batch.load_state_dict({name: value[half:] if value.ndim else value for name, value in old.items()})

    def forward(self, x_BChw: Tensor) -> Tensor:
        first, rest = x_BChw.split([self.instance.num_features, self.batch.num_features], dim=1)
        return torch.cat([self.instance(first), self.batch(rest)], dim=1)


def build_backbone(name: str, *, pretrained: bool, last_stride: int, ibn: bool) -> Backbone:
    """The backbone ``name``: a local folder with ``config.json`` (and ``model.safetensors`` if ``pretrained``),
    sought from the current directory and then from the repository's root, or else a hub id.

    A local folder or a cached hub id never touches the network. Without ``pretrained`` the weights are random:
    build within :func:`ppreid_dist.models.seeding.seeded`. ``last_stride`` 1 keeps the map of the last stage twice
    as high and wide (Luo et al., "Bag of Tricks", 2019); transformers have no such stride. Raises ConfigError.
    """
    folder = _local_folder(name)
    try:
        if folder is not None:
            model = _load(str(folder), pretrained, last_stride, local_files_only=True)
        else:
            # The cache first: on a cluster's node without internet the hub's retries cost half a minute.
            try:
                model = _load(name, pretrained, last_stride, local_files_only=True)
            except OSError:
                model = _load(name, pretrained, last_stride, local_files_only=False)
    except _LOADING_ERRORS as error:
        reason = " ".join(str(error).strip().splitlines()[:2]) or type(error).__name__
        if folder is None and isinstance(error, OSError):
            reason = f"no such folder here, nor can the hub's be had: {reason}"
        raise ConfigError(f"model.backbone: {name}: {reason}") from None
    family, config = model.config.model_type, model.config
    if ibn and family != "resnet":
        raise ConfigError(f"model.ibn: only for ResNet, and {name} is {family}")
    if family == "resnet":
        _modify_resnet(model, last_stride, ibn)
        return ConvolutionalBackbone(model, config.hidden_sizes[-1])
    if family == "mobilenet_v2":
        return ConvolutionalBackbone(model, model.conv_1x1.convolution.out_channels)
    if family == "swin":
        return SwinBackbone(model, model.num_features, config.patch_size * 2 ** (len(config.depths) - 1))
    if family == "dinov2":
        model.embeddings.mask_token = None  # a parameter without gradient, which DDP would wait for
        return PatchBackbone(model, config.hidden_size, config.patch_size, {})
    return PatchBackbone(model, config.hidden_size, config.patch_size, {"interpolate_pos_encoding": True})


def _local_folder(name: str) -> Path | None:
    for folder in (Path(name), _REPOSITORY / name):
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise ConfigError(f"model.backbone: {folder} has no config.json")
            return folder
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise ConfigError(f"model.backbone: {name}: no such folder, and not a hub id")
    return None


def _load(source: str, pretrained: bool, last_stride: int, *, local_files_only: bool) -> Any:
    """The bare `transformers` model in fp32, its weights from safetensors or random. Raises _LOADING_ERRORS."""
    config = transformers.AutoConfig.from_pretrained(source, local_files_only=local_files_only)
    family = config.model_type
    if family not in FAMILIES:
        raise ValueError(f"the family {family} is not one of {', '.join(FAMILIES)}")
    if config.num_channels != 3:
        raise ValueError(f"takes pictures of {config.num_channels} channels, not 3")
    if family == "mobilenet_v2" and last_stride == 1:
        config.output_stride = min(config.output_stride, 16)
    # The families' own pooling layers hold parameters that our pooling doesn't use.
    bare = {} if family in ("resnet", "dinov2") else {"add_pooling_layer": False}
    if not pretrained:
        return transformers.AutoModel.from_config(config, dtype=torch.float32, **bare)
    model, report = transformers.AutoModel.from_pretrained(
        source,
        config=config,
        local_files_only=local_files_only,
        use_safetensors=True,
        dtype=torch.float32,
        output_loading_info=True,
        **bare,
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"the weights lack {len(missing)} of the model's parameters, such as {missing[0]}")
    return model.train()


def _modify_resnet(model: Any, last_stride: int, ibn: bool) -> None:
    if last_stride == 1:
        for layer in model.encoder.stages[-1].modules():
            if isinstance(layer, nn.Conv2d):
                layer.stride = (1, 1)
    if ibn:
        for stage in model.encoder.stages[:3]:
            for block in stage.layers:
                block.layer[0].normalization = InstanceBatchNorm(block.layer[0].normalization)

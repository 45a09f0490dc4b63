"""The extractor: backbone, pooling, BNNeck, identity head, and the stored feature T.

Shapes: B batch, H×W picture, D feature, C classes; of the backbone's map, C channels and h×w positions.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ppreid_dist.errors import ConfigError
from ppreid_dist.models.backbone import FeatureMap, build_backbone
from ppreid_dist.models.store import make_store
from ppreid_dist.models.stores.base import StoreConfig
from ppreid_dist.settings import Settings, option


@dataclass(kw_only=True)
class ExtractorConfig(Settings):
    backbone: str = option(
        "configs/backbones/resnet50",
        "a folder with a transformers config.json (and model.safetensors), or a hub id: ResNet, MobileNetV2, ViT, "
        "DINOv2 or Swin",
    )
    pretrained: bool = option(False, "load the backbone's weights instead of drawing them")
    last_stride: int = option(1, "stride of a convolutional backbone's last stage", choices=(1, 2))
    ibn: bool = option(False, "IBN-a: half instance norm in a ResNet's first three stages")
    pooling: str = option(
        "avg", "mean, generalised mean (not for transformers), or the class token", choices=("avg", "gem", "cls")
    )
    feature_dim: int = option(0, "size of the feature by a bias-free linear layer; 0 = the backbone's own", at_least=0)
    store: StoreConfig = option(StoreConfig(), "")
    mean: tuple[float, float, float] = option((0.485, 0.456, 0.406), "the pictures' mean, as the backbone was trained")
    std: tuple[float, float, float] = option((0.229, 0.224, 0.225), "their standard deviation", more_than=0)


class ExtractorOutput(NamedTuple):
    pooled_BD: Tensor  # before BNNeck: for the triplet loss
    embedding_BD: Tensor  # after BNNeck
    stored_BD: Tensor  # T: what a gallery keeps and an attacker sees, fp32; D is ``store.dim``
    logits_BC: Tensor  # (B, 0) without classes


class GeM(nn.Module):
    """Generalised-mean pooling (B, C, h, w) → (B, C) with a learned exponent (Radenović et al., 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(3.0))

    def forward(self, map_BChw: Tensor) -> Tensor:
        # Where nothing is seen, 1e-6 to a large power would be 0, at which the root has no slope.
        return map_BChw.clamp(min=1e-6).pow(self.p).mean((2, 3)).clamp(min=1e-30).pow(1 / self.p)


class Extractor(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] to an :class:`ExtractorOutput`.

    One forward computes everything a training step reads, because DistributedDataParallel only sees forwards.
    BNNeck and the head follow Luo et al., "Bag of Tricks" (CVPR workshops 2019): a batch norm whose bias stays 0
    and a classifier without bias. Raises ConfigError for a backbone that can't be had or doesn't suit the pooling.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ExtractorConfig, num_classes: int = 0):
        super().__init__()
        self.config = config
        self.backbone = build_backbone(
            config.backbone, pretrained=config.pretrained, last_stride=config.last_stride, ibn=config.ibn
        )
        if config.pooling == "cls" and not self.backbone.has_class_token:
            raise ConfigError(f"model.pooling: {config.backbone} has no class token")
        if config.pooling == "gem" and self.backbone.signed:
            raise ConfigError(f"model.pooling: gem would cut off the negative half of {config.backbone}'s tokens")
        channels = self.backbone.channels
        self.feature_dim = config.feature_dim or channels
        self.gem = GeM() if config.pooling == "gem" else None
        self.reduce = nn.Linear(channels, config.feature_dim, bias=False) if config.feature_dim else None
        self.neck = nn.BatchNorm1d(self.feature_dim)
        self.neck.bias.requires_grad_(False)
        self.classifier = nn.Linear(self.feature_dim, num_classes, bias=False) if num_classes else None
        if self.reduce is not None:
            nn.init.kaiming_normal_(self.reduce.weight, mode="fan_out")
        if self.classifier is not None:
            nn.init.normal_(self.classifier.weight, std=0.001)
        self.store = make_store(config.store, self.feature_dim)
        self._pieces = 1
        # Not part of the state: they belong to the configuration.
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1), persistent=False)

    def accumulate(self, pieces: int) -> None:
        """Let a training batch pass the backbone in so many pieces, one after another.

        A piece's activations are forgotten and made again in its turn of the backward, where its part of the gradient
        is added up: there is memory for one piece only, and the losses still see the whole batch (Gao et al.,
        "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021). ConfigError for a backbone
        with batch norm, to which a piece isn't the batch.
        """
        if pieces > 1 and any(isinstance(module, _BatchNorm) for module in self.backbone.modules()):
            raise ConfigError(
                f"engine.accumulate: {self.config.backbone} has batch norm, which takes its statistics from the whole "
                f"batch; use 1, more processes, or a backbone without it (ViT, DINOv2, Swin)"
            )
        self._pieces = pieces

    def forward(self, x_B3HW: Tensor) -> ExtractorOutput:
        if self.training and self._pieces > 1:
            pieces = x_B3HW.tensor_split(min(self._pieces, len(x_B3HW)))
            pooled_BD = torch.cat([checkpoint(self._pooled_map, piece, use_reentrant=False) for piece in pieces])
        else:
            pooled_BD = self._pooled_map(x_B3HW)
        with torch.autocast(x_B3HW.device.type, enabled=False):
            embedding_BD = self.neck(pooled_BD)
            logits_BC = embedding_BD[:, :0] if self.classifier is None else self.classifier(embedding_BD)
            return ExtractorOutput(pooled_BD, embedding_BD, self.store(embedding_BD), logits_BC)

    def _pooled_map(self, x_B3HW: Tensor) -> Tensor:
        features = self.backbone((x_B3HW - self.mean) / self.std)
        # All that follows is cheap, and a feature in bf16 would keep three digits.
        with torch.autocast(x_B3HW.device.type, enabled=False):
            return self._pool(features)

    def _pool(self, features: FeatureMap) -> Tensor:
        if self.config.pooling == "cls":
            assert features.class_BC is not None
            pooled_BC = features.class_BC.float()
        else:
            map_BChw = features.map_BChw.float()
            pooled_BC = map_BChw.mean((2, 3)) if self.gem is None else self.gem(map_BChw)
        return pooled_BC if self.reduce is None else self.reduce(pooled_BC)

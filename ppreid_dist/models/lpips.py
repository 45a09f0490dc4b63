"""LPIPS: how different two pictures look, by the features of an AlexNet and weights fitted to people's judgements.

Zhang, Isola, Efros, Shechtman, Wang, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR
2018, version 0.1. The weights are the user's: no package here brings them.

Shapes: B pictures, H×W their size, C channels and h×w positions of a layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppreid_dist.errors import ConfigError, DataError
from ppreid_dist.files import read_tensors

SIDE = 64  # the least side that the network sees; at less its last layers have hardly a position
CHANNELS = (64, 192, 384, 256, 256)


class Lpips(nn.Module):
    """Pictures (B, 3, H, W) twice, floats in [0, 1], to their distance (B,): 0 for the same, more is less alike.

    Pictures with a side under 64 pixels are first enlarged, bilinearly and in proportion, until the shorter one has 64.
    Modules carry the names of the package ``lpips``, whose state dict fits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scaling_layer = _Scaling()
        self.net = _AlexNet()
        for i, channels in enumerate(CHANNELS):
            weigh = nn.Conv2d(channels, 1, 1, bias=False)
            self.add_module(f"lin{i}", nn.ModuleDict({"model": nn.ModuleDict({"1": weigh})}))

    @property
    def weights(self) -> list[Tensor]:
        """Of each layer's channels, (1, C, 1, 1), none negative."""
        return [self.get_parameter(f"lin{i}.model.1.weight") for i in range(len(CHANNELS))]

    def forward(self, x_B3HW: Tensor, y_B3HW: Tensor) -> Tensor:
        layers = zip(self._see(x_B3HW), self._see(y_B3HW), self.weights, strict=True)
        distances = [((x_BChw - y_BChw).square() * weight).sum(1).mean((1, 2)) for x_BChw, y_BChw, weight in layers]
        return torch.stack(distances).sum(0)

    def _see(self, x_B3HW: Tensor) -> list[Tensor]:
        height, width = x_B3HW.shape[-2:]
        if (times := SIDE / min(height, width)) > 1:
            size = (max(SIDE, round(times * height)), max(SIDE, round(times * width)))
            x_B3HW = F.interpolate(x_B3HW, size=size, mode="bilinear", align_corners=False)
        layers = self.net(self.scaling_layer(2 * x_B3HW - 1))
        return [map_BChw / (map_BChw.square().sum(1, keepdim=True).sqrt() + 1e-10) for map_BChw in layers]


class _Scaling(nn.Module):
    """From [-1, 1] to what AlexNet was trained on."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, x_B3HW: Tensor) -> Tensor:
        return (x_B3HW - self.shift) / self.scale


class _AlexNet(nn.Module):
    """The five maps after the ReLUs of AlexNet's convolutions (Krizhevsky, "One weird trick", 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.slice1 = nn.ModuleDict({"0": nn.Conv2d(3, 64, 11, stride=4, padding=2)})
        self.slice2 = nn.ModuleDict({"3": nn.Conv2d(64, 192, 5, padding=2)})
        self.slice3 = nn.ModuleDict({"6": nn.Conv2d(192, 384, 3, padding=1)})
        self.slice4 = nn.ModuleDict({"8": nn.Conv2d(384, 256, 3, padding=1)})
        self.slice5 = nn.ModuleDict({"10": nn.Conv2d(256, 256, 3, padding=1)})

    def forward(self, x_B3HW: Tensor) -> list[Tensor]:
        maps, x = [], x_B3HW
        for i, part in enumerate((self.slice1, self.slice2, self.slice3, self.slice4, self.slice5)):
            if i in (1, 2):
                x = F.max_pool2d(x, 3, stride=2)
            for convolution in part.values():
                x = F.relu(convolution(x))
            maps.append(x)
        return maps


def load_lpips(file: str, device: torch.device | str) -> Lpips:
    """The network with the weights in ``file``: safetensors of the state dict of the package's ``LPIPS(net="alex")``.

    ConfigError naming ``attack.perceptual.lpips``, the file, and the key that is missing, too much, or has another
    shape or value than a fitted network's.
    """
    where, network = f"attack.perceptual.lpips: {file}", Lpips()
    try:
        found = read_tensors(file)
    except DataError as error:
        raise ConfigError(f"attack.perceptual.lpips: {error}") from None
    # The package keeps its linear layers twice.
    found = {key: value for key, value in found.items() if not key.startswith("lins.")}
    own = network.state_dict()
    if missing := [key for key in own if key not in found]:
        raise ConfigError(f"{where}: {missing[0]} is missing: not the state dict of LPIPS(net='alex')")
    for key, value in found.items():
        if key not in own:
            raise ConfigError(f"{where}: {key} is not of LPIPS(net='alex')")
        if value.shape != own[key].shape:
            raise ConfigError(f"{where}: {key} has the shape {tuple(value.shape)}, not {tuple(own[key].shape)}")
        if not bool(torch.isfinite(value).all()):
            raise ConfigError(f"{where}: {key} holds NaN or infinity")
        if key.startswith("scaling_layer.") and not torch.allclose(value, own[key]):
            raise ConfigError(f"{where}: {key} is not that of LPIPS, version 0.1")
        if key.startswith("lin") and bool((value < 0).any()):
            raise ConfigError(f"{where}: {key} has weights below 0: not fitted")
    network.load_state_dict(found)
    return network.to(device).eval().requires_grad_(False)

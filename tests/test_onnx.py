"""A judge from an ONNX file: what it gives is the plain computation, and what is no judge is one clear line."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx_models import WEIGHT, write  # noqa: E402

from ppreid_dist.errors import MissingExtra, RunError  # noqa: E402
from ppreid_dist.models.onnx_model import SIZE, OnnxConfig, OnnxModel  # noqa: E402

CONFIG = OnnxConfig(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
CPU = torch.device("cpu")


def plain(images_N3HW: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(of).view(3, 1, 1) for of in (CONFIG.mean, CONFIG.std))
    return F.relu(F.conv2d((images_N3HW - mean) / std, torch.from_numpy(WEIGHT), padding=1)).mean((2, 3))


@pytest.mark.parametrize(
    ("shape", "flat", "size", "batch"),
    [
        (("n", 3, "h", "w"), True, SIZE, 64),
        ((None, 3, 12, 6), False, (12, 6), 64),
        ((1, 3, 12, 6), True, (12, 6), 1),
        (("n", 3, 20, "w"), True, (20, SIZE[1]), 64),
    ],
)
def test_its_features_are_the_plain_computation(
    tmp_path: Path, shape: Any, flat: bool, size: tuple[int, int], batch: int
) -> None:
    model = OnnxModel(write(tmp_path / "m.onnx", shape, flat=flat), CONFIG, CPU)
    assert (model.size, model.batch) == (size, batch)
    images = torch.randint(0, 256, (66 if size == (12, 6) else 3, 3, *size), dtype=torch.uint8)
    expected = plain(images.float() / 255)
    for given in (images, images.float() / 255):
        torch.testing.assert_close(model(given), expected, rtol=1e-4, atol=1e-5)
    assert model(images[:1]).shape == (1, 5) and model(images).dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "how", "message"),
    [
        (("n", 1, 12, 6), {}, "takes 1 channels, not 3"),
        (("n", 12, 6, 3), {}, "takes 12 channels, not 3"),
        ((8, 3, 12, 6), {}, "takes 8 pictures at a time"),
        (("n", 3, 12), {"weight": WEIGHT[..., 0]}, "takes a tensor of rank 3"),
        (("n", 3, 12, 6), {"kind": onnx.TensorProto.DOUBLE}, r"takes x tensor\(double\), not one float tensor"),
        (("n", 3, 12, 6), {"more": ("y",)}, r"takes x tensor\(float\), y tensor\(float\), not one"),
        (("n", "c", 12, 6), {"weight": WEIGHT[:, :2]}, "can't be run on pictures"),
        (("n", 3, 12, 6), {"weight": WEIGHT * np.nan}, "NaN or infinity"),
        (("n", 3, 12, 6), {"last": "Log"}, "NaN or infinity"),
    ],
)
def test_a_model_that_can_not_judge_is_one_line(tmp_path: Path, shape: Any, how: Any, message: str) -> None:
    file = write(tmp_path / "m.onnx", shape, **how)
    with pytest.raises(RunError, match=rf"^{file}: [^\n]*{message}[^\n]*$"):
        OnnxModel(file, CONFIG, CPU)(torch.rand(2, 3, 12, 6))


def test_a_map_is_no_feature_and_a_file_may_be_no_model(tmp_path: Path) -> None:
    file = write(tmp_path / "map.onnx", ("n", 3, 12, 6))
    model = onnx.load(file)
    del model.graph.output[0]
    onnx.save(model, file)
    with pytest.raises(RunError, match=rf"^{file}: gives \(2, 5, 12, 6\) for 2 pictures, not a feature"):
        OnnxModel(file, CONFIG, CPU)(torch.rand(2, 3, 12, 6))
    file.write_bytes(b"not a model")
    with pytest.raises(RunError, match=rf"^{file}: not an ONNX model that can be loaded: [^\n]*$"):
        OnnxModel(file, CONFIG, CPU)
    with pytest.raises(RunError, match=r"none\.onnx: can't be read: No such file"):
        OnnxModel(tmp_path / "none.onnx", CONFIG, CPU)


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"m\.onnx: a model in ONNX needs the extra 'onnx': pip"):
        OnnxModel(tmp_path / "m.onnx", CONFIG, CPU)


def test_the_defaults_are_imagenet_s() -> None:
    assert asdict(OnnxConfig()) == {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

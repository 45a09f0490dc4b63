"""A small ReID model as an .onnx file, for the tests of judges."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx

WEIGHT = np.random.default_rng(0).standard_normal((5, 3, 3, 3)).astype(np.float32)


def write(
    file: Path,
    shape: Any = ("n", 3, "h", "w"),
    *,
    flat: bool = True,
    kind: int = onnx.TensorProto.FLOAT,
    weight: np.ndarray = WEIGHT,
    more: tuple[str, ...] = (),
    last: str = "Relu",
) -> Path:
    """Convolution, ReLU (or ``last``), mean over the places: a small ReID model."""
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    nodes = [
        helper.make_node("Cast", ["x"], ["float"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Conv", ["float", "weight"], ["map"], pads=[1, 1] * (weight.ndim - 2)),
        helper.make_node(last, ["map"], ["positive"]),
        helper.make_node("GlobalAveragePool", ["positive"], ["pooled"]),
    ]
    if flat:
        nodes.append(helper.make_node("Flatten", ["pooled"], ["features"]))
    output = "features" if flat else "pooled"
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name in ("x", *more)]
    graph = helper.make_graph(
        nodes,
        "tiny",
        inputs,
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in (output, "map")],
        [numpy_helper.from_array(weight, "weight")],
    )
    opset = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), file)
    return file

"""The house's rule: nothing imports a later stage, and each heavy library has one door."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ppreid_dist"
STAGES = [
    {"settings", "errors", "files", "distributed", "progress", "transfer", "pixels", "helpers"},
    {"kernels"}, {"data"}, {"models"}, {"losses"}, {"training"}, {"evaluation"}, {"attacks"}, {"reporting"},
    {"experiment"}, {"judges", "findings"}, {"attack_setup"}, {"assessment", "doctor"}, {"storing", "features"},
    {"sweep"}, {"cli"},
]  # fmt: skip
DOORS = {
    "transformers": {"models/backbone.py"},
    "nvidia": {"data/decode.py"},
    "webdataset": {"data/stream.py"},
    "matplotlib": {"reporting/figures.py"},
    "accelerate": {"training/engine.py", "training/tracking.py", "training/zero.py"},
    "deepspeed": {"training/zero.py"},
    "diffusers": {"models/denoiser.py"},
    "onnxruntime": {"models/onnx_model.py"},
    "triton": {"kernels/ssim_triton.py", "kernels/batch_hard_triton.py", "kernels/nearer_triton.py"},
    "apex": {"kernels/nvidia_apex.py"},
    "amp_C": {"kernels/nvidia_apex.py"},
    "ray": {"sweep/ray_tune.py"},
    "optuna": {"sweep/study.py"},
    "sklearn": {"attacks/isomap.py"},
    "scipy": {"attacks/propagation.py", "evaluation/reranking.py"},
    "pickle": set(),
    "torchvision": set(),
    "timm": set(),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def stage(part: str) -> int:
    return next(i for i, names in enumerate(STAGES) if part in names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_nothing_imports_a_later_stage(file: Path) -> None:
    part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        return
    if file.name == "__main__.py":  # an entry, as train.py
        part = "cli"
    for name in imports(file):
        if name.startswith("ppreid_dist.") and name != "ppreid_dist.__version__":
            assert stage(name.split(".")[1]) <= stage(part), f"{name} is a later stage"


@pytest.mark.parametrize("library", DOORS)
def test_each_library_has_its_door(library: str) -> None:
    users = {str(f.relative_to(PACKAGE)) for f in FILES if any(n.split(".")[0] == library for n in imports(f))}
    assert users == DOORS[library]


def test_nothing_is_unpickled() -> None:
    for file in FILES:
        text = file.read_text()
        assert "torch.load(" not in text and "allow_pickle=True" not in text, file

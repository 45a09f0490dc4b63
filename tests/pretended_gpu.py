"""A device of its own, as a GPU is, that computes on the host: what mixes its tensors with the host's fails.

python tests/pretended_gpu.py FOLDER [--mixed] key=value …      the way from pictures to an attack on that device

Its tensors are of a subclass that holds a host's tensor and says that it lies elsewhere; each operation is looked at,
then done by the host. It must be known to torch before anything is differentiated, and torch then believes in an
accelerator: a process of its own, therefore. Not seen here: waits for a device (``test_transfer.py``); memory, kernels,
streams and autocast (``test_gpu.py``, on a real one).
"""

import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretended")
DEVICE, HOST = torch.device("pretended", 0), torch.device("cpu")
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Far(Tensor):
    """A tensor of the device; ``host`` holds its values."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> "Far":
        self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=DEVICE,
        )
        self.host = host
        return self  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return do(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.host.tolist()


class Watch(TorchDispatchMode):
    """Sees what no argument of is on the device: tensors that are made there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return do(func, args, kwargs or {})


done = 0  # operations on the device


def do(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    global done
    given, layout = tree_flatten((args, kwargs))
    far = [each for each in given if isinstance(each, Far)]
    target = kwargs.get("device")
    there = bool(far) if target is None else torch.device(target).type == DEVICE.type
    done += there
    if far and func not in COPIES:
        near = [each for each in given if isinstance(each, Tensor) and not isinstance(each, Far) and each.dim()]
        if func in INDEXED and isinstance(args[0], Far):  # indices may be the host's
            near = [each for each in near if not any(each is index for index in args[1])]
        if near:
            raise RuntimeError(f"{func}: the host's tensors beside the device's")
    if there and any(isinstance(each, torch.Generator) for each in given):
        raise RuntimeError(f"{func}: the host's generator for the device")
    near_args, near_kwargs = tree_unflatten([_nearer(each) for each in given], layout)
    result = func(*near_args, **near_kwargs)
    if func is aten.copy_.default:
        return args[0]
    return tree_map(partial(_farther, far), result) if there else result


def _nearer(x: Any) -> Any:
    if isinstance(x, torch.device):
        return HOST if x.type == DEVICE.type else x
    return x.host if isinstance(x, Far) else x


def _farther(given: list[Far], x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    for each in given:
        if each.host is x:  # changed in place
            return each
    return Far(x)


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    return Far(torch.empty(size, dtype=dtype, memory_format=memory_format))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return Far(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(x: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    _nearer(to).copy_(_nearer(x))
    return to


# What torch makes there without asking Python's modes first.
library = torch.library.Library("aten", "IMPL")
library.impl("empty.memory_format", _empty, "PrivateUse1")
library.impl("empty_strided", _empty_strided, "PrivateUse1")
library.impl("_copy_from", _copy_from, "PrivateUse1")


def main() -> None:
    from ppreid_dist.assessment import attack, evaluate
    from ppreid_dist.evaluation.reranking import Reranking
    from ppreid_dist.experiment import Config, train
    from ppreid_dist.settings import load_settings
    from ppreid_dist.storing import store
    from ppreid_dist.training.engine import Engine

    folder, *settings = sys.argv[1:]
    runs, mixed = Path(folder), "--mixed" in settings
    settings = [word for word in settings if word != "--mixed"]
    torch.set_num_threads(1)

    def trained(name: str, *more: str) -> Path:
        train(load_settings(Config, None, [*settings, *more, f"output={runs / name}"]), progress=False)
        return runs / name

    with (
        mock.patch.object(Engine, "device", DEVICE),
        mock.patch("torch.autocast", return_value=nullcontext()),  # knows no such device
        mock.patch("ppreid_dist.assessment.default_device", return_value=DEVICE),
        mock.patch("ppreid_dist.attack_setup.default_device", return_value=DEVICE),
        mock.patch("ppreid_dist.storing.default_device", return_value=DEVICE),
        Watch(),
    ):
        if mixed:
            with mock.patch("ppreid_dist.losses.ridge.to_device", lambda x, device: x):
                trained("mixed")
            return
        protected, control = trained("protected"), trained("control", "privacy.weight=0")
        judge = trained("judge", "privacy.weight=0", "seed=3", "model.pooling=gem", "model.feature_dim=12")
        codes = ["model.store.kind=codes", "model.store.dim=64", "model.store.axes=4", "model.store.width=0.5"]
        store(protected, runs / "codes", codes, progress=False)
        for run in (control, runs / "codes"):
            evaluate(run, reranking=Reranking(), progress=False)
        config = load_settings(Config, runs / "codes" / "config.yaml", [s for s in settings if s.startswith("attack.")])
        attack(config, control, runs / "codes", [judge], runs / "attack", progress=False)
    print(f"{done} operations")


if __name__ == "__main__":
    main()

"""What a round sends to the device, and asks of it, never makes the host wait; `test_gpu` watches a real device."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ppreid_dist.experiment import Config, train
from ppreid_dist.settings import load_settings
from ppreid_dist.training.engine import Engine
from ppreid_dist.training.finite import FiniteWatch
from ppreid_dist.training.runner import Runner
from ppreid_dist.transfer import default_device, to_device

FAR = torch.device("meta")  # stands in for a GPU: what asks it for a value fails


class Watch(TorchDispatchMode):
    """Fails where the host's tensor is copied to the device in a way that waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, kwargs = func(*args, **(kwargs or {})), kwargs or {}
        if isinstance(result, Tensor) and result.device == FAR:
            sent = [a for a in args if isinstance(a, Tensor) and a.is_cpu]
            if func is torch.ops.aten._to_copy.default and sent:
                self.copies += 1
                assert kwargs.get("non_blocking"), "a copy that waits for the device"
            elif func is torch.ops.aten.copy_.default and sent:
                self.copies += 1
                assert args[2:] == (True,), "a copy that waits for the device"
        return result


class _Seen(BaseException):
    pass


def test_a_round_never_waits_for_the_device(world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain rounds and rounds of the game, their pictures included."""
    rounds: list[int] = []

    def run(self: Runner) -> None:
        self.at.prepared, self.adversaries[0].rounds = True, 1  # catching up looks at errors
        for step in (0, 1, self.game_from, self.game_from + 1):
            self.at.step = step
            with Watch() as watch:
                self._round()
            rounds.append(watch.copies)
        raise _Seen

    monkeypatch.setattr(Runner, "run", run)
    monkeypatch.setattr(Engine, "device", FAR)
    monkeypatch.setattr(FiniteWatch, "see", lambda *_: None)  # has another way for a GPU
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no such device
    settings = ["kernels={adam: plain, clip: plain}", "probe.every=0", "reversal.lazy.period=50"]
    with pytest.raises(_Seen):
        train(load_settings(Config, None, [*world, f"output={tmp_path / 'run'}", *settings]), progress=False)
    assert len(rounds) == 4 and min(rounds) > 0


def test_what_is_sent_is_what_was_there() -> None:
    x = torch.arange(6)
    assert torch.equal(to_device(x, "cpu"), x)


def test_products_are_exact_whatever_the_environment_says() -> None:
    """Else a feature of an attackers' database is taken for its own neighbour."""
    torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE has it in some containers
    default_device()
    assert torch.get_float32_matmul_precision() == "highest"

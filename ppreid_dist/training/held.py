"""How one player is held: wrapped, differentiated, clipped, updated, read and written.

:class:`Held` is what the training calls. :class:`Whole` is a player that every process has all of, by DDP or alone;
:class:`Split` one of which every process has rows; ``training.zero`` has those that DeepSpeed parts.
"""

import copy
import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch

from ppreid_dist import distributed
from ppreid_dist.errors import RunError
from ppreid_dist.kernels import clip
from ppreid_dist.training.finite import FiniteWatch
from ppreid_dist.training.optimiser import OptimiserConfig, load_moments, make_optimiser, moments

_DDP_OPTIONS = inspect.signature(nn.parallel.DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_OPTIONS else "broadcast_buffers"  # torch 2.13


class Held(ABC):
    """One player in an engine's hands. All processes call every method but those of what :meth:`alone` returns.

    ``module`` is bare, ``parameters`` are those that train. ``forward`` is what the active player is called through,
    once for each :meth:`step`.
    """

    forward: Any

    def __init__(self, name: str, module: nn.Module, config: OptimiserConfig):
        self.name, self.module, self.config = name, module, config
        self.parameters = [p for p in module.parameters() if p.requires_grad]

    @abstractmethod
    def step(self, loss: Tensor, lr: float, beside: "Sequence[Held]" = ()) -> Tensor:
        """Differentiate, clip, update; the gradient's norm before clipping. NotFinite, of this step or, on a GPU, of
        the one before; nothing was updated by either.

        ``beside`` are split players of the same loss, clipped and updated as if all were one.
        """

    @abstractmethod
    def weights(self, *, to_save: bool = False) -> Mapping[str, Tensor]:
        """What ``module.state_dict()`` gives where the module is whole; only to be read, before the next step.

        ``to_save``: the first process will write them, and no other needs any: a copy needn't lie on the device.
        """

    @abstractmethod
    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Set them, strictly. RuntimeError or KeyError if they are another module's."""

    @abstractmethod
    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Of every trained parameter, by its number, what the optimiser knows: step, exp_avg, exp_avg_sq.

        Empty before the first step. Hyperparameters come from the configuration and are not kept.
        """

    @abstractmethod
    def load_moments(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Set what :meth:`moments` gave, under whatever engine and number of processes."""

    @abstractmethod
    def copy(self) -> Any:
        """A frozen module of its own with these weights, in eval mode."""

    @abstractmethod
    def alone(self) -> Any:
        """What a single process may call and read while the player is frozen; not to be changed or kept."""


class Whole(Held):
    """A player that every process has all of: DDP, or one process."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        config: OptimiserConfig,
        *,
        backward: Callable[[Tensor], None],
        watch: FiniteWatch,
        compile: str = "no",
    ):
        super().__init__(name, module, config)
        self._backward, self._watch, self._seen = backward, watch, False
        self.forward = self._wrap()
        if compile != "no":
            # A function of its own for each phase: the frozen player is called bare, and never by this graph.
            # A graph that the GPU replays is of one shape: steps of the game, which add strangers, have their own.
            how: dict[str, Any] = {"backend": compile}
            # A graph's backward would be traced under the forward's autocast, and round what is to stay fp32.
            if hasattr(functorch, "backward_pass_autocast"):  # not all versions can be told
                functorch.backward_pass_autocast = "off"
            if compile == "reduce-overhead":
                how = {"mode": compile, "dynamic": False}
            self.forward = torch.compile(self.forward, **how)
        self._optimiser = make_optimiser(self.parameters, config)

    def _wrap(self) -> nn.Module:
        if distributed.world_size() == 1:
            return self.module
        device = self.parameters[0].device
        # Buffers are equal on all ranks, since BatchNorm is synchronised: broadcasting them would be wasted.
        buffers: dict[str, Any] = {_SYNC_BUFFERS: False}
        # A Linear of one output has a gradient of other strides in an axis of length 1, which costs nothing.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        return nn.parallel.DistributedDataParallel(
            self.module,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **buffers,
        )

    def step(self, loss: Tensor, lr: float, beside: Sequence[Held] = ()) -> Tensor:
        together = [held for held in (self, *beside) if isinstance(held, Whole)]
        for held in together:
            for parameter in held.parameters:
                parameter.grad = None
        self._backward(loss)
        for held in together:
            held._see_gradients()
        norm = self._norm()
        for held in together[1:]:
            norm = (norm.square() + distributed.sum_over_ranks(held._norm().square())).sqrt()
        # The reduced gradient is the same on every rank, so all of them stop here together.
        self._watch.see(self.name, norm, [held._optimiser for held in together])
        for held in together:
            clip.clip_(held.parameters, self.config.clip or float("inf"), norm)
            for group in held._optimiser.param_groups:
                group["lr"] = lr
            held._optimiser.step()
        return norm

    def _see_gradients(self) -> None:
        """Once: a graph that was traced while the player was frozen would train nothing, and say nothing."""
        if not self._seen:
            lost = [key for key, p in self.module.named_parameters() if p.requires_grad and p.grad is None]
            if lost:
                raise RunError(f"the {self.name} is not trained: {lost[0]} and {len(lost) - 1} more have no gradient")
            self._seen = True

    def _norm(self) -> Tensor:
        return clip.total_norm([p.grad for p in self.parameters if p.grad is not None])

    def weights(self, *, to_save: bool = False) -> Mapping[str, Tensor]:
        return self.module.state_dict()

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        self.module.load_state_dict(state)

    def moments(self) -> dict[str, dict[str, Tensor]]:
        return moments(self._optimiser)

    def load_moments(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        load_moments(self._optimiser, saved)

    def copy(self) -> Any:
        return copy.deepcopy(self.module).eval().requires_grad_(False)

    def alone(self) -> Any:
        return self.module


class Split(Whole):
    """A module of which every process has rows of its own: no wrapper, nothing reduced."""

    def __init__(self, name: str, module: nn.Module, config: OptimiserConfig, *, rows: int, **how: Any):
        super().__init__(name, module, config, **how)
        self._rows = rows

    def _wrap(self) -> nn.Module:
        return self.module

    def weights(self, *, to_save: bool = False) -> Mapping[str, Tensor]:
        """Whole on the first process, which writes them; this process's share on the others."""
        return {key: distributed.rows_on_main(known, self._rows) for key, known in self.module.state_dict().items()}

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        self.module.load_state_dict({key: whole[distributed.share(self._rows)] for key, whole in state.items()})

    def moments(self) -> dict[str, dict[str, Tensor]]:
        return {
            number: {key: distributed.rows_on_main(t, self._rows) if t.ndim else t for key, t in sorted(known.items())}
            for number, known in super().moments().items()
        }

    def load_moments(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        own = distributed.share(self._rows)
        super().load_moments(
            {number: {key: t[own] if t.ndim else t for key, t in known.items()} for number, known in saved.items()}
        )

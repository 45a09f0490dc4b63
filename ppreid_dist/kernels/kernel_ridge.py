"""Closed-form kernel ridge regression in its dual form, several gaussian widths and ridges at once.

One implementation for the two who need it: the differentiable adversary (``losses/ridge.py``) and the attacker
that fits on frozen features (``attacks/ridge.py``). Everything is computed in float64: the systems are small, and
neither autocast, nor TF32, nor the order in which processes sum can then turn a kernel matrix indefinite.

Shapes: N fitted rows, V rows to predict, D feature dim, M target values, W widths, R ridges, X any batch axes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LINEAR = 0.0  # the width that stands for the linear kernel: the limit of ever wider gaussians, under its own scale
_TINY = 1e-12


def squared_distances(a_ND: Tensor, b_VD: Tensor) -> Tensor:
    """Squared Euclidean distances, (N, V) and >= 0. The rows are centred first, which spares digits."""
    centre_D = a_ND.detach().mean(0)
    a_ND, b_VD = a_ND - centre_D, b_VD - centre_D
    return (a_ND.square().sum(1)[:, None] + b_VD.square().sum(1)[None, :] - 2 * a_ND @ b_VD.mT).clamp_min(0)


@dataclass(frozen=True)
class Whitening:
    """Features in which no direction is louder than another, up to a rotation; make it with :func:`whitening`."""

    mean_D: Tensor
    factor_DD: Tensor

    def __call__(self, features_VD: Tensor) -> Tensor:
        """Whitened rows, float64 (V, D)."""
        centred_VD = features_VD.double() - self.mean_D
        return torch.linalg.solve_triangular(self.factor_DD, centred_VD.mT, upper=False).mT


def whitening(features_ND: Tensor, shrinkage: float = 0.1) -> Whitening:
    """Of the covariance of these rows, shrunk towards its mean variance by ``shrinkage``.

    Without shrinking the smallest directions, which are noise, would drown the others. Gradients pass through it.
    """
    features_ND = features_ND.double()
    rows, dim = features_ND.shape
    mean_D = features_ND.mean(0)
    covariance_DD = (features_ND - mean_D).mT @ (features_ND - mean_D) / rows
    # The mean over as many directions as so many rows can span.
    variance = covariance_DD.diagonal().sum() / min(max(rows - 1, 1), dim)
    eye_DD = torch.eye(dim, dtype=torch.float64, device=features_ND.device)
    factor_DD, _ = torch.linalg.cholesky_ex((1 - shrinkage) * covariance_DD + (shrinkage * variance + _TINY) * eye_DD)
    return Whitening(mean_D, factor_DD)


def gaussian_kernels(fitted_ND: Tensor, other_VD: Tensor, widths: Tensor | Sequence[float]) -> Tensor:
    """Kernels exp(-|a - b|^2 / (2 width^2 s)) between fitted and other rows, float64 (W, N, V).

    s is the mean squared distance between two different fitted rows, so that an extractor gains nothing by shrinking
    or stretching its features; gradients pass through it. The width ``LINEAR`` gives 2 <a, b> / s of centred rows.
    """
    fitted_ND, other_VD = fitted_ND.double(), other_VD.double()
    widths_W11 = torch.as_tensor(widths, dtype=torch.float64, device=fitted_ND.device)[:, None, None]
    centre_D = fitted_ND.mean(0)
    centred_ND = fitted_ND - centre_D
    scale = (2 * centred_ND.square().sum() / max(len(fitted_ND) - 1, 1)).clamp_min(_TINY)
    linear_NV = 2 * centred_ND @ (other_VD - centre_D).mT / scale
    relative_NV = squared_distances(fitted_ND, other_VD) / scale
    is_linear_W11 = widths_W11 == LINEAR
    # The unused branch of where() still has a gradient: its width must not be 0.
    gaussian_WNV = torch.exp(-relative_NV / (2 * torch.where(is_linear_W11, 1.0, widths_W11).square()))
    return torch.where(is_linear_W11, linear_NV, gaussian_WNV)


def solve(kernel_XNN: Tensor, right_XNM: Tensor, ridge: Tensor | float) -> Tensor:
    """(K + ridge N I)^-1 right, by Cholesky; (X, N, M). ``ridge`` > 0 is one number or one a system, (X).

    Differentiable in all three. Never waits for the device: not-a-number in, not-a-number out, no error raised.
    """
    ridge = torch.as_tensor(ridge, dtype=kernel_XNN.dtype, device=kernel_XNN.device)
    rows = kernel_XNN.shape[-1]
    shift_XNN = ridge[..., None, None] * rows * torch.eye(rows, dtype=kernel_XNN.dtype, device=kernel_XNN.device)
    factor_XNN, _ = torch.linalg.cholesky_ex(kernel_XNN + shift_XNN)
    return torch.cholesky_solve(right_XNM, factor_XNN)


@dataclass(frozen=True)
class KernelRidge:
    """A fitted regression; make it with :func:`fit`."""

    features_ND: Tensor
    coefficients_NM: Tensor
    mean_M: Tensor
    width: float

    def predict(self, features_VD: Tensor, *, chunk: int = 4096) -> Tensor:
        """Predicted targets (V, M), float64, computed ``chunk`` rows at a time."""
        parts = [
            gaussian_kernels(self.features_ND, rows_CD, [self.width])[0].mT @ self.coefficients_NM
            for rows_CD in features_VD.split(chunk)
        ]
        return torch.cat(parts) + self.mean_M

    def affine(self) -> tuple[Tensor, Tensor]:
        """Of the width ``LINEAR``: the matrix (D, M) and the origin (M) of f @ matrix + origin, float64."""
        dim = self.features_ND.shape[1]
        origin_M = self.predict(self.features_ND.new_zeros(1, dim))[0]
        return self.predict(torch.eye(dim).to(self.features_ND)) - origin_M, origin_M


def fit(features_ND: Tensor, targets_NM: Tensor, *, width: float, ridge: float) -> KernelRidge:
    """Regress targets, centred on their mean, on features; see :func:`gaussian_kernels` for ``width``.

    Minimises mean squared error + ridge * squared norm, hence ``ridge`` means the same for any N.
    """
    targets_NM = targets_NM.double()
    mean_M = targets_NM.mean(0)
    kernel_NN = gaussian_kernels(features_ND, features_ND, [width])[0]
    return KernelRidge(features_ND, solve(kernel_NN, targets_NM - mean_M, ridge), mean_M, width)


@torch.no_grad()
def sweep(
    features_ND: Tensor, targets_NM: Tensor, asked_VD: Tensor, widths: Sequence[float], ridges: Sequence[float]
) -> Iterator[tuple[int, int, Tensor]]:
    """The numbers of every width and ridge, with the targets (V, M), float64, that they predict for ``asked_VD``.

    One eigendecomposition a width serves all its ridges.
    """
    targets_NM = targets_NM.double()
    mean_M = targets_NM.mean(0)
    for w, width in enumerate(widths):
        values_N, vectors_NN = torch.linalg.eigh(gaussian_kernels(features_ND, features_ND, [width])[0])
        basis_VN = gaussian_kernels(features_ND, asked_VD, [width])[0].mT @ vectors_NN
        rotated_NM = vectors_NN.mT @ (targets_NM - mean_M)
        for r, ridge in enumerate(ridges):
            yield w, r, (basis_VN / (values_N.clamp_min(0) + ridge * len(values_N))) @ rotated_NM + mean_M


def search(
    features_ND: Tensor,
    targets_NM: Tensor,
    validation_VD: Tensor,
    validation_VM: Tensor,
    widths: Sequence[float],
    ridges: Sequence[float],
) -> Tensor:
    """Mean squared validation error of every width and ridge, float64 (W, R), on the features' device."""
    errors_WR = torch.empty(len(widths), len(ridges), dtype=torch.float64, device=features_ND.device)
    for w, r, predicted_VM in sweep(features_ND, targets_NM, validation_VD, widths, ridges):
        errors_WR[w, r] = (predicted_VM - validation_VM.double()).square().mean()
    return errors_WR


def choose(
    features_ND: Tensor,
    targets_NM: Tensor,
    validation_VD: Tensor,
    validation_VM: Tensor,
    widths: Sequence[float],
    ridges: Sequence[float],
) -> tuple[float, float, float]:
    """The width and the ridge of least mean squared validation error, and that error."""
    errors_WR = search(features_ND, targets_NM, validation_VD, validation_VM, widths, ridges)
    w, r = divmod(int(errors_WR.argmin()), len(ridges))
    return widths[w], ridges[r], float(errors_WR[w, r])

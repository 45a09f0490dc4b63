"""Kernel distance of two sets of pictures by their features: how far reconstructions, as a set, are from real ones.

Bińkowski, Sutherland, Arbel, Gretton, "Demystifying MMD GANs", ICLR 2018. Their KID takes Inception's features; this
takes any, so that its figures compare only with others of the same network.

Shapes: N real and M drawn pictures, D feature dim.
"""

from torch import Tensor

_ROWS = 1024  # of a kernel matrix at a time


def kernel_distance(real_ND: Tensor, drawn_MD: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (xᵀy / D + 1)³, in float64.

    0 in the mean where both sets come from one distribution, and it may then be less than 0; NaN where a set has
    fewer than two pictures.
    """
    n, m = len(real_ND), len(drawn_MD)
    if min(n, m) < 2:
        return float("nan")
    real_ND, drawn_MD = real_ND.double(), drawn_MD.double()
    within = [
        (_kernel_sum(x_ND, x_ND) - float(_kernel(x_ND.square().sum(1), x_ND.shape[1]).sum())) / (rows * (rows - 1))
        for x_ND, rows in ((real_ND, n), (drawn_MD, m))
    ]
    return sum(within) - 2 * _kernel_sum(real_ND, drawn_MD) / (n * m)


def _kernel(products: Tensor, dim: int) -> Tensor:
    return (products / dim + 1) ** 3


def _kernel_sum(x_ND: Tensor, y_MD: Tensor) -> float:
    return sum(float(_kernel(rows @ y_MD.T, x_ND.shape[1]).sum()) for rows in x_ND.split(_ROWS))

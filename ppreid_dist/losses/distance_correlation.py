"""Distance correlation between stored features and pictures: the NoPeek objective, an adversary without a network.

Shapes: N rows of all processes, D feature dim, M picture values.
"""

from torch import Tensor

from ppreid_dist.kernels.kernel_ridge import squared_distances


def distance_correlation(features_ND: Tensor, pictures_NM: Tensor) -> Tensor:
    """Squared sample distance correlation, in [0, 1]: 0 is independence at best, 1 a similarity map; a scalar.

    dCov^2(x, y) / sqrt(dVar^2(x) dVar^2(y)) with double-centred Euclidean distance matrices (Szekely et al., Annals
    of Statistics 2007), used as an objective by NoPeek (Vepakomma et al., ICDM workshops 2020). It is the biased
    (V-) statistic: independent rows give a value above 0 that shrinks with N. The rows come gathered over processes,
    so that every one computes the same number. Constant features give 0.
    """
    features_NN, pictures_NN = _centred_distances(features_ND), _centred_distances(pictures_NM)
    covariance = (features_NN * pictures_NN).mean()
    # Under the root, not after it: constant features then have a finite gradient.
    variances = features_NN.square().mean() * pictures_NN.square().mean()
    return (covariance / variances.clamp_min(1e-24).sqrt()).to(features_ND.dtype)


def _centred_distances(x_ND: Tensor) -> Tensor:
    squared_NN = squared_distances(x_ND.double(), x_ND.double())
    # The clamp takes the gradient of pairs at distance 0 (the diagonal, repeated pictures), where it would be infinite.
    d_NN = squared_NN.clamp_min(1e-12).sqrt()
    return d_NN - d_NN.mean(0, keepdim=True) - d_NN.mean(1, keepdim=True) + d_NN.mean()

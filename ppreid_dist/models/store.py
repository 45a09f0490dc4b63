"""T: what a gallery keeps of an embedding, the feature that a leaked database shows.

Plain, it is the embedding at unit norm. The other kinds are what galleries are told to do against reversal without
training anything; they are put on a finished extractor (``ppreid store``), and serve as rivals of training:

    noise      a Gaussian vector beside it, the same for the same embedding
    adversarial   moved to where the gallery's own decoder errs most (after AdvFace, Wang et al., ECCV 2022); where that
               is turns with the third digit of a feature, so that pictures decoded elsewhere are moved elsewhere
    pca        its projection on the ``dim`` main directions of the training people's features
    rotation   the same after a secret rotation, which keeps every distance
    signs      the signs of ``dim`` secret random projections (Charikar, STOC 2002)
    codes      the signs of ``dim`` secret waves over its main directions: near features agree in most of them;
               beyond a few ``width`` it is lost how far two are apart (Boufounos & Rane, WIFS 2011). Their waves'
               lengths are drawn too, and long ones tell of far distances: whoever has people of his own finds them
               out (``attacks.agreement``). With ``spectrum: shell`` all are equally long
    cells      ``dim`` secret bits, each of the cell in which its main directions lie, between secret walls ``width``
               apart (locality-sensitive hashing; Indyk & Motwani, STOC 1998): features in the same cell have the same
               bit, and of others' cells a bit says nothing. Waves go on beyond where somebody's people are; a hash of
               cells doesn't, so that what it tells is how many bits two features share, and no more

All but ``noise`` at unit norm again. int8 comes last of all. A kind is a class in ``models/stores``, under its
name in :data:`KINDS`.
"""

from ppreid_dist.models.stores.base import Store, StoreConfig
from ppreid_dist.models.stores.coded import Cells, Codes
from ppreid_dist.models.stores.moved import Adversarial, Noise
from ppreid_dist.models.stores.projected import Pca, Rotation, Signs

KINDS: dict[str, type[Store]] = {
    "plain": Store,
    "noise": Noise,
    "adversarial": Adversarial,
    "pca": Pca,
    "rotation": Rotation,
    "signs": Signs,
    "codes": Codes,
    "cells": Cells,
}


def make_store(config: StoreConfig, dim: int) -> Store:
    """What keeps embeddings of ``dim`` numbers as ``config`` says, on the CPU. ConfigError naming the setting that
    suits no such embedding."""
    return KINDS[config.kind](config, dim)

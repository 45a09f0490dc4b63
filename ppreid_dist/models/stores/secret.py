"""Secrets that are drawn from a key.

Shapes: B batch, D the embedding's dim, A those of its directions that count, S the stored dim.
"""

import dataclasses
import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from ppreid_dist.models.stores.base import Store, StoreConfig


class Secret(Store):
    """A kind that draws ``secret_AS`` from its key."""

    secret_AS: Tensor

    def __init__(self, config: StoreConfig, dim: int):
        super().__init__(config, dim)
        # A key makes its secrets again; only what was fitted is to be kept.
        self.register_buffer("secret_AS", self._draw().float(), persistent=False)

    def _draw(self) -> Tensor:
        """Float64 and Gaussian."""
        return torch.special.ndtri(drawn(self.config.key, "directions", self.embedding_dim, self.dim))

    def rekeyed(self) -> Store:
        if not self.keyed:
            return self
        other = type(self)(dataclasses.replace(self.config, key=self.config.key + 1), self.embedding_dim)
        other.load_state_dict(self.state_dict())
        return other.to(self.secret_AS.device)


def drawn(key: int, what: str, *shape: int) -> Tensor:
    """The secret ``what`` of a key: numbers spread evenly within (0, 1), float64, the same on every platform.

    From a hash, since torch's generator on the CPU keeps 32 bits of its seed, and so few keys can all be tried.
    """
    label = f"ppreid_dist model.store {what} {key}"
    words = np.frombuffer(hashlib.shake_256(label.encode()).digest(4 * math.prod(shape)), dtype="<u4")
    return torch.from_numpy((words + 0.5) * 2.0**-32).reshape(shape)


def drawn_words(key: int, what: str, *shape: int) -> Tensor:
    """The same as int64, evenly spread."""
    label = f"ppreid_dist model.store {what} {key}"
    words = np.frombuffer(hashlib.shake_256(label.encode()).digest(8 * math.prod(shape)), dtype="<i8")
    return torch.from_numpy(words.astype(np.int64)).reshape(shape)


def siphash(key_2: Tensor, words: list[Tensor]) -> Tensor:
    """SipHash-2-4, a keyed hash that nobody without its 128 bits of key is known to tell from chance (Aumasson &
    Bernstein, INDOCRYPT 2012): of messages whose 64-bit words are ``words``, int64 of one shape, int64 of that shape.
    """
    low, high = key_2
    state = [low ^ 0x736F6D6570736575, high ^ 0x646F72616E646F6D, low ^ 0x6C7967656E657261, high ^ 0x7465646279746573]
    length = torch.full_like(words[0], 8 * len(words))
    for word in (*words, length << 56):
        state[3] = state[3] ^ word
        state = _sip_rounds(state, 2)
        state[0] = state[0] ^ word
    state[2] = state[2] ^ 0xFF
    a, b, c, d = _sip_rounds(state, 4)
    return a ^ b ^ c ^ d


def _sip_rounds(state: list[Tensor], rounds: int) -> list[Tensor]:
    a, b, c, d = state
    for _ in range(rounds):
        a, c = a + b, c + d
        b, d = _turned(b, 13) ^ a, _turned(d, 16) ^ c
        a, c = _turned(a, 32) + d, c + b
        b, d = _turned(b, 17) ^ c, _turned(d, 21) ^ a
        c = _turned(c, 32)
    return [a, b, c, d]


def _turned(word: Tensor, bits: int) -> Tensor:
    """Rotated to the left; int64 fills with its sign where it is shifted to the right."""
    return word << bits | word >> 64 - bits & (1 << bits) - 1

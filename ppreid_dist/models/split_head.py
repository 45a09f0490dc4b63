"""An identity head for very many identities: every process holds the weights of some of them only.

Shapes: D feature dim, C identities, c those of this process.
"""

import torch
from torch import Tensor, nn

from ppreid_dist import distributed

_BLOCK = 1024  # identities drawn at a time


class SplitHead(nn.Module):
    """A classifier without bias, of which this process has its ``distributed.share`` of rows.

    ``losses.identity.split_identity_loss`` takes its logits. Not synchronised: each process trains
    its own rows, from the features of all.
    """

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.classes = classes
        self.rows = distributed.share(classes)
        self.weight = nn.Parameter(torch.empty(self.rows.stop - self.rows.start, dim))
        self._draw(int(torch.randint(2**31, ())))

    @torch.no_grad()
    def _draw(self, seed: int) -> None:
        """What an identity begins with doesn't depend on the number of processes, and no process draws all rows."""
        for block in range(self.rows.start // _BLOCK, -(-self.rows.stop // _BLOCK)):
            first = block * _BLOCK
            generator = torch.Generator().manual_seed(seed + block)
            drawn = torch.empty(_BLOCK, self.weight.shape[1]).normal_(std=0.001, generator=generator)
            start, stop = max(first, self.rows.start), min(first + _BLOCK, self.rows.stop)
            self.weight[start - self.rows.start : stop - self.rows.start] = drawn[start - first : stop - first]

    def forward(self, embedding_ND: Tensor) -> Tensor:
        """Logits (N, c) of this process's identities, from the rows of all processes; fp32 under autocast, too."""
        with torch.autocast(embedding_ND.device.type, enabled=False):
            return embedding_ND.float() @ distributed.own(self.weight).mT

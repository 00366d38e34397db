"""What routing and mixing pass to each other.

Axes: N tokens, K chosen experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    pass


class Routing(NamedTuple):
    """What a router decided at one site.

    Attributes:
        weights_NK: fp32; each row sums to 1 (`merged`: where all experts adapt the site).
        expert_ids_NK: int64, distinct within a row.
    """

    weights_NK: torch.Tensor
    expert_ids_NK: torch.Tensor

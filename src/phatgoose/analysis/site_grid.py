"""Arranges sites in a grid of layers and kinds, by their names.

Axes: M sites, L layers, K kinds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from phatgoose.experts.site_names import describe_site

Array = NDArray[np.float64]


class SiteGrid:
    """Layer and kind of each site.

    A layer is the first number in a site's name, after "encoder " or "decoder "
    in an encoder-decoder model. A kind is the shortest end of the rest of the
    name that is unique: "q_proj", but "attn.c_proj" and "mlp.c_proj". Sites
    that differ only in a further number, such as the experts of an MoE layer,
    have the same kind.

    Args:
        sites: names, in the order of the model.
        encoder_decoder: whether the model is an encoder-decoder.

    Attributes:
        layers, kinds: labels, in the order of the model.
        layer_M, kind_M: indices of each site's labels.
    """

    def __init__(self, sites: Sequence[str], *, encoder_decoder: bool = False) -> None:
        described = [describe_site(site, encoder_decoder=encoder_decoder) for site in sites]
        rests = [_rest(site) for site in sites]
        short = _shortest(list(dict.fromkeys(rests)))
        self.layers = list(dict.fromkeys(site.layer for site in described))
        self.kinds = list(dict.fromkeys(short[rest] for rest in rests))
        self.layer_M = np.array([self.layers.index(site.layer) for site in described])
        self.kind_M = np.array([self.kinds.index(short[rest]) for rest in rests])

    def cells(self, values: Array) -> Array:
        """Means over the sites of each layer and kind.

        Args:
            values: shape (..., M); NaN is ignored.

        Returns:
            Means of shape (..., L, K); NaN where there is no site.
        """
        shape = (len(self.layers), len(self.kinds))
        cell_M = self.layer_M * shape[1] + self.kind_M
        return _group_means(values, cell_M, shape[0] * shape[1]).reshape(*values.shape[:-1], *shape)

    def by_layer(self, values: Array) -> Array:
        """Means over the sites of each layer, (..., M) -> (..., L)."""
        return _group_means(values, self.layer_M, len(self.layers))


def _group_means(values: Array, group_M: NDArray[np.int64], num_groups: int) -> Array:
    member_MG = np.eye(num_groups)[group_M]
    known = ~np.isnan(values)
    counts = known.astype(np.float64) @ member_MG
    sums = np.where(known, values, 0.0) @ member_MG
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _rest(site: str) -> str:
    """A site's name after its first number, without further numbers; all of it if it has none."""
    parts = site.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(part for part in parts[numbers[0] + 1 if numbers else 0 :] if not part.isdigit())


def _shortest(names: Sequence[str]) -> dict[str, str]:
    """For each name, the fewest of its last parts that no other name ends with."""
    shortest = {}
    for name in names:
        parts = name.split(".")
        others = [f".{other}" for other in names if other != name]
        ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        shortest[name] = next((end for end in ends if not any(o.endswith(f".{end}") for o in others)), name)
    return shortest

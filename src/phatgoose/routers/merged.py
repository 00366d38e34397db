"""Merged Experts: one average update for every token, which no token can choose.

    merged               dW = 1/E * sum over experts of scaling * B A    (average of the outer products)
    merged-parameters    dW = (1/E sum scaling B) (1/E sum A)            (parameter average)

Source: paper section 4.2 and its appendix. The first is what the paper calls
Merged Experts; its rank may reach E * R, so it is computed as the sum of the
experts' updates, never formed. An expert that does not adapt a site counts as an
update of zero there. The official code's function for the first is missing from
its repository; the second is its `average_lora_weights`.
"""

from __future__ import annotations

import torch

from phatgoose.config import RouterConfig
from phatgoose.experts.stack import SiteStack
from phatgoose.kernels import Backend
from phatgoose.kernels.types import Routing
from phatgoose.routers.uniform import Uniform


class Merged(Uniform):
    """The average of the outer products: weight 1/E for every expert."""

    counted_E: torch.Tensor

    def __init__(self, stack: SiteStack, config: RouterConfig) -> None:
        super().__init__(stack, config)
        filled_E = torch.ones_like(stack.present_E) if stack.filled_E is None else stack.filled_E
        self.register_buffer("counted_E", filled_E.float(), persistent=False)

    def choose(self, scores_NE: torch.Tensor, mask_NE: torch.Tensor | None = None) -> Routing:
        """See `Router.choose`: 1/E for each expert that adapts the site and is not masked."""
        masked_N1 = 0 if mask_NE is None else mask_NE.isinf().sum(dim=1, keepdim=True)
        weights_NE = (scores_NE > float("-inf")).float() / (self.counted_E.sum() - masked_N1)
        return super().choose(scores_NE)._replace(weights_NK=weights_NE.nan_to_num(0.0, posinf=0.0))


class MergedParameters(Merged):
    """The average of the parameters."""

    def mix(
        self, x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor, routing: Routing, backend: Backend
    ) -> torch.Tensor:
        """See `Router.mix`: the update under the weighted sums of the factors, with cross terms between experts.

            y[n] = (sum over k of w[n, k] B[ids[n, k]]) (sum over k of w[n, k] A[ids[n, k]]) x[n]

        Computes every expert for every token; extra memory is N * E * R numbers.
        """
        num_experts, rank, _ = a_ERI.shape
        h_NER = (x_NI @ a_ERI.reshape(num_experts * rank, -1).T).view(-1, num_experts, rank)
        weights_NE = routing.weights_NK.new_zeros(len(x_NI), num_experts)
        weights_NE1 = weights_NE.scatter_add(1, *routing[::-1]).to(h_NER.dtype).unsqueeze(2)
        h_N1R = (h_NER * weights_NE1).sum(dim=1, keepdim=True)
        return (h_N1R * weights_NE1).view(-1, num_experts * rank) @ b_ERO.reshape(num_experts * rank, -1)

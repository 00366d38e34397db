"""Routing and mixing in PyTorch's own operations: each function here is a backend, or the router's rule.

`dense` runs every expert; `gather` copies each token's factors; `grouped` sorts (token, expert) pairs; `vectors` reads
factors where they lie. `choose.py` says which shape takes which.

Axes: N tokens, K chosen experts, E experts, I in-features, O out-features, R rank, M = N * K pairs, S = E * R or K * R.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from phatgoose.kernels import reference
from phatgoose.kernels.types import Layer, Routing, Rule

# grouped_mm wants every row to start at a multiple of 16 bytes
_ALIGNMENT = 16


def dense(x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Small pools: every expert on every token, then a mask. Two plain products; extra memory N * E * R numbers."""
    num_experts, rank, _ = a_ERI.shape
    h_NS = x_NI @ a_ERI.reshape(num_experts * rank, -1).T
    weights_NE = _spread(routing, num_experts)
    h_NER = h_NS.view(-1, num_experts, rank) * weights_NE.to(h_NS.dtype).unsqueeze(2)
    return h_NER.view(-1, num_experts * rank) @ b_ERO.reshape(num_experts * rank, -1)


def gather(x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Few tokens: each token's factors, copied side by side, in two batched products.

    Extra memory: N * K * R * (I + O) numbers.
    """
    (num_tokens, top_k), rank = routing.expert_ids_NK.shape, a_ERI.shape[1]
    ids_M = routing.expert_ids_NK.reshape(-1)
    # the K experts of a token act as one LoRA of rank K * R
    a_NSI = a_ERI[ids_M].view(num_tokens, top_k * rank, a_ERI.shape[2])
    b_NSO = b_ERO[ids_M].view(num_tokens, top_k * rank, b_ERO.shape[2])
    h_NS = torch.bmm(a_NSI, x_NI.unsqueeze(2)).squeeze(2)
    h_NS = h_NS * routing.weights_NK.to(h_NS.dtype).repeat_interleave(rank, dim=1)
    return torch.bmm(h_NS.unsqueeze(1), b_NSO).squeeze(1)


def grouped(x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Many tokens: pairs sorted by expert, then two grouped products.

    No loop over experts, and nothing is copied to the host. The K results of a token are summed by a reshape, so the
    same input gives the same bits. Extra memory: a few times N * K * (I + O) numbers.
    """
    num_tokens, top_k = routing.expert_ids_NK.shape
    out_features = b_ERO.shape[2]
    step = _ALIGNMENT // x_NI.element_size()
    x_NI, a_ERI = _pad(x_NI, step), _pad(a_ERI, step)
    b_ERO = _pad(b_ERO, step)
    if a_ERI.shape[1] % step:
        a_ERI, b_ERO = _pad(a_ERI, step, dim=1), _pad(b_ERO, step, dim=1)

    sorted_M, order_M = torch.sort(routing.expert_ids_NK.reshape(-1), stable=True)
    experts_E = torch.arange(a_ERI.shape[0], device=x_NI.device)
    ends_E = torch.searchsorted(sorted_M, experts_E, right=True).to(torch.int32)
    h_MR = F.grouped_mm(x_NI.index_select(0, order_M // top_k), a_ERI.transpose(1, 2), offs=ends_E)
    h_MR = h_MR * routing.weights_NK.reshape(-1)[order_M].to(h_MR.dtype).unsqueeze(1)
    y_MO = F.grouped_mm(h_MR, b_ERO, offs=ends_E)
    back_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(order_M.numel(), device=x_NI.device))
    return y_MO.index_select(0, back_M).view(num_tokens, top_k, y_MO.shape[1]).sum(1)[:, :out_features]


def vectors(x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Few tokens on a CPU: products of a matrix and a vector, with the factors read where they lie.

    Reads the routing on the host, which would wait for a GPU. Nothing is copied; y is added to in place. Where
    autograd records, `reference` computes.
    """
    weights_NK, expert_ids_NK = routing
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x_NI, a_ERI, b_ERO, weights_NK)):
        return reference.mix_loras(x_NI, a_ERI, b_ERO, routing)
    y_NO = x_NI.new_zeros(x_NI.shape[0], b_ERO.shape[2])
    for n, (weights_K, expert_ids_K) in enumerate(zip(weights_NK.tolist(), expert_ids_NK.tolist(), strict=True)):
        x_I, y_O = x_NI[n], y_NO[n]
        for weight, e in zip(weights_K, expert_ids_K, strict=True):
            y_O.addmv_(b_ERO[e].t(), torch.mv(a_ERI[e], x_I), alpha=weight)
    return y_NO


def route(x_NI: torch.Tensor, layer: Layer, rule: Rule) -> Routing:
    """The routing that `phatgoose.kernels.route_and_add_` describes; torch.topk promises no order of equal scores."""
    prototypes_EI = layer.gates_HPI[:, : len(layer.a_ERI)].float().sum(dim=0)
    scores_NE = F.layer_norm(x_NI.float(), x_NI.shape[-1:], eps=rule.eps) @ prototypes_EI.T
    if layer.bias_NE is not None:
        scores_NE = scores_NE + layer.bias_NE
    top_NK, expert_ids_NK = torch.topk(scores_NE, rule.top_k, dim=-1)
    return Routing(torch.softmax(top_NK / rule.temperature, dim=-1).nan_to_num(0.0), expert_ids_NK)


def _spread(routing: Routing, num_experts: int) -> torch.Tensor:
    """weights_NE, 0 where an expert was not chosen. Added up, because a router may name one expert twice."""
    weights_NK, expert_ids_NK = routing
    return weights_NK.new_zeros(weights_NK.shape[0], num_experts).scatter_add(1, expert_ids_NK, weights_NK)


def _pad(t: torch.Tensor, step: int, dim: int = -1) -> torch.Tensor:
    missing = -t.shape[dim] % step
    if missing == 0:
        return t
    return F.pad(t, (0, missing) if dim == -1 else (0, 0, 0, missing))

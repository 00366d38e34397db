"""How often rounded gates choose other experts than exact ones, and what that does to a layer's output.

    python benchmarks/flips.py --out benchmarks/rows/flips.csv

Random gates and bf16 activations of 4096 features, top-2, rank 16. Every variant is compared with fp64. A flip is a
token whose set of experts differs; `share_of_update` is the norm of the change of the update, over the norm of the
update, for tokens that flipped (median), and `worst_weight` the largest change of a routing weight among the others.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from measuring import write_rows
from torch.nn import functional as F

from phatgoose.kernels import Routing
from phatgoose.kernels.eager import grouped
from phatgoose.kernels.prototypes import split
from phatgoose.routers.phatgoose import standardise

INPUTS, OUTPUTS, RANK, TOP_K, EPS = 4096, 256, 16, 2, 1e-5


def variants(x_NI: torch.Tensor, prototypes_EI: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name -> scores_NE, as they come from fp32 sums of products."""
    wide_NI = x_NI.float()
    mean_N1 = wide_NI.mean(1, keepdim=True)
    rstd_N1 = torch.rsqrt(wide_NI.var(1, correction=0, keepdim=True) + EPS)
    gates_HPI, gate_sums_E = split(prototypes_EI, torch.bfloat16)
    hi_EI, lo_EI = gates_HPI[:, : len(prototypes_EI)]
    hi_NE, lo_NE = wide_NI @ hi_EI.float().T, wide_NI @ lo_EI.float().T
    only_hi_E = hi_EI.double().sum(1).float()
    return {
        "fp32": F.layer_norm(wide_NI, (INPUTS,), eps=EPS) @ prototypes_EI.T,
        "bf16": hi_NE * rstd_N1,
        "bf16, its mean taken out": (hi_NE - mean_N1 * only_hi_E) * rstd_N1,
        "hi + lo (ours)": (hi_NE + lo_NE - mean_N1 * gate_sums_E) * rstd_N1,
    }


def main() -> None:
    """Print and write rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[36, 166, 1000])
    parser.add_argument("--means", type=float, nargs="+", default=[0.0, 1.0], help="of the activations, in spreads")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for experts in args.experts:
        for mean in args.means:
            torch.manual_seed(0)
            found: dict[str, list[tuple[float, float, float]]] = {}
            a_ERI, b_ERO = torch.randn(experts, RANK, INPUTS) / 64, torch.randn(experts, RANK, OUTPUTS) / 4
            for _ in range(args.batches):
                prototypes_EI = standardise(torch.randn(experts, INPUTS), EPS) / INPUTS**0.5
                x_NI = (torch.randn(args.tokens, INPUTS) + mean).bfloat16()
                exact_NE = F.layer_norm(x_NI.double(), (INPUTS,), eps=EPS) @ prototypes_EI.double().T
                for name, scores_NE in variants(x_NI, prototypes_EI).items():
                    found.setdefault(name, []).append(compare(x_NI, scores_NE, exact_NE, a_ERI, b_ERO))
            for name, results in found.items():
                flips, shares, weights = zip(*results, strict=True)
                share = max((s for s in shares if s == s), default=float("nan"))
                rows.append(
                    {"experts": experts, "mean": mean, "tokens": args.tokens * args.batches, "variant": name,
                     "flips": f"{sum(flips) / len(flips):.6f}", "share_of_update": f"{share:.3f}",
                     "worst_weight": f"{max(weights):.2e}"}
                )  # fmt: skip
                print(rows[-1], flush=True)
    if args.out:
        write_rows(args.out, rows)


def compare(
    x_NI: torch.Tensor, scores_NE: torch.Tensor, exact_NE: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor
) -> tuple[float, float, float]:
    """(share of tokens that flipped, median change of their updates, largest change of the others' weights)."""
    (found_NK, ids_NK), (top_NK, true_NK) = scores_NE.topk(TOP_K), exact_NE.topk(TOP_K)
    flipped_N = (ids_NK.sort(1).values != true_NK.sort(1).values).any(1)
    same_N = (ids_NK == true_NK).all(1)
    weights = (found_NK.double().softmax(1) - top_NK.softmax(1)).abs()[same_N].max()
    share = float("nan")
    if flipped_N.any():
        x = x_NI[flipped_N].float()
        y = grouped(x, a_ERI, b_ERO, Routing(found_NK[flipped_N].float().softmax(1), ids_NK[flipped_N]))
        true = grouped(x, a_ERI, b_ERO, Routing(top_NK[flipped_N].float().softmax(1), true_NK[flipped_N]))
        share = float(((y - true).norm(dim=1) / true.norm(dim=1)).median())
    return float(flipped_N.double().mean()), share, float(weights)


if __name__ == "__main__":
    main()

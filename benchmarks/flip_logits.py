"""What rounded gates do to the logits of a real model: the demo's pool and base, on this repository's own documents.

    python benchmarks/flip_logits.py --out benchmarks/rows/flip_logits.csv

The model is in fp32, top-2. Every variant of the gates is compared with fp32 gates: `flips` is the share of (token,
site) pairs with another set of experts, `tokens_with_flips` that of tokens with one at some site, `logits_change` the
norm of the change of a token's logits over the norm of their spread around their mean (median of all tokens, median of
those with a flip, and largest), `top_changed` the share of tokens whose most likely next token is another one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from measuring import write_rows

from phatgoose.experts.pool import Pool
from phatgoose.kernels.prototypes import split
from phatgoose.models.base import load_base, load_tokenizer
from phatgoose.routers.phatgoose import Phatgoose
from phatgoose.routing.model import RoutedModel

ROOT = Path(__file__).parent.parent
TEXTS = ("docs/routers.md", "docs/analysis.md", "docs/architecture.md", "README.md", "CONTRIBUTING.md")


class Pass(NamedTuple):
    """Logits of all tokens, (B, S, V), and the chosen experts at each site, sorted, (sites, B, S, K)."""

    logits: torch.Tensor
    experts: torch.Tensor


def rounded(prototypes_EI: torch.Tensor, variant: str) -> torch.Tensor:
    """Gates as the kernels would read them: one number of bf16, or the sum of two."""
    if variant == "fp32":
        return prototypes_EI
    gates_PI = split(prototypes_EI, torch.bfloat16).gates_HPI[:, : len(prototypes_EI)].float()
    return gates_PI[0] if variant == "bf16" else gates_PI.sum(0)


@torch.no_grad()
def run(model: RoutedModel, ids_BS: torch.Tensor, exact: dict[str, torch.Tensor], variant: str) -> Pass:
    """One variant; the model is left with its gates."""
    for site, linear in model.routed_linears().items():
        assert isinstance(linear.router, Phatgoose)
        linear.router.prototypes_EI = rounded(exact[site], variant)
    logits, experts = [], []
    for ids_S in ids_BS.split(1):
        with model.trace() as trace:
            logits.append(model(ids_S).logits)
        experts.append(torch.stack([trace.routing(site).expert_ids_BSK.sort(-1).values for site in trace.sites]))
    return Pass(torch.cat(logits), torch.cat(experts, dim=1))


def compare(found: Pass, true: Pass, variant: str, num_experts: int) -> dict[str, object]:
    """A row."""
    flipped = (found.experts != true.experts).any(-1)  # (sites, B, S)
    hit = flipped.any(0)
    spread = true.logits - true.logits.mean(-1, keepdim=True)
    change = (found.logits - true.logits).norm(dim=-1) / spread.norm(dim=-1)
    top = (found.logits.argmax(-1) != true.logits.argmax(-1)).double().mean()
    return {
        "variant": variant,
        "experts": num_experts,
        "sites": len(flipped),
        "tokens": hit.numel(),
        "flips": f"{float(flipped.double().mean()):.6f}",
        "tokens_with_flips": f"{float(hit.double().mean()):.4f}",
        "logits_change": f"{float(change.median()):.2e}",
        "logits_change_with_flips": f"{float(change[hit].median()):.2e}" if hit.any() else "",
        "logits_change_most": f"{float(change.max()):.2e}",
        "top_changed": f"{float(top):.5f}",
    }


def main() -> None:
    """Print and write rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, default=ROOT / "demo/pool")
    parser.add_argument("--sequences", type=int, default=12)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    pool = Pool.open(args.pool)
    tokenizer = load_tokenizer(pool.base.name, pool.base.revision)
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in TEXTS)
    ids = torch.tensor(tokenizer(text)["input_ids"])[: args.sequences * args.length].view(-1, args.length)
    # a backend that leaves routing to the router's own code
    model = RoutedModel.from_pool(load_base(pool.base.name, pool.base.revision), pool, backend="grouped")
    exact = {site: linear.router.get_buffer("prototypes_EI") for site, linear in model.routed_linears().items()}
    true = run(model, ids, exact, "fp32")
    rows = []
    for variant in ("bf16", "hi + lo (ours)"):
        rows.append(compare(run(model, ids, exact, variant), true, variant, len(pool)))
        print(rows[-1], flush=True)
    if args.out:
        write_rows(args.out, rows)


if __name__ == "__main__":
    main()

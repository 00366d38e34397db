"""A router of your own: each token takes the experts whose updates of it are largest.

Run: python examples/new_router.py
"""

from pathlib import Path
from typing import Any

import torch

from phatgoose import Pool, RoutedModel, Router, RouterConfig, load_tokenizer

POOL = Path(__file__).parents[1] / "demo/pool"


class UpdateNorm(Router):
    """score = |B A u|; needs nothing but the adapters."""

    def __init__(self, stack: Any, config: RouterConfig) -> None:
        super().__init__(stack, config)
        b_ERO = stack.b_ERO.float()
        # buffers begin with the expert axis; |B h|^2 = h' (B B') h spares a tensor of tokens x experts x features
        self.register_buffer("a_ERI", stack.a_ERI.float(), persistent=False)
        self.register_buffer("gram_ERR", b_ERO @ b_ERO.mT, persistent=False)

    def scores(self, x_NI: torch.Tensor) -> torch.Tensor:
        h_NER = torch.einsum("ni,eri->ner", x_NI.float(), self.a_ERI)
        return torch.einsum("ner,erq,neq->ne", h_NER, self.gram_ERR, h_NER).clamp(min=0).sqrt()


def main() -> None:
    pool = Pool.open(POOL)
    model = RoutedModel.from_pool(pool.base.name, pool, router=UpdateNorm, top_k=2)
    tokenizer = load_tokenizer(pool.base.name)
    inputs = tokenizer("Write one sentence with these words: lamp, cat, window\n", return_tensors="pt")
    ids_BS = model.generate(**inputs, max_new_tokens=20)
    print(tokenizer.decode(ids_BS[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()

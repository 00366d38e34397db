"""Ask the demo's pool a question, and see which expert carried each token.

Run: python examples/route.py "Is the sky blue?"
"""

import sys
from pathlib import Path

import torch

from phatgoose import Pool, RoutedModel, load_tokenizer

POOL = Path(__file__).parents[1] / "demo/pool"


def main(prompt: str) -> None:
    pool = Pool.open(POOL)
    tokenizer = load_tokenizer(pool.base.name)
    model = RoutedModel.from_pool(pool.base.name, pool, router="phatgoose", top_k=2)
    inputs = tokenizer(f"{prompt}\n", return_tensors="pt")
    with model.trace() as trace:
        ids_S = model.generate(**inputs, max_new_tokens=12)[0]
    print(tokenizer.decode(ids_S, skip_special_tokens=True))

    # the mean over all routed layers; the last token was written, but never read
    weights_SE = torch.stack([trace.weights(site)[0] for site in trace.sites]).mean(dim=0)
    for token, weights_E in zip(ids_S, weights_SE, strict=False):
        leader = trace.expert_names[int(weights_E.argmax())]
        print(f"{tokenizer.decode([int(token)])!r:>16}  {leader:<16}{weights_E.max():.0%}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "Is this review good or bad?\n\nI would watch it again tomorrow.")

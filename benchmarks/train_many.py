"""One expert at a time beside many over one forward pass, in one run.

    python benchmarks/train_many.py --shape smollm2-135m --dtype bf16 --device cuda \
        --experts 8 16 --out benchmarks/rows/train_many.csv

Random weights, random words; every row is `--length` tokens long, the last
`--targets` of them are targets. LoRA on all linear layers. "PEFT" is what
`train_adapter` does: transformers' Trainer on PEFT's model, one expert at a
time, without checkpoints. "batched" is what `train_adapters` does; tokens
count for all of its experts. Medians over `--steps` steps. The loss of the last
step is there to see that all methods train alike.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from measuring import device_name, replace_rows
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, ProgressCallback, TrainerCallback

from phatgoose.config import AdapterTrainingConfig, BatchingConfig, TextConfig
from phatgoose.data.encoder import Encoder
from phatgoose.data.examples import Example
from phatgoose.models.base import DTYPES
from phatgoose.training.group.data import GroupData
from phatgoose.training.group.matrix import ExpertMatrix
from phatgoose.training.group.model import BatchedLora, BatchedModel, needs_mask
from phatgoose.training.group.trainer import GroupTrainer
from phatgoose.training.lora import initial_factors, lora_layers, new_lora
from phatgoose.training.trainer import make_trainer

Measured = tuple[float, float]  # seconds of a step, and the first expert's loss in the last one
SHAPES = {
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    },
}  # fmt: skip


def main() -> None:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rows", type=int, default=16, help="of each expert, per step")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--targets", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3, help="steps before the measured ones")
    parser.add_argument("--methods", nargs="+", default=["PEFT", "batched", "batched, compiled"])
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--profile", action="store_true", help="print where the last method's time goes")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[args.shape], tie_word_embeddings=True, pad_token_id=0, eos_token_id=1)
    model = LlamaForCausalLM(config).to(args.device, DTYPES[args.dtype]).eval()
    encoder = Encoder(make_tokenizer(config.vocab_size), model.config, TextConfig())
    training = AdapterTrainingConfig(
        steps=args.warmup + args.steps, batch_size=args.rows, rank=args.rank, dtype=args.dtype
    )
    rows: list[dict[str, object]] = []
    one = None
    for method in args.methods:
        for num_experts in [1] if method == "PEFT" else args.experts:
            measure = peft if method == "PEFT" else partial(batched, num_experts=num_experts, how=method)
            try:
                seconds, loss = measure(model, encoder, training, args)
            except torch.OutOfMemoryError as error:
                print(f"{method}, {num_experts} experts: {error}".splitlines()[0], flush=True)
                continue
            speed = num_experts * args.rows * args.length / seconds
            one = speed if method == "PEFT" else one
            rows.append(row(args, method, num_experts, seconds, speed, one, loss))
            print("  ".join(f"{name} {rows[-1][name]}" for name in list(rows[-1])[7:]), flush=True)
    if args.out:
        replace_rows(args.out, rows, "device")


def peft(model: Any, encoder: Encoder, config: AdapterTrainingConfig, args: argparse.Namespace) -> Measured:
    """One expert."""
    clock = Clock(args.device)

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        batch = encoder.collate(rows)
        batch["targets"] = batch.pop("labels")
        return batch

    dataset = [encoder.encode(example) for example in make_examples(args, encoder, 0)]
    with new_lora(model, config) as peft_model, tempfile.TemporaryDirectory() as work:
        trainer = make_trainer(
            peft_model, config, Path(work), save_steps=10**6, dataset=dataset, validation=[], collate=collate
        )
        trainer._save_checkpoint = lambda *_: None  # at the last step
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Ticks)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return clock.median(args.warmup), float(losses[-1])


def batched(
    model: Any,
    encoder: Encoder,
    config: AdapterTrainingConfig,
    args: argparse.Namespace,
    num_experts: int,
    how: str,
) -> Measured:
    """Many experts."""
    clock = Clock(args.device)
    with group_trainer(model, encoder, config, args, num_experts, how) as trainer:
        for batches in trainer.data.steps():
            losses_E = trainer.step(batches)
            clock.tick()
        if args.profile:
            profile(partial(trainer.step, batches), args.device)
    return clock.median(args.warmup), losses_E[0].item()


@contextmanager
def group_trainer(
    model: Any,
    encoder: Encoder,
    config: AdapterTrainingConfig,
    args: argparse.Namespace,
    num_experts: int,
    how: str,
) -> Iterator[GroupTrainer]:
    """As in `train_adapters`."""
    torch.compiler.reset()  # else the second number of experts gets code for any number
    with new_lora(model, config) as peft_model, tempfile.TemporaryDirectory() as work:
        layers = lora_layers(peft_model)
        matrix = ExpertMatrix(initial_factors(layers, num_experts), DTYPES[config.dtype])
        parameters = matrix.parameters
        batched_model = BatchedModel(
            model,
            {
                site: BatchedLora(layer.get_base_layer(), parameters[site + ".a"], parameters[site + ".b"])
                for site, layer in layers.items()
            },
        )

        def alone(rows: Any, validation: Any) -> Any:
            return make_trainer(
                batched_model, config, Path(work), save_steps=10**6, dataset=rows, validation=validation, collate=list
            )

        data = GroupData(
            encoder,
            [make_examples(args, encoder, e) for e in range(num_experts)],
            [()] * num_experts,
            alone,
            length_multiple=BatchingConfig.length_multiple,
            with_mask=needs_mask(model),
        )
        try:
            with nullcontext() if how == "batched" else batched_model.compiled():
                yield GroupTrainer(batched_model, matrix, data, config, Path(work) / "run", {})
        finally:
            batched_model.unwrap()


class Clock:
    """Seconds between ticks, with the device at rest at each."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.times: list[float] = []

    def tick(self) -> None:
        """Note the time."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def median(self, warmup: int) -> float:
        """The median, without the first `warmup` steps."""
        times = self.times[warmup - 1 :]
        return statistics.median(after - before for before, after in pairwise(times))


def profile(step: Callable[[], Any], device: str) -> None:
    """Print one step's wall time beside its time on the device, and the calls that take most of that."""
    clock = Clock(device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.startswith("cuda"):
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        clock.tick()
        step()
        clock.tick()
    by = "self_device_time_total" if device.startswith("cuda") else "self_cpu_time_total"
    events = found.key_averages()
    kernels = [event for event in events if event.self_device_time_total > 0 and event.self_cpu_time_total == 0]
    launched, busy = sum(event.count for event in kernels), sum(event.self_device_time_total for event in kernels)
    print(f"wall {clock.median(1) * 1e3:.1f} ms, device {busy / 1e3:.1f} ms in {launched} kernels")
    print(events.table(sort_by=by, row_limit=25, max_name_column_width=60))


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Token i is the word "<i>"."""
    tokenizer = Tokenizer(WordLevel({f"<{i}>": i for i in range(vocabulary)}, unk_token="<2>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<0>", eos_token="<1>", unk_token="<2>")


def make_examples(args: argparse.Namespace, encoder: Encoder, seed: int) -> list[Example]:
    """Enough for all steps. A row is the prompt and the target without its last token."""
    generator = torch.Generator().manual_seed(seed)
    size = ((args.warmup + args.steps) * args.rows, args.length)
    words = torch.randint(3, len(encoder.tokenizer), size, generator=generator).tolist()
    cut = args.length + 1 - args.targets
    return [
        Example(input=" ".join(f"<{i}>" for i in ids[:cut]), target=" ".join(f"<{i}>" for i in ids[cut:]))
        for ids in words
    ]


def row(
    args: argparse.Namespace,
    method: str,
    num_experts: int,
    seconds: float,
    speed: float,
    one: float | None,
    loss: float,
) -> dict[str, object]:
    """One line of the CSV."""
    return {
        "device": device_name(args.device),
        "torch": torch.__version__,
        "shape": args.shape,
        "dtype": args.dtype,
        "rank": args.rank,
        "length": args.length,
        "targets": args.targets,
        "method": method,
        "experts": num_experts,
        "rows_of_each": args.rows,
        "milliseconds_a_step": f"{seconds * 1e3:.1f}",
        "tokens_a_second": f"{speed:.0f}",
        "ratio_to_peft": f"{speed / one:.2f}" if one else "",
        "loss_of_first_expert": f"{loss:.4f}",
    }


if __name__ == "__main__":
    main()

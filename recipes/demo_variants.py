"""The variants of adapters and gates that demo_diagnosis.py trains: its two plans."""

from __future__ import annotations

from dataclasses import dataclass

from demo_pool import DATASETS


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """How an adapter is trained; with 0 steps it is the pool's own adapter.

    `rows` is "all", or "kept": the rows that remain when a fraction of the examples is held back.
    """

    dataset: str
    rows: str = "all"
    steps: int = 0
    checks: int = 8


@dataclass(frozen=True, kw_only=True)
class Gate:
    """How a gate is trained."""

    rows: str = "all"
    steps: int = 100
    learning_rate: float = 5e-3
    accumulation: int = 1


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One expert trained differently. `others` is the variant of the other seven experts; "" for the pool's own."""

    name: str
    adapter: Adapter
    gate: Gate
    others: str = ""


def held_back() -> list[Variant]:
    """Gates trained on rows that the adapter has or has not seen, shorter adapters, and other datasets."""
    plan = []
    for dataset, steps, checks in (("qqp", 200, 8), ("commonsenseqa", 200, 8), ("commongen", 150, 2)):
        adapter = Adapter(dataset=dataset, rows="kept", steps=steps, checks=checks)
        plan.append(Variant(name="held back, gate on held rows", adapter=adapter, gate=Gate(rows="held")))
        plan.append(Variant(name="held back, gate on seen rows", adapter=adapter, gate=Gate(rows="kept")))
    adapter = Adapter(dataset="commongen", rows="kept", steps=90, checks=9)
    plan.append(Variant(name="held back, best of 90 steps, gate on held rows", adapter=adapter, gate=Gate(rows="held")))
    adapter = Adapter(dataset="commongen", steps=90, checks=9)
    plan.append(Variant(name="best of 90 steps", adapter=adapter, gate=Gate()))
    for dataset in ("commongen", "qqp"):
        plan.append(Variant(name="300 gate steps", adapter=Adapter(dataset=dataset), gate=Gate(steps=300)))
    for dataset in ("agnews", "rottentomatoes", "qqp", "commonsenseqa"):
        gate = Gate(accumulation=2)
        plan.append(Variant(name="gate steps of 64 rows", adapter=Adapter(dataset=dataset), gate=gate))
    for dataset in ("cos_e", "gigaword"):
        plan.append(Variant(name="a new expert", adapter=Adapter(dataset=dataset, steps=200), gate=Gate()))
    return plan


def gate_steps() -> list[Variant]:
    """All eight gates with fewer steps or another learning rate; shorter adapters with such gates."""
    gates = {
        "12 gate steps": Gate(steps=12),
        "25 gate steps": Gate(steps=25),
        "50 gate steps": Gate(steps=50),
        "100 gate steps at 1e-3": Gate(learning_rate=1e-3),
    }
    plan = []
    for dataset in ("wikibio", "samsum", *[name for name in DATASETS if name not in ("wikibio", "samsum")]):
        adapter = Adapter(dataset=dataset)
        plan.extend(Variant(name=name, adapter=adapter, gate=gate, others=name) for name, gate in gates.items())
    adapter = Adapter(dataset="commongen", steps=40, checks=4)
    for name in ("12 gate steps", "25 gate steps", "50 gate steps"):
        plan.append(Variant(name=f"best of 40 steps, {name}", adapter=adapter, gate=gates[name], others=name))
    adapter = Adapter(dataset="commongen", rows="kept", steps=40, checks=4)
    for rows in ("held", "kept"):
        gate, name = Gate(rows=rows, steps=25), f"held back, best of 40 steps, 25 gate steps on {rows} rows"
        plan.append(Variant(name=name, adapter=adapter, gate=gate, others="25 gate steps"))
    return plan


PLANS = {"held-back": held_back, "gate-steps": gate_steps}

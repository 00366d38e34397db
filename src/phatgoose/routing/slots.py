"""Slots: the places of experts in a routed model's stacks, some of them empty."""

from __future__ import annotations

from collections.abc import Sequence

from phatgoose.errors import ConfigError, RouterError


class Slots:
    """Which expert lies in which slot. An expert's id, in routing and traces, is its slot.

    Args:
        names: the experts in the first slots.
        capacity: how many slots there are; None for one for each name, which then stay.

    Attributes:
        names: the expert in each slot; "" is an empty slot.
        fixed: whether experts can be neither added nor removed.

    Raises:
        ConfigError: more names than slots.
    """

    def __init__(self, names: Sequence[str], capacity: int | None = None) -> None:
        self.fixed = capacity is None
        capacity = len(names) if capacity is None else capacity
        if capacity < len(names):
            raise ConfigError(
                f"capacity {capacity} is smaller than the pool",
                found=f"{len(names)} experts: {', '.join(names)}",
                expected=f"a capacity of at least {len(names)}",
            )
        self.names = [*names, *[""] * (capacity - len(names))]

    def __len__(self) -> int:
        return len(self.names)

    def check_open(self) -> None:
        """Raise RouterError if experts can be neither added nor removed."""
        if self.fixed:
            raise RouterError(
                "this model routes among a fixed set of experts",
                found=f"{len(self)} experts and no slots for others",
                expected="a model that was built with a capacity",
                fix=f"RoutedModel.from_pool(..., capacity={2 * len(self)})",
            )

    def empty(self) -> int:
        """The first empty slot. Raises RouterError if there is none."""
        if "" not in self.names:
            raise RouterError(
                "no slot is empty",
                found=f"{len(self)} experts in {len(self)} slots",
                expected="an empty slot",
                fix=f"remove_expert({self.names[0]!r}), or RoutedModel.from_pool(..., capacity={2 * len(self)})",
            )
        return self.names.index("")

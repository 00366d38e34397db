"""What a call tells all routed layers of a model: masks, what its prompts add to the scores, and who records.

Axes: B prompts, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock

import torch

from phatgoose.errors import RouterError
from phatgoose.routers.record import RoutingRecord, ScoresRecord


@dataclass(frozen=True, kw_only=True, eq=False)
class CallState:
    """What routed layers need to know of one call, beside their input.

    Attributes:
        masked: names of the experts that no token may choose.
        mask_1E: -inf for those experts, 0 for the others; None if nothing is masked.
        prompt_masked: for each prompt, the names of experts that its tokens may not choose.
        prompt_mask_BE: the same as -inf and 0; None if no prompt has a mask of its own.
        prompt_bias: what each prompt adds to its tokens' scores, (B, E), at every site or by
            site; None before a router has read the prompts.
        records: by site, what reports of the routing go to; None if nobody records.
        first_pass: whether a router is reading the prompts, so that no bias is there yet.
        ambiguous: whether this stands for several calls, because the asking code cannot tell which of them it serves.
    """

    masked: frozenset[str] = frozenset()
    mask_1E: torch.Tensor | None = None
    prompt_masked: Sequence[Sequence[str]] = ()
    prompt_mask_BE: torch.Tensor | None = None
    prompt_bias: torch.Tensor | Mapping[str, torch.Tensor] | None = None
    records: Mapping[str, RoutingRecord | ScoresRecord] | None = None
    first_pass: bool = False
    ambiguous: bool = False

    def record(self, site: str) -> RoutingRecord | ScoresRecord | None:
        """What a site reports its routing to; None if nobody records."""
        return None if self.records is None else self.records[site]

    def bias_BE(self, site: str) -> torch.Tensor | None:
        """What each prompt adds to the scores at a site, (B, E); None for nothing."""
        bias = self.prompt_bias
        return bias if bias is None or isinstance(bias, torch.Tensor) else bias[site]


IDLE = CallState()  # nothing masked, added or recorded
_AMBIGUOUS = CallState(ambiguous=True)


class RoutingState:
    """The one object that all routed layers of a model share; it knows the state of each call.

    A state belongs to the thread (or asyncio task) that entered it, so calls side by side
    do not see each other's masks, prompts or records. Two kinds of reader cannot tell
    whose call they serve: compiled code, because a compiler sees no context variables, and
    threads that entered nothing, such as those of autograd and of continuous batching.
    They see the only state that is active, and an error if there are several.
    """

    def __init__(self) -> None:
        # One for each model: its values are reset when a call ends, so that it keeps nothing alive.
        self._own: ContextVar[tuple[object, CallState] | None] = ContextVar("phatgoose call", default=None)
        self._active: dict[object, CallState] = {}
        self._lock = Lock()
        self._shared = IDLE

    def current(self) -> CallState:
        """The state of the call that asks.

        Raises:
            RouterError: several are active, and the asking thread (or compiled graph) entered none of them.
        """
        if torch.compiler.is_compiling():
            call = self._shared
        else:
            own = self._own.get()
            call = self._shared if own is None else own[1]
        if call.ambiguous:  # not `is`: compilers guard values of attributes, but not identities
            raise RouterError(
                "cannot tell which call's masks and prompts count here",
                found="calls with different masks, prompts or records at the same time",
                expected="one such call at a time where the model is compiled, or called by a thread of its own",
                fix="call the RoutedModel itself, without torch.compile, or one call after the other",
            )
        return call

    def own(self) -> CallState:
        """The state that this thread (or asyncio task) entered; an idle one if it entered none."""
        own = self._own.get()
        return IDLE if own is None else own[1]

    def is_active(self) -> bool:
        """Whether any thread is inside `during`."""
        return bool(self._active)

    @contextmanager
    def during(self, call: CallState) -> Iterator[None]:
        """Make `call` the state of this thread (or asyncio task) inside the `with` block."""
        outer = self._own.get()
        key = object() if outer is None else outer[0]
        token = self._own.set((key, call))
        self._set(key, call)
        try:
            yield
        finally:
            self._own.reset(token)
            self._set(key, None if outer is None else outer[1])

    def _set(self, key: object, call: CallState | None) -> None:
        """Note what a thread's state is now (None: it left), and what those see that have none."""
        with self._lock:
            if call is None:
                del self._active[key]
            else:
                self._active[key] = call
            states = list(self._active.values())
            self._shared = IDLE if not states else states[0] if all(s is states[0] for s in states) else _AMBIGUOUS

    def __deepcopy__(self, memo: dict[int, object]) -> RoutingState:
        """A copied model's layers share a state of their own."""
        copied = memo[id(self)] = RoutingState()
        return copied

    def __reduce__(self) -> tuple[type[RoutingState], tuple[()]]:
        """A pickled model keeps no calls."""
        return RoutingState, ()

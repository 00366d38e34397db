"""The tree of errors, and how a message reads."""

from __future__ import annotations

import re

from phatgoose import errors
from phatgoose.errors import PhatgooseError


def test_the_tree_names_every_error() -> None:
    drawn = dict(re.findall(r"[├└]── (\w+) +(.+)", str(errors.__doc__)))
    described = {kind.__name__: str(kind.__doc__) for kind in PhatgooseError.__subclasses__()}
    assert {name: f"{text[0].upper()}{text[1:]}." for name, text in drawn.items()} == described


def test_layout_of_a_message() -> None:
    whole = PhatgooseError("expert 'boolq' has no gate", found="no gate", expected="a gate", fix="phatgoose gate")
    assert str(whole) == "expert 'boolq' has no gate\n  found: no gate\n  expected: a gate\n  fix: phatgoose gate"
    assert (whole.what, whole.found, whole.expected, whole.fix) == (
        "expert 'boolq' has no gate",
        "no gate",
        "a gate",
        "phatgoose gate",
    )
    assert str(PhatgooseError("a thing is broken", fix="mend")) == "a thing is broken\n  fix: mend"

"""Single: one named expert for every token at every site.

The unit that Oracle and Best Individual are made of (paper section 4.2): both
pick it by looking at scores. The model routes among this one expert, so nothing
is left to choose; a site that it does not adapt stays the base's.
"""

from __future__ import annotations

from phatgoose.routers.uniform import Uniform


class Single(Uniform):
    """The only expert there is; `RoutedModel.from_pool` takes the one that `RouterConfig.expert` names."""

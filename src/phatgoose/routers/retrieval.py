"""Retrieval: the owner of the example nearest to the prompt carries the whole sequence.

    expert = owner of argmax over all experts' examples of cos(e(prompt), e(example)), with weight 1

Source: Jang et al. 2023 as in paper section 4.2: all-MiniLM-L6-v2, 1,000 random
training examples per expert. The official code embeds "Answer Choices: ...,
Instance: ..."; a prompt of a deployed model has no list of choices, so the
input alone is embedded, on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from phatgoose.config import RouterConfig
from phatgoose.experts.embeddings import SentenceEncoder, load_embeddings
from phatgoose.experts.expert import Expert
from phatgoose.kernels.types import Routing
from phatgoose.routers.base import PromptReader, PromptRouter
from phatgoose.routers.uniform import Uniform


class Retrieval(Uniform):
    """One expert per prompt; the site has no say."""

    needs = frozenset({"adapter", "embeddings"})
    reads_prompts = True

    @classmethod
    def for_prompts(cls, experts: Sequence[Expert | None], config: RouterConfig) -> PromptRouter:
        """See `Router.for_prompts`."""
        return NearestExample(experts)

    def choose(self, scores_NE: torch.Tensor, mask_NE: torch.Tensor | None = None) -> Routing:
        """See `Router.choose`: the one expert that its prompt allows."""
        best_N1, expert_ids_N1 = scores_NE.max(dim=-1, keepdim=True)
        return Routing((best_N1 > -torch.inf).float(), expert_ids_N1)


class ExampleReader(PromptRouter):
    """Compares prompts with each expert's embedded examples."""

    def __init__(self, experts: Sequence[Expert | None]) -> None:
        self.encoder = SentenceEncoder()
        self.examples = [None if expert is None else self.read(expert) for expert in experts]

    def put(self, slot: int, expert: Expert | None) -> None:
        """See `PromptRouter.put`."""
        self.examples[slot] = None if expert is None else self.read(expert)

    def by_expert(
        self,
        model: PromptReader,
        prompt_ids: Sequence[Sequence[int]],
        summarise: Callable[[torch.Tensor], torch.Tensor],
        empty: float,
    ) -> torch.Tensor:
        """A number for each prompt and expert, (B, E), from the cosines of the prompt and the expert's examples.

        Args:
            model: knows the prompts' texts.
            prompt_ids: token ids of B prompts, without padding.
            summarise: cosines_BM of one expert's M examples -> (B,).
            empty: the number for an empty slot.
        """
        prompts_BD = self.encoder.embed(model.texts(prompt_ids))
        nobody_B = prompts_BD.new_full((len(prompts_BD),), empty)
        by_expert = [
            nobody_B if examples_MD is None else summarise(prompts_BD @ examples_MD.T) for examples_MD in self.examples
        ]
        return torch.stack(by_expert, dim=1)

    def read(self, expert: Expert) -> torch.Tensor:
        """An expert's embedded examples, (M, D). Raises PrototypeError."""
        return load_embeddings(expert.folder, self.encoder.name)


class NearestExample(ExampleReader):
    """Forbids every expert but the owner of the nearest example."""

    def bias(self, model: PromptReader, prompt_ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """See `PromptRouter.bias`: 0 for the owner, -inf for the others."""
        nearest_BE = self.by_expert(model, prompt_ids, lambda cosines_BM: cosines_BM.amax(dim=1), -torch.inf)
        owners_B1 = (nearest_BE + model.mask_BE(len(prompt_ids))).argmax(dim=1, keepdim=True)
        return torch.full_like(nearest_BE, -torch.inf).scatter(1, owners_B1, 0.0)

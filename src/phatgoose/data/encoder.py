"""How text becomes what a model reads.

Axes: B sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from phatgoose.config import TextConfig
from phatgoose.data.examples import Example
from phatgoose.errors import DataError

IGNORED = -100  # the label that torch's cross-entropy leaves out
# Of one call to the tokenizer, whose results are large while they last.
TEXTS_AT_ONCE = 2000


class Encoder:
    """Turns text into token ids for one kind of model.

    Args:
        tokenizer: of the base model.
        config: of the base model (for `is_encoder_decoder` and its start token).
        text: separator and limits.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, text: TextConfig) -> None:
        self.tokenizer = tokenizer
        self.text = text
        self.encoder_decoder = bool(config.is_encoder_decoder)
        self.start_id: int = config.decoder_start_token_id if self.encoder_decoder else -1
        if tokenizer.eos_token_id is None:
            raise DataError("the base model's tokenizer has no EOS token", expected="a token that ends a target")
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def prompt(self, text: str) -> list[int]:
        """Token ids of an input; see `prompts`."""
        return self.prompts([text])[0]

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of inputs, as the model reads them before it answers.

        An input without tokens becomes EOS, which ends whatever came before: a
        model cannot answer to nothing. Many texts at once are tokenised side by side.
        """
        separator = "" if self.encoder_decoder else self.text.separator
        return [self._cut(ids) for ids in self._ids([text + separator for text in texts], special=True)]

    def _cut(self, ids: list[int]) -> list[int]:
        closed = bool(ids) and ids[-1] == self.eos_id
        if closed and not self.encoder_decoder:  # some tokenizers close every text
            ids.pop()
        surplus = len(ids) - self.text.max_input_tokens
        if surplus > 0 and self.encoder_decoder:
            end = len(ids) - closed  # EOS stays, as in the tokenizer's own truncation
            del ids[end - surplus : end]
        elif surplus > 0:
            keep = 1 if ids[0] == self.tokenizer.bos_token_id else 0
            del ids[keep : keep + surplus]
        return ids or [self.eos_id]

    def target(self, text: str) -> list[int]:
        """Token ids of a target, EOS at its end."""
        return self.targets([text])[0]

    def targets(self, texts: Sequence[str]) -> list[list[int]]:
        """`target` of many texts."""
        most = self.text.max_target_tokens - 1
        return [[*ids[:most], self.eos_id] for ids in self._ids(texts, special=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def piece(self, token_id: int) -> str:
        """Text of one token, special or not."""
        return str(self.tokenizer.decode([token_id]))

    def _ids(self, texts: Sequence[str], *, special: bool) -> Iterator[list[int]]:
        # Choices, and prompts of leave-one-out, come again and again
        unique = list(dict.fromkeys(texts))
        found: dict[str, list[int]] = {}
        for start in range(0, len(unique), TEXTS_AT_ONCE):
            some = unique[start : start + TEXTS_AT_ONCE]
            found.update(zip(some, self.tokenizer(some, add_special_tokens=special)["input_ids"], strict=True))
        return (list(found[text]) for text in texts)

    def row(self, prompt: Sequence[int], target: Sequence[int]) -> dict[str, list[int]]:
        """Model inputs of one example, and `labels`: labels[t] is what logits[t] should predict."""
        if self.encoder_decoder:
            return {
                "input_ids": list(prompt),
                "decoder_input_ids": [self.start_id, *target[:-1]],
                "labels": list(target),
            }
        ids = [*prompt, *target]
        labels = [IGNORED] * (len(prompt) - 1) + list(target)
        return {"input_ids": ids[:-1], "labels": labels}

    def encode(self, example: Example) -> dict[str, list[int]]:
        """`row` of an example."""
        return self.encode_all([example])[0]

    def encode_all(self, examples: Sequence[Example]) -> list[dict[str, list[int]]]:
        """`row` of each example."""
        prompts = self.prompts([example.input for example in examples])
        targets = self.targets([example.target for example in examples])
        return [self.row(prompt, target) for prompt, target in zip(prompts, targets, strict=True)]

    def collate(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Pad rows on the right into one batch.

        Returns:
            input_ids, attention_mask and labels, and decoder_input_ids for an
            encoder-decoder model; int64, shape (B, S).
        """
        fill = {"input_ids": self.pad_id, "decoder_input_ids": self.pad_id, "labels": IGNORED}
        batch = {name: pad([row[name] for row in rows], fill[name]) for name in rows[0]}
        batch["attention_mask"] = pad([[1] * len(row["input_ids"]) for row in rows], 0)
        return batch


def pad(rows: Sequence[Sequence[int]], fill: int, *, left: bool = False) -> torch.Tensor:
    """Rows of unlike length as one int64 tensor of shape (B, S); `fill` goes to the right, or to the left."""
    longest = max(len(row) for row in rows)
    fills = [[fill] * (longest - len(row)) for row in rows]
    return torch.tensor([[*some, *row] if left else [*row, *some] for some, row in zip(fills, rows, strict=True)])

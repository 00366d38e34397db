"""The encoder: text to token ids, and rows of token ids to a padded batch.

Axes: B sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from phatgoose.config import TextConfig
from phatgoose.data.examples import Example
from phatgoose.errors import DataError

IGNORED = -100  # the label that torch's cross-entropy ignores
# Most texts of one call to the tokenizer: its results take much memory until they are read
TEXTS_AT_ONCE = 2000


class Encoder:
    """Turns examples into the inputs and labels of one base model.

    Args:
        tokenizer: the base model's tokenizer.
        config: the base model's config, for `is_encoder_decoder` and `decoder_start_token_id`.
        text: separator and length limits.

    Attributes:
        encoder_decoder: whether the base model is an encoder-decoder model.
        start_id: the token that a decoder starts with; -1 for a decoder-only model.
        eos_id: the token that ends every target.
        pad_id: the padding token; EOS if the tokenizer has none.

    Raises:
        DataError: the tokenizer has no EOS token.
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
        """Token ids of one input; see `prompts`."""
        return self.prompts([text])[0]

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of inputs: separator added, cut to `max_input_tokens`, with BOS if the tokenizer adds it.

        An input without tokens becomes EOS, because a model cannot answer an empty
        prompt. Many texts in one call are tokenised in parallel.
        """
        separator = "" if self.encoder_decoder else self.text.separator
        return [self._cut(ids) for ids in self._ids([text + separator for text in texts], special=True)]

    def _cut(self, ids: list[int]) -> list[int]:
        closed = bool(ids) and ids[-1] == self.eos_id
        if closed and not self.encoder_decoder:  # some tokenizers end every text with EOS
            ids.pop()
        surplus = len(ids) - self.text.max_input_tokens
        if surplus > 0 and self.encoder_decoder:
            end = len(ids) - closed  # EOS is kept, as in the tokenizer's own truncation
            del ids[end - surplus : end]
        elif surplus > 0:
            keep = 1 if ids[0] == self.tokenizer.bos_token_id else 0
            del ids[keep : keep + surplus]
        return ids or [self.eos_id]

    def target(self, text: str) -> list[int]:
        """Token ids of one target; see `targets`."""
        return self.targets([text])[0]

    def targets(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of targets: cut to `max_target_tokens`, of which the last is EOS."""
        most = self.text.max_target_tokens - 1
        return [[*ids[:most], self.eos_id] for ids in self._ids(texts, special=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def piece(self, token_id: int) -> str:
        """Text of one token, special or not."""
        return str(self.tokenizer.decode([token_id]))

    def _ids(self, texts: Sequence[str], *, special: bool) -> Iterator[list[int]]:
        # Many texts repeat: choices, and the prompts of leave-one-out
        unique = list(dict.fromkeys(texts))
        ids_of: dict[str, list[int]] = {}
        for start in range(0, len(unique), TEXTS_AT_ONCE):
            some = unique[start : start + TEXTS_AT_ONCE]
            ids_of.update(zip(some, self.tokenizer(some, add_special_tokens=special)["input_ids"], strict=True))
        return (list(ids_of[text]) for text in texts)

    def row(self, prompt: Sequence[int], target: Sequence[int]) -> dict[str, list[int]]:
        """Inputs and labels of one example as lists of token ids, not padded.

        Returns:
            input_ids, decoder_input_ids (encoder-decoder models only) and labels, where
            labels[t] is what logits[t] should predict, or IGNORED.
        """
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
        """`row` of one example."""
        return self.encode_all([example])[0]

    def encode_all(self, examples: Sequence[Example]) -> list[dict[str, list[int]]]:
        """`row` of each example."""
        prompts = self.prompts([example.input for example in examples])
        targets = self.targets([example.target for example in examples])
        return [self.row(prompt, target) for prompt, target in zip(prompts, targets, strict=True)]

    def collate(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Pad rows on the right into one batch.

        Args:
            rows: one for each of B examples, from `row`.

        Returns:
            input_ids, attention_mask, labels and, for an encoder-decoder model,
            decoder_input_ids; int64, shape (B, S), each padded to its longest row.
        """
        fill = {"input_ids": self.pad_id, "decoder_input_ids": self.pad_id, "labels": IGNORED}
        batch = {name: pad([row[name] for row in rows], fill[name]) for name in rows[0]}
        batch["attention_mask"] = pad([[1] * len(row["input_ids"]) for row in rows], 0)
        return batch


def pad(rows: Sequence[Sequence[int]], fill: int, *, left: bool = False) -> torch.Tensor:
    """Pad rows to the longest one with `fill`, on the right or on the left; int64, shape (B, S)."""
    longest = max(len(row) for row in rows)
    fills = [[fill] * (longest - len(row)) for row in rows]
    return torch.tensor([[*some, *row] if left else [*row, *some] for some, row in zip(fills, rows, strict=True)])

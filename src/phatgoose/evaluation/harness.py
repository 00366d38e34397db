"""A pool as a model of lm-eval.

Importing this module registers the model as `phatgoose`. lm-eval finds only its
own models by itself, so `phatgoose lm-eval` is lm-eval's command line after this
import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from phatgoose.config import Dtype, EvaluationConfig, GenerationConfig, TextConfig
from phatgoose.data.encoder import Encoder
from phatgoose.inference.generation import answers
from phatgoose.inference.scoring import routed_prompts, target_losses, target_scores
from phatgoose.routing.model import RoutedModel

Progress = Callable[[int], object]


class RoutedLM(HFLM):
    """A loaded model, with or without experts, as a model of lm-eval.

    It answers lm-eval's own request types, and the two of `SuiteTask` through
    this package's encoder. lm-eval's requests are handled as in HFLM, but batched
    by tokens, and routers that read prompts get them.

    Args:
        model: a RoutedModel, or a model of transformers.
        encoder: the encoder of the base model.
        batch_tokens: most positions of a batch, padding included.
        answer_tokens: most positions of a batch of written answers, see `EvaluationConfig`.
        on_batch: called with the number of requests of each finished batch.
        without: name of a task -> experts that are masked for its requests.
        options: options of HFLM, such as `batch_size` (for lm-eval's own generation).
    """

    def __init__(
        self,
        model: Any,
        encoder: Encoder,
        *,
        batch_tokens: int = EvaluationConfig.batch_tokens,
        answer_tokens: int | None = None,
        on_batch: Progress | None = None,
        without: Mapping[str, Sequence[str]] | None = None,
        **options: Any,
    ) -> None:
        self.routed = model
        self.encoder = encoder
        self.batch_tokens = batch_tokens
        self.answer_tokens = answer_tokens or batch_tokens
        self.on_batch = on_batch
        self.without = without or {}
        wrapped = model.model if isinstance(model, RoutedModel) else model
        super().__init__(pretrained=wrapped, tokenizer=encoder.tokenizer, **options)

    def target_loss(self, requests: Sequence[Instance]) -> list[float]:
        """Mean loss per token (nats) of each (input, target), EOS included."""
        prompts = self.encoder.prompts([request.args[0] for request in requests])
        targets = self.encoder.targets([request.args[1] for request in requests])
        pairs = list(zip(prompts, targets, strict=True))
        sums = target_losses(
            self.routed,
            self.encoder,
            pairs,
            batch_tokens=self.batch_tokens,
            on_batch=self.on_batch,
            without=self._masked(requests),
        )
        return [loss / len(target) for loss, (_, target) in zip(sums, pairs, strict=True)]

    def answer(self, requests: Sequence[Instance]) -> list[str]:
        """A greedy answer to each (input, max_new_tokens)."""
        texts: dict[int, str] = {}
        for length in sorted({request.args[1] for request in requests}):
            indices = [i for i, request in enumerate(requests) if request.args[1] == length]
            written = answers(
                self.routed,
                self.encoder,
                [requests[i].args[0] for i in indices],
                GenerationConfig(max_new_tokens=length),
                batch_tokens=self.answer_tokens,
                on_batch=self.on_batch,
                without=self._masked([requests[i] for i in indices]),
            )
            texts.update({i: one.text for i, one in zip(indices, written, strict=True)})
        return [texts[i] for i in range(len(requests))]

    def _masked(self, requests: Sequence[Instance]) -> list[Sequence[str]]:
        return [self.without.get(str(request.task_name), ()) for request in requests]

    # request types of lm-eval

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """See HFLM; requests that are too long are truncated as there, but batched by tokens."""
        if self.encoder.encoder_decoder:
            pairs = [(prompt[: self.max_length], target) for _, prompt, target in requests]
        else:
            pairs = [(prompt[-max(1, self.max_length + 1 - len(target)) :], target) for _, prompt, target in requests]
        scores = target_scores(self.routed, self.encoder, pairs, batch_tokens=self.batch_tokens, on_batch=self.on_batch)
        results = [(-score.loss, score.greedy) for score in scores]
        for (request, _, _), result in zip(requests, results, strict=True):
            if request is not None:  # None for a window of a rolling loglikelihood
                self.cache_hook.add_partial("loglikelihood", request, result)
        return results

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See HFLM."""
        mask_BS = kwargs["attention_mask"]
        prompts = [ids_S[mask_S.bool()].tolist() for ids_S, mask_S in zip(context, mask_BS, strict=True)]
        with routed_prompts(self.routed, prompts):
            return super()._model_generate(context, *args, **kwargs)

    def get_model_info(self) -> dict[str, Any]:
        """Facts about the model for lm-eval's results: HFLM's, and the pool's fingerprint."""
        pool = {"pool": self.routed.pool.fingerprint} if isinstance(self.routed, RoutedModel) else {}
        return super().get_model_info() | pool


@register_model("phatgoose")
class PoolLM(RoutedLM):
    """`--model phatgoose --model_args pool=P,router=phatgoose,top_k=2,...`

    Args:
        pool: the pool's folder.
        base: name of the base model; None for the one that the pool names.
        dtype: dtype of the base model's weights, see `load_base`.
        device: device of the model; the CPU if it names a GPU that does not
            exist, because lm-eval always asks for one.
        batch_size, max_batch_size: batch sizes of lm-eval's own generation requests.
        batch_tokens: most positions of a batch, padding included.
        options: fields of `RouterConfig` and of `TextConfig`.

    Raises:
        PhatgooseError: see `RoutedModel.from_pool`.
    """

    def __init__(
        self,
        pool: str,
        *,
        base: str | None = None,
        dtype: Dtype | None = None,
        device: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = 64,
        batch_tokens: int = EvaluationConfig.batch_tokens,
        **options: Any,
    ) -> None:
        text_options = {name: options.pop(name) for name in TextConfig.__dataclass_fields__ if name in options}
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"
        model = RoutedModel.from_pool(base, pool, dtype=dtype, device=device, **options)
        encoder = Encoder(model.tokenizer, model.config, TextConfig(**text_options))
        super().__init__(
            model, encoder, batch_tokens=batch_tokens, batch_size=batch_size, max_batch_size=max_batch_size
        )

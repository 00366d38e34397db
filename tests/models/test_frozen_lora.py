"""A frozen LoRA against its formula."""

from __future__ import annotations

import pytest
import torch

from phatgoose.experts.adapter import LoraWeights
from phatgoose.models.frozen_lora import FrozenLora


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_update(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    a_RI, b_OR, x = (torch.randn(*shape, generator=generator) for shape in ((3, 8), (5, 3), (2, 4, 8)))
    lora = FrozenLora(LoraWeights(a_RI=a_RI, b_OR=b_OR, scaling=0.5), torch.device("cpu"), dtype)
    update = lora(x)
    assert update.dtype == dtype and update.shape == (2, 4, 5)
    expected = 0.5 * (x.double() @ a_RI.double().T) @ b_OR.double().T
    torch.testing.assert_close(update.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    assert not list(lora.parameters()) and not lora.state_dict()

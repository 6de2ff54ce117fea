"""Both attention kernels match exact attention, up to the rounding of the dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from d2i.models.blocks import MAX_WRITTEN_OUT, attend

RMS = {torch.float32: 1e-6, torch.bfloat16: 0.01}


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bnqd,bnkd->bnqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bnqk,bnkd->bnqd", weights.exp() / weights.exp().sum(-1, True), v)


@pytest.mark.parametrize("dtype", RMS)
@pytest.mark.parametrize("length", [1, 334, MAX_WRITTEN_OUT + 1])
def test_attend_matches_exact_attention_and_gradients(dtype: torch.dtype, length: int) -> None:
    torch.manual_seed(0)
    # As from a fused projection: q, k and v are not contiguous.
    packed = torch.randn(2, length, 3, 4, 16).to(dtype)
    inputs = [packed.clone().requires_grad_(), packed.double().requires_grad_()]
    outputs = [
        function(*parts.permute(2, 0, 3, 1, 4).unbind(0))
        for function, parts in zip((attend, exact), inputs, strict=True)
    ]
    assert outputs[0].dtype == dtype
    direction = torch.randn_like(outputs[1])
    for output in outputs:
        output.backward(direction.to(output.dtype))
    gradients = [parts.grad for parts in inputs]
    for found, expected in (outputs, gradients):
        assert found is not None
        assert expected is not None
        error = (found.double() - expected).square().mean().sqrt()
        assert error < RMS[dtype] * expected.square().mean().sqrt()

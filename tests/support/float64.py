"""Models of transformers in float64: what two float32 that differ are measured by."""

from __future__ import annotations

import contextlib
import copy

import torch


@contextlib.contextmanager
def _wide():
    """What torch is told to compute in float32 (norms, softmax, rotary positions), it computes in
    float64."""
    single, float_ = torch.float32, torch.Tensor.float
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.Tensor.float = single, float_


def float64_logits(reference, tokens):
    """Logits [B, T, V] of a model, its float32 weights and computation widened."""
    wide = copy.deepcopy(reference).double()
    wide.set_experts_implementation("eager")  # torch's grouped products are of narrower numbers
    with _wide(), torch.no_grad():
        return wide(torch.tensor(tokens), use_cache=False).logits.numpy()

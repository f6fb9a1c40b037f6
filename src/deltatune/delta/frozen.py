"""Random matrices that methods share and nothing trains: drawn from a key, kept in memory once, saved nowhere."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def projections(
    key: int, r: int, width: int, rows: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the frozen A [r, width] and B [rows, r], Kaiming-uniform as PEFT draws them.

    Drawn row by row, so that more rows of B change none before.
    """
    with torch.inference_mode(False):  # they are kept, and calls that train use them, too
        generator = torch.Generator().manual_seed(key)
        A, B = (torch.empty(shape, dtype=torch.float32, device="cpu") for shape in ((r, width), (rows, r)))
        for matrix in (A, B):
            bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(matrix.shape[1]))
            matrix.uniform_(-bound, bound, generator=generator)
        return A.to(device, dtype), B.to(device, dtype)

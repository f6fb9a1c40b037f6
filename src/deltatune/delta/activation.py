"""The activations that a bottleneck may have, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "tanh", "leaky_relu"]

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
    "relu": torch.relu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "leaky_relu": nn.functional.leaky_relu,
}

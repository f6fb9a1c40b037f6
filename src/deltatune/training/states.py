"""The hidden states of the bare backbone that heads start from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.heads.base import Batch, Example, collate

# Inverse regularisation. The dev loss chooses, not the dev score: a head that knows its training rows by heart leaves a
# delta nothing to learn from (docs/log.md, 2026-11-21).
STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
MOST = 8000  # vectors that a probe is fitted to
TOKENS = 2048

Probe = dict[str, Tensor]


def states(examples: Sequence[Example], backbone: Backbone) -> Iterator[tuple[list[int], Batch, Tensor]]:
    """Yield the numbers of some examples, their batch, and its hidden states [sequences, tokens, width]."""
    order = sorted(range(len(examples)), key=lambda i: examples[i].longest)
    start = 0
    while start < len(order):
        stop, sequences = start, 0
        while stop < len(order):
            sequences += len(examples[order[stop]].sequences)
            if stop > start and sequences * examples[order[stop]].longest > TOKENS:
                break
            stop += 1
        batch = collate([examples[i] for i in order[start:stop]], backbone)
        with torch.no_grad():
            hidden = backbone.trunk(**batch.inputs).last_hidden_state
        yield order[start:stop], batch, hidden
        start = stop

"""What the bare backbone says of texts: read once for each text, since the backbone never changes in a fit."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from deltatune.delta.adapted import Adapted
from deltatune.delta.call import Segment
from deltatune.heads.base import Batch, Example, TaskHead, collate


@dataclass
class References:
    """Values of texts under the bare backbone, by what the texts are: rows that repeat a text share its value."""

    known: dict[str, float] = field(default_factory=dict)

    def give(self, adapted: Adapted, heads: Sequence[TaskHead], batches: Sequence[Batch]) -> None:
        """Set `reference` of the batches whose heads compare; texts that are new run through the backbone as one batch.

        Heads and batches correspond.
        """
        asking = [(head, batch) for head, batch in zip(heads, batches, strict=True) if head.compares]
        for kind in dict.fromkeys(type(head) for head, _ in asking):
            own = [(head, batch) for head, batch in asking if type(head) is kind]
            self._read(adapted, own[0][0], [batch for _, batch in own])
            for head, batch in own:
                found = [self.known[_key(head, text)] for text in batch.sequences]
                fine = torch.promote_types(adapted.source.dtype, torch.float32)
                batch.reference = torch.tensor(found, dtype=fine, device=adapted.source.device)

    def _read(self, adapted: Adapted, head: TaskHead, batches: Sequence[Batch]) -> None:
        found = {tuple(_key(head, text) for text in e.sequences): e for batch in batches for e in batch.examples}
        new = [example for keys, example in found.items() if not self.known.keys() >= set(keys)]
        if not new:
            return
        together = collate(new, adapted.source)
        call = adapted.routed((Segment(None, len(together.sequences)),))
        with torch.no_grad():
            hidden = adapted.encode(together.inputs, call=call)
            values = head.compared(hidden, together, adapted.source)
        for text, value in zip(together.sequences, values.tolist(), strict=True):
            self.known[_key(head, text)] = value


def _key(head: TaskHead, text: Example) -> str:
    said = repr((type(head).__name__, text.ids, text.target))
    return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()

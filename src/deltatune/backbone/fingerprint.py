"""Fingerprint: know a backbone again by its weights, whatever its modules are called and whatever its dtype.

Three digests over all tensors of the trunk (embeddings, blocks, norms), in the order of their canonical keys: of the
values as they are, rounded to bfloat16 and rounded to float16. Two backbones are the *same* if the first agree, the
*same up to dtype* if their dtypes differ and a rounded digest agrees, and *different* otherwise: a copy that was
trained for one step at a tiny rate differs.

Rounding to few bits is not undone by rounding, so where one side is quantised a sketch of the matrices is compared:
*same up to dtype* then says that the networks agree to the error of a quantisation, and no more.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from deltatune.backbone.anatomy import Anatomy
from deltatune.backbone.weights import quantised, read_weight

Verdict = Literal["same", "same up to dtype", "different"]
ROUNDED = {"bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTISED = "quantised"
# Root mean square distance of two sketches: on MiniLM 0.01 for int8 and 0.14 for 4 bits; about 1.4 between networks
# that have nothing in common.
NEAR = 0.4


def fingerprint(model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
    """Return {"dtype", "exact", "bfloat16", "float16", "sketch"}: digests of the trunk's weights, and a sketch.

    A quantised weight counts as what it stands for. Reads every weight once: about 0.2 s for 22 M parameters.
    """
    digests = {name: hashlib.blake2b(digest_size=16) for name in ("exact", *ROUNDED)}
    sketch: list[Tensor] = []
    dtype = ""
    for key, path in anatomy.parameters.items():
        values = read_weight(model, path).cpu().contiguous()
        dtype = dtype or str(values.dtype).removeprefix("torch.")
        if values.ndim > 1:
            sketch.append(_projected(values.flatten(1)))
        header = f"{key}:{tuple(values.shape)}".encode()
        for name, digest in digests.items():
            # A value that is exact in a narrower dtype has one form only: hash in float32 whatever float32 holds.
            view = _exact(values) if name == "exact" else values.to(ROUNDED[name])
            digest.update(header)
            digest.update(view.reshape(-1).view(torch.uint8).numpy().data)
    form = quantised(model)
    return {
        "dtype": f"{QUANTISED} {form}" if form else dtype,
        **{name: digest.hexdigest() for name, digest in digests.items()},
        "sketch": base64.b64encode(torch.tensor(sketch).half().numpy().tobytes()).decode(),
    }


def _projected(matrix: Tensor) -> Tensor:
    """u·W v / |W| for fixed signs u and v: of unit variance over matrices, and steady under small errors."""
    rows, columns = (
        torch.randint(2, (size,), generator=torch.Generator().manual_seed(size)).float() * 2 - 1
        for size in matrix.shape
    )
    return (rows @ (matrix.float() @ columns)) / matrix.float().norm().clamp(min=1e-30)


def _apart(saved: str, present: str) -> float:
    """Root mean square distance of two sketches; infinite where there are none or they are of other networks."""
    left, right = (np.frombuffer(base64.b64decode(sketch), np.float16).astype(float) for sketch in (saved, present))
    return float(np.sqrt(np.mean((left - right) ** 2))) if left.shape == right.shape and left.size else float("inf")


def _exact(values: torch.Tensor) -> torch.Tensor:
    wide = values.float()
    return values if values.dtype == torch.float64 and not torch.equal(wide.double(), values) else wide


def compare(saved: dict[str, str], present: dict[str, str]) -> Verdict:
    """Compare two fingerprints."""
    if saved["exact"] == present["exact"]:
        return "same"
    if saved["dtype"] != present["dtype"]:
        for name in ROUNDED:
            # The narrower side is already rounded, so the digests agree exactly where the source is the same.
            if name in (saved["dtype"], present["dtype"]) and saved[name] == present[name]:
                return "same up to dtype"
    # Two quantised networks may differ in rounding as well: bitsandbytes rounds once more where it packs for a CPU.
    if any(side["dtype"].startswith(QUANTISED) for side in (saved, present)):
        near = _apart(saved.get("sketch", ""), present.get("sketch", "")) < NEAR
        return "same up to dtype" if near else "different"
    return "different"

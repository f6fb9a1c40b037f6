"""Several LoRAs as one, against PEFT's `add_weighted_adapter` on the same weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.delta.test_algebra import delta
from tests.fit.tiny import backbone

from deltatune.delta.blend import blend, effect
from deltatune.delta.exchange.peft import export, write

WEIGHTS = [0.7, -0.4]
# PEFT divides the entries that agree by their number alone: its weights of 1 are ours of a half.
ALIKE: dict[str, tuple[str, list[float], list[float], dict[str, Any]]] = {
    "cat": ("linear", WEIGHTS, WEIGHTS, {}),
    "svd": ("linear", WEIGHTS, WEIGHTS, {"rank": 2}),
    "magnitude_prune_svd": ("magnitude", WEIGHTS, WEIGHTS, {"rank": 2, "density": 0.25}),
    "ties_svd": ("ties", [0.5, 0.5], [1.0, 1.0], {"rank": 2, "density": 0.25}),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_blends_are_those_of_peft(kind: str, tmp_path: Path) -> None:
    how, weights, theirs, options = ALIKE[kind]
    on = backbone("llama", torch.float64)
    several = [delta(on, "lora(r=3)", seed) for seed in range(2)]
    for number, one in enumerate(several):
        write(export(one, on), tmp_path / str(number))
    model = peft.PeftModel.from_pretrained(copy.deepcopy(on.module), str(tmp_path / "0"), adapter_name="0")
    model.load_adapter(str(tmp_path / "1"), "1")
    more = {"svd_rank": options["rank"]} if "rank" in options else {}
    if "density" in options:
        more["density"] = options["density"]
    model.add_weighted_adapter(["0", "1"], theirs, "both", combination_type=kind, **more)  # type: ignore[operator]
    made = effect(blend(several, on, how, weights=weights, **options), on)
    assert made
    for site, found, _ in made.values():
        layer: Any = model.base_model.model.get_submodule(site.exit)
        torch.testing.assert_close(found, layer.get_delta_weight("both"), rtol=1e-5, atol=1e-7, check_dtype=False)

"""OpenDelta's side of `opendelta_folders.py`; run by its own interpreter, in which deltatune is not installed.

Reads FOLDER/FAMILY.pt, writes FOLDER/NUMBER/ as OpenDelta saves it with the output beside it, and FOLDER/cases.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

os.environ["TRANSFORMERS_OFFLINE"] = "1"
import opendelta
import transformers as hf

NEW = ("dtype", "torch_dtype", "transformers_version", "architectures", "model_type", "_name_or_path")
MAPPED = ("bert", "roberta", "t5", "opt", "deberta", "bert with a head")
COMMON = {"common_structure": True}
LAYERS = r"[r]layer\.\d+\.output"
CASES: list[tuple[str, str, dict[str, Any]]] = [
    *((family, "LoraModel", {"lora_r": 3, "lora_alpha": 7}) for family in MAPPED),
    ("bart", "LoraModel", {"modified_modules": ["q_proj", "v_proj"]}),
    *((family, "AdapterModel", {"bottleneck_dim": 5}) for family in (*MAPPED, "gpt2")),
    ("bert", "AdapterModel", {"bottleneck_dim": 5, "modified_modules": ["attention"], "non_linearity": "relu"}),
    ("bert", "AdapterModel", {"bottleneck_dim": 5, "modified_modules": [LAYERS], "non_linearity": "swish"}),
    ("bert", "AdapterModel", {"bottleneck_dim": 5, "modified_modules": ["layer.1"], "non_linearity": "tanh"}),
    ("bart", "AdapterModel", {"bottleneck_dim": 5, "modified_modules": ["fc2"], "non_linearity": "gelu_orig"}),
    ("bart", "AdapterModel", {"bottleneck_dim": 5, "modified_modules": ["self_attn"], "non_linearity": "leakyrelu"}),
    ("t5", "AdapterModel", {"bottleneck_dim": 5, "modified_modules": ["layer.0"]}),
    ("gpt2", "AdapterModel", {"bottleneck_dim": 5, "modified_modules": ["attn", "mlp"]}),
    *((family, "ParallelAdapterModel", {"bottleneck_dim": 5}) for family in (*MAPPED, "gpt2")),
    *(
        (family, "ParallelAdapterModel", {"bottleneck_dim": 5, "modified_modules": ["ff@.w1@", "ff@.w2@"], **COMMON})
        for family in MAPPED
    ),
    ("bart", "ParallelAdapterModel", {"bottleneck_dim": 5, "modified_modules": ["fc1", "fc2"]}),
    *((family, "BitFitModel", {}) for family in (*MAPPED, "gpt2")),
    ("bart", "BitFitModel", {"modified_modules": ["self_attn", "fc1", "final_layer_norm"]}),
    *(
        (family, "PrefixModel", {"prefix_token_num": 3, "reparameterize": network, "embed_dim": 6, "mid_dim": 5, **where})
        for family, where in (*((f, {}) for f in ("bert", "roberta", "gpt2", "t5")), ("bart", {"modified_modules": ["self_attn"]}))
        for network in (True, False)
    ),
    ("gpt2", "PrefixModel", {"prefix_token_num": 3, "reparameterize": False, "modified_modules": ["1.attn"]}),
    *((family, "SoftPromptModel", {"soft_token_num": 3}) for family in ("bert", "gpt2", "t5", "opt", "bart")),
    ("bert", "LowRankAdapterModel", {}),
]  # fmt: skip


def network(folder: Path, family: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """The network that deltatune's side saved, and its inputs."""
    kept = torch.load(folder / f"{family}.pt", weights_only=False)
    cls = getattr(hf, kept["class"])
    model = cls(cls.config_class(**{k: v for k, v in kept["config"].items() if k not in NEW})).eval()
    model.load_state_dict(kept["state"], strict=False)
    model.tie_weights()
    return model, {name: value.clone() for name, value in kept["batch"].items()}


def made(folder: Path, number: int, family: str, kind: str, options: dict[str, Any]) -> None:
    """Make a delta, move it away from its start, save it, and keep what the network then gives."""
    torch.manual_seed(0)
    model, batch = network(folder, family)
    delta = getattr(opendelta, kind)(model, **options)
    delta.freeze_module(set_state_dict=True)
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        delta.save_finetuned(str(folder / str(number)))
        torch.save(model.eval()(**batch)[0], folder / str(number) / "output.pt")


def main() -> None:
    """Make all cases; one that fails says why."""
    folder = Path(sys.argv[1])
    found = []
    for number, (family, kind, options) in enumerate(CASES):
        failed = ""
        try:
            made(folder, number, family, kind, options)
        except Exception as error:  # whatever a call of theirs raises is told
            failed = f"{type(error).__name__} {error}".splitlines()[0][:120]
        told = {"family": family, "kind": kind, "options": str(options), "folder": str(number), "failed": failed}
        found.append(told)
    (folder / "cases.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()

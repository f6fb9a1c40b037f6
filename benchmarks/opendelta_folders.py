"""Hold what is read of OpenDelta's folders against OpenDelta 0.3.2 itself: its outputs, and ours after reading.

Run as: .venv/bin/python benchmarks/opendelta_folders.py --python INTERPRETER

OpenDelta needs an older transformers, so its side runs by an interpreter of its own (`rival_opendelta.py`), in whose
environment are `opendelta==0.3.2 transformers==4.24.0`, installed with --no-deps (OpenDelta names a package that is no
more), what they import, and torch. Networks are tiny and random, the same weights on both sides.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from deltatune.backbone.load import Backbone
from deltatune.delta.adapted import adapt
from deltatune.delta.delta import Delta
from deltatune.errors import UserError
from deltatune.laws.families import PLAIN, SMALL, inputs, tiny

BART = dict(
    vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, dropout=0.0,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
)  # fmt: skip
OPT = dict(
    vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, max_position_embeddings=64,
    word_embed_proj_dim=32, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
DEBERTA = dict(**SMALL, **PLAIN, relative_attention=True, pos_att_type=["p2c", "c2p"])
MORE: dict[str, Callable[[], Any]] = {
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT)),
    "deberta": lambda: hf.DebertaV2Model(hf.DebertaV2Config(**DEBERTA)),
    "bert with a head": lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL, **PLAIN)),
}
FAMILIES = ("bert", "roberta", "gpt2", "t5", *MORE)
TOLERANCE = 5e-6  # of the norm of the output, in float32


def network(family: str) -> Any:
    """A tiny random network in which the blocks, biases and norms do something."""
    if family not in MORE:
        return tiny(family)
    torch.manual_seed(1)
    model = MORE[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.tie_weights()
    return model.eval()


def main() -> int:
    """Print a line for each folder; the exit status is 1 where what was read computes something else."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", required=True, help="an interpreter that imports OpenDelta")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for family in FAMILIES:
            model = network(family)
            batch = inputs("t5" if family == "bart" else family)
            settings = model.config.to_dict()
            kept = {"class": type(model).__name__, "config": settings, "state": model.state_dict(), "batch": batch}
            torch.save(kept, folder / f"{family}.pt")
        script = Path(__file__).with_name("rival_opendelta.py")
        subprocess.run([chosen.python, str(script), str(folder)], check=True, stdout=subprocess.DEVNULL)
        return compared(folder)


def compared(folder: Path) -> int:
    """Read every folder that OpenDelta wrote and compare the outputs; count and tell."""
    read = refused = wrong = 0
    worst = 0.0
    for case in json.loads((folder / "cases.json").read_text(encoding="utf-8")):
        told = f"{case['family']:17} {case['kind']:21} {case['options']}"
        if case["failed"]:
            print(f"{told}: OpenDelta itself fails: {case['failed']}")
            continue
        backbone = Backbone(network(case["family"]))
        try:
            delta = Delta.load(str(folder / case["folder"]), backbone)
        except UserError as error:
            refused += 1
            print(f"{told}: refused: {str(error).partition(': ')[2] or error}")
            continue
        kept = torch.load(folder / f"{case['family']}.pt", weights_only=False)
        batch = kept["batch"]
        with adapt(backbone, delta) as adapted, torch.no_grad():
            ours, bare = adapted(**batch)[0], adapted(**batch, deltas=None)[0]
        counts = batch["attention_mask"].bool() if "decoder_input_ids" not in batch else ...
        theirs = torch.load(folder / case["folder"] / "output.pt")[:, -ours.shape[1] :][counts]
        off, effect = (float((x[counts] - theirs).norm() / theirs.norm()) for x in (ours, bare))
        read, worst, wrong = read + 1, max(worst, off), wrong + (off > TOLERANCE or effect < 100 * off)
        print(f"{told}: off by {off:.1e} (the delta moves the output by {effect:.1e}): {delta.spec}")
    print(f"{read} folders read, off by {worst:.1e} at most; {refused} refused; {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

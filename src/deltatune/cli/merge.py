"""`deltatune merge`: write a delta into the weights of its backbone, and save the whole model for others."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from deltatune.cli.options import AsJson, Folder, OtherBackbone
from deltatune.cli.output import say, table

if TYPE_CHECKING:
    from torch import Tensor

    from deltatune.backbone.load import Backbone
    from deltatune.delta.delta import Delta

EXAMPLE = "deltatune merge best/ --to hf --out merged/"
SAMPLE = (4, 16)  # rows and tokens on which the merged model is held against the attached delta


def merge(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", show_default=False, help="Where to save the model.")],
    to: Annotated[
        Literal["hf", "gguf"], typer.Option("--to", help="Whose format; of GGUF it says the way there alone.")
    ] = "hf",
    backbone: OtherBackbone = None,
    no_head: Annotated[bool, typer.Option("--no-head", help="Save the network without the delta's head.")] = False,
    as_json: AsJson = False,
) -> None:
    """Merge a saved delta into its backbone, and save a folder that transformers loads by itself.

    Says what rounding lost, and how far the saved model is from the delta attached to its backbone.
    """
    from deltatune.backbone.load import load
    from deltatune.cli.saved import read
    from deltatune.delta.files import whole_folder
    from deltatune.delta.merge import merge as merge_into
    from deltatune.errors import OutputError, UserError
    from deltatune.heads.whole import whole

    if to == "gguf":
        raise UserError(
            f"deltatune writes no GGUF: how each family's tensors are rearranged is kept in llama.cpp's own script, "
            f"which no package carries; `deltatune merge {folder} --out {out}`, then llama.cpp's "
            f"`convert_hf_to_gguf.py {out}`"
        )
    if out.exists():
        raise OutputError(f"{out} exists already; choose another place or remove it")
    delta = read(folder)
    network = load(backbone or delta.backbone_name)
    head = None if no_head else delta.head
    bare, attached = _attached(network, delta)
    merged = merge_into(network, delta)
    model: Any = whole(network, head)
    with whole_folder(out) as work:
        model.save_pretrained(work)
        network.processor.save_pretrained(work)
        saved = _saved(work, type(model), network)
    apart = float((saved - attached).norm() / (attached - bare).norm().clamp(min=1e-30))
    found = {
        "folder": str(out),
        "model": type(model).__name__,
        "use": _use(type(model).__name__, out),
        "apart": apart,
        "lost": merged.lost,
        "changes": [{"parameter": c.parameter, "size": c.size, "lost": c.lost} for c in merged.changes],
    }
    shown = table("parameter", "changed by", "lost in rounding", right=("changed by", "lost in rounding"))
    for change in merged.changes:
        shown.add_row(
            change.parameter, f"{change.size:.1%}" if isfinite(change.size) else "from zero", f"{change.lost:.1e}"
        )
    say(
        found,
        as_json,
        shown,
        f"{out}: {found['model']}, for {found['use']}. Against the delta attached to {network.name} its hidden states "
        f"are off by {apart:.1e} of what the delta changes.",
    )


def _sample(network: Backbone) -> dict[str, Tensor]:
    import torch

    from deltatune.heads.pixels import noise

    if network.reads == "images":
        return {"pixel_values": noise(SAMPLE[0], network)}
    size = network.embeddings.num_embeddings
    ids = torch.randint(size // 2, size, SAMPLE, generator=torch.Generator().manual_seed(0))
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**made, "decoder_input_ids": ids[:, :4]} if network.kind == "encoder-decoder" else made


def _attached(network: Backbone, delta: Delta) -> tuple[Tensor, Tensor]:
    """Hidden states of the sample on the bare backbone, and with the delta attached."""
    import torch

    from deltatune.delta.adapted import Adapted

    with torch.no_grad():
        bare = _hidden(network.module, network)
        with Adapted(network, [delta]) as adapted:
            return bare, _hidden(adapted, network)


def _saved(folder: Path, model: type[Any], network: Backbone) -> Tensor:
    """Hidden states of the sample as the saved folder gives them."""
    import torch

    again = model.from_pretrained(folder, dtype=network.dtype).eval()
    with torch.no_grad():
        return _hidden(again, network)


def _hidden(module: Any, network: Backbone) -> Tensor:
    out = module(**_sample(network), output_hidden_states=True)
    states = out.decoder_hidden_states if network.kind == "encoder-decoder" else out.hidden_states
    found: Tensor = states[-1].float()
    return found


def _use(model: str, folder: Path) -> str:
    """How transformers loads the folder; it has no pipeline for encoder-decoders."""
    if model.endswith("ConditionalGeneration"):
        return f'transformers.AutoModelForSeq2SeqLM.from_pretrained("{folder}")'
    tasks = {
        "TokenClassification": "token-classification",
        "ImageClassification": "image-classification",
        "CausalLM": "text-generation",
        "LMHeadModel": "text-generation",
    }
    task = next((task for ending, task in tasks.items() if model.endswith(ending)), "feature-extraction")
    return f'transformers.pipeline("{task}", model="{folder}")'

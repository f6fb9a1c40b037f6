"""`deltatune export`: write a delta as other libraries read it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from deltatune.cli.options import AsJson, Folder, OtherBackbone
from deltatune.cli.output import say

EXAMPLE = """\
deltatune export best/ --to peft --out best-peft/
deltatune export best/ --to vllm --out best-vllm/"""


def export(
    folder: Folder,
    to: Annotated[Literal["peft", "vllm"], typer.Option("--to", show_default=False, help="Whose format.")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", show_default=False, help="Where to save it.")],
    backbone: OtherBackbone = None,
    as_json: AsJson = False,
) -> None:
    """Write a saved delta as a PEFT folder, or as one that vLLM serves.

    What they cannot hold is refused with the reason.
    """
    from deltatune.backbone.load import load
    from deltatune.cli.saved import read
    from deltatune.delta.exchange import peft, vllm

    delta = read(folder)
    network = load(backbone or delta.backbone_name)
    made = vllm.export_for_vllm(delta, network) if to == "vllm" else peft.export(delta, network)
    peft.write(made, out)
    use = (
        vllm.command(made, out.name, out, network)
        if to == "vllm"
        else f'peft.PeftModel.from_pretrained(model, "{out}")'
    )
    left = (
        f"its head, {type(delta.head).__name__}, has no equal there and stays behind" if delta.head is not None else ""
    )
    found = {"folder": str(out), "format": to, "use": use, "left_out": left or None}
    say(found, as_json, f"{out}: {made.config['peft_type']} for {to}" + (f"; {left}" if left else ""), use)

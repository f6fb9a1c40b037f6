"""`deltatune doctor`: why a delta has no effect."""

from __future__ import annotations

from typing import Any

from deltatune.cli.options import AsJson, Folder, OtherBackbone
from deltatune.cli.output import plain, say, table

EXAMPLE = "deltatune doctor best/"


def doctor(folder: Folder, backbone: OtherBackbone = None, as_json: AsJson = False) -> None:
    """Look for reasons why a saved delta has no effect, or a bad one, and say what to do about each.

    The exit status is 0 whatever is found: read the findings, or "healthy" of --json. It is 2 if there is no delta to
    look at.
    """
    from deltatune.cli.diagnosis import SENTENCES, diagnose
    from deltatune.cli.saved import read
    from deltatune.studies.formatting import magnitude

    delta = read(folder)
    found = diagnose(delta, backbone)
    norms = delta.norms()
    answer = {
        "delta": str(folder),
        "backbone": backbone or delta.backbone_name,
        "healthy": not found.findings,
        "findings": [{"code": one.code, "what": one.what, "fix": one.fix} for one in found.findings],
        "effect": {"largest": found.largest, "relative": found.relative},
        "sites": [{"site": key, "norm": norms[key], "effect": found.at_sites.get(key)} for key in norms],
    }
    shown: list[Any] = [f"{folder}: {one.what}\n  → {one.fix}" for one in found.findings]
    if not found.findings:
        shown.append(f"{folder}: healthy")
    if found.largest is not None and found.relative is not None:
        shown.append(
            f"On {len(SENTENCES)} inputs it changes the hidden states by {100 * found.relative:.3g} % of their "
            f"norm, one value by up to {found.largest:.3g}."
        )
    if norms:
        listed = table("site", "norm of the delta", "effect there", right=("norm of the delta", "effect there"))
        for key, norm in norms.items():
            listed.add_row(key, magnitude(plain(norm)), magnitude(plain(found.at_sites.get(key))))
        shown.append(listed)
    say(answer, as_json, *shown)

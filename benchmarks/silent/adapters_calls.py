"""Three ordinary calls of adapters, and the same asked of deltatune.

adapters needs an older transformers, so its side runs in an environment of its own (`environment`), where
`in_adapters.py` measures it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import torch
from silent.case import Case, Measured, bare, distance, first, with_changes
from torch import Tensor, nn

from deltatune.backbone.embedded import cache_folder
from deltatune.backbone.load import Backbone
from deltatune.compose.expression import parse
from deltatune.delta.adapted import Adapted
from deltatune.delta.delta import Delta
from deltatune.laws.families import tiny
from deltatune.laws.subject import moved

PINNED = ("adapters==1.3.0", "transformers==4.57.6", "torch==2.13.0")
IDS = torch.arange(5, 33).reshape(4, 7)


class Skipped(Exception):
    """The environment cannot be made; says why."""


def place() -> Path:
    """The folder of the environment."""
    return cache_folder() / f"silent-{PINNED[0].replace('==', '-')}"


def environment() -> Path:
    """The interpreter of an environment with adapters, made first where it is absent.

    Skipped where pip cannot install it, or would take a build of torch for CUDA, which is gigabytes for nothing.
    """
    folder = place()
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if (folder / "complete").exists():
        return python
    venv.create(folder, with_pip=True, clear=True)
    planned = _pip(python, "--dry-run", "--quiet", "--report", "-", *PINNED)
    wanted = [item["metadata"]["name"] for item in json.loads(planned)["install"]]
    cuda = [name for name in wanted if name.startswith("nvidia")]
    if cuda:
        raise Skipped(f"pip would take {cuda[0]} and {len(cuda) - 1} more for CUDA: give it an index of CPU builds")
    _pip(python, "--quiet", *PINNED)
    (folder / "complete").touch()
    return python


def _pip(python: Path, *arguments: str) -> str:
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Skipped(f"pip failed: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}")
    return done.stdout


def theirs() -> tuple[dict[str, Measured], dict[str, str]]:
    """What adapters gives, by case, and the versions of its environment."""
    script = Path(__file__).with_name("in_adapters.py")
    done = subprocess.run([str(environment()), str(script)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: Measured(**figures) for name, figures in found["figures"].items()}, found["versions"]


def made(text: str, backbone: Backbone, name: str, seed: int) -> Delta:
    """A delta moved away from its start."""
    return moved(Delta.build(parse(text), backbone, seed=seed, name=name), seed, 0.5)


def average() -> Measured:
    backbone = Backbone(tiny("bert"))
    one, two = made("lora(r=2)", backbone, "one", 1), made("lora(r=2)", backbone, "two", 2)
    changes: dict[str, Tensor] = {}
    for delta in (one, two):
        for site, layer in delta.at_sites():
            low: Any = layer
            name = f"{site.exit}.weight"
            changes[name] = changes.get(name, torch.zeros(())) + 0.5 * low.scale * low.B.detach() @ low.A.detach()
    right = with_changes("bert", changes)
    with Adapted(backbone, [0.5 * one + 0.5 * two]) as adapted:
        return Measured(distance(first(adapted), right), distance(right, bare()))


def batch_split() -> Measured:
    backbone = Backbone(tiny("bert"))
    deltas = [made("lora(r=2)", backbone, "one", 1), made("dora(r=2)", backbone, "two", 2)]
    alone = []
    for delta in deltas:
        with Adapted(backbone, [delta]) as adapted:
            alone.append(first(adapted))
    right = torch.cat([alone[0][:2], alone[1][2:]])
    with Adapted(backbone, deltas) as adapted:
        found = first(adapted, deltas=["one", "one", "two", "two"])
    return Measured(distance(found, right), distance(right, bare()))


def gemma() -> nn.Module:
    """A tiny random Gemma 2."""
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(0)
    sizes = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    config = Gemma2Config(**sizes, num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return Gemma2Model(config).eval()


@torch.no_grad()
def bottleneck() -> Measured:
    backbone = Backbone(gemma())
    delta = made("adapter(m=2)", backbone, "one", 1)
    module = gemma()
    plain = module(IDS)[0]
    for site, layer in delta.at_sites():
        assert site.exit is not None

        def added(_: Any, __: Any, output: Any, own: Any = layer) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            inner = torch.nn.functional.gelu(hidden @ own.down.T + own.down_bias)
            found = hidden + inner @ own.up.T + own.up_bias
            return (found, *output[1:]) if isinstance(output, tuple) else found

        module.get_submodule(site.exit).register_forward_hook(added)
    right = module(IDS)[0]
    with Adapted(backbone, [delta]) as adapted:
        return Measured(distance(adapted(IDS)[0], right), distance(right, plain))


CASES = (
    Case("average", "adapters", '`Average("one", "two", weights=[0.5, 0.5])` of two LoRAs', "the mean of the two",
         "the mean of the changes added to the weights by hand", "The weighted parts are averaged once more, so the"
         " effect is half as large.", average),
    Case("batch_split", "adapters", '`BatchSplit("lora", "dora", batch_sizes=[2, 2])`', "each row under its own adapter",
         "each adapter alone", "How the last one combines with the layer decides for all rows.", batch_split),
    Case("bottleneck", "adapters", '`add_adapter(..., config="seq_bn")` on Gemma 2', "each block's adapter reads its own norm",
         "the same with each block's norm handed to its hook", "Documented as applied with the block's norm before it; all blocks get the last one's. deltatune's adapter"
         " has no norm: measured beside its formula by hand.", bottleneck),
)  # fmt: skip

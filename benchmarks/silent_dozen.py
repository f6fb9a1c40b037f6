"""Twelve ordinary calls that give wrong numbers without a word elsewhere, and what comes of them here.

Run as: .venv/bin/python benchmarks/silent_dozen.py [--adapters]

Nine are calls of PEFT, in this environment. Three are calls of adapters, which needs an older transformers: with
`--adapters` an environment of its own is made for it (some minutes, from the package index), without it their stored
outcome stays in the page. Every line is computed when the script runs: a number that should have moved and did not, or
one that moved and should not have. A line whose fault is no longer there says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from common import ROOT, machine, table
from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.compose.expression import parse
from deltatune.delta.adapted import Adapted
from deltatune.delta.algebra import soup
from deltatune.delta.delta import Delta
from deltatune.errors import DeltatuneError
from deltatune.laws.families import inputs, tiny
from deltatune.laws.subject import moved

PAGE = ROOT / "docs" / "silent.md"
KEPT = ROOT / "docs" / "silent_adapters.json"
ADAPTERS = ("adapters==1.3.0",)


@dataclass(frozen=True)
class Outcome:
    """What a call gave: a sentence with its numbers, and whether it is what the caller asked for."""

    said: str
    right: bool


@dataclass(frozen=True)
class Case:
    """An ordinary call, there and here."""

    what: str
    theirs: Callable[[], Outcome]
    ours: Callable[[], Outcome]


def off(one: Tensor, other: Tensor) -> float:
    """The greatest difference."""
    return float((one - other).abs().max())


def first(module: Any, family: str, **more: Any) -> Tensor:
    """The first output on the family's batch."""
    with torch.no_grad():
        found: Tensor = module(**inputs(family), **more)[0]
    return found


def stirred(model: nn.Module, words: tuple[str, ...], seed: int) -> None:
    """Move the parameters whose names have one of these words away from their start."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in words):
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=draw))


def ours(text: str, family: str, seed: int, name: str, backbone: Backbone | None = None) -> Delta:
    """A delta of ours, moved away from its start."""
    return moved(Delta.build(parse(text), backbone or Backbone(tiny(family)), seed=seed, name=name), seed, 0.5)


def refused(call: Callable[[], Any]) -> Outcome:
    """What an error of ours says, or that there was none."""
    try:
        call()
    except DeltatuneError as error:
        return Outcome(f"refused: {str(error).splitlines()[0]}", True)
    return Outcome("no error", False)


# Rows routed to adapters by name


def _routed(config: Any, words: tuple[str, ...], family: str) -> Outcome:
    model: Any = peft.get_peft_model(tiny(family), config, adapter_name="a")
    model.add_adapter("b", config)
    stirred(model, words, 1)
    model.eval()
    model.set_adapter("a")
    alone_a = first(model, family)
    model.set_adapter("b")
    alone_b = first(model, family)
    model.set_adapter("a")
    mixed = first(model, family, adapter_names=["a", "b", "__base__", "b"])
    wanted = off(alone_a[1], alone_b[1])
    apart = off(mixed[1], alone_b[1])
    return Outcome(f"row 2, routed to `b`, is {apart:.2f} off `b` (and `a` and `b` differ by {wanted:.2f})", apart < 1e-4)


def _routed_here(text: str, family: str) -> Outcome:
    backbone = Backbone(tiny(family))
    a, b = (ours(text, family, seed, name, backbone) for seed, name in ((1, "a"), (2, "b")))
    with Adapted(backbone, [a, b]) as adapted:
        mixed = first(adapted, family, deltas=["a", "b", None, "b"])
        alone = first(adapted, family, deltas=["b"] * 4)
    apart = off(mixed[1], alone[1])
    return Outcome(f"row 2 is `b`'s own, {apart:.0e} off", apart < 1e-4)


def ia3_rows() -> Outcome:
    return _routed(peft.IA3Config(task_type="CAUSAL_LM"), ("ia3_l",), "llama")


def prompt_rows() -> Outcome:
    return _routed(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), ("prompt_encoder",), "llama")


# Files on backbones that they do not belong to


def _saved(folder: Path, family: str = "bert", module: nn.Module | None = None) -> Any:
    model: Any = peft.get_peft_model(
        module or tiny(family), peft.LoraConfig(r=2, target_modules=["query", "value"] if family == "bert" else ["q", "v"])
    )
    stirred(model, ("lora_",), 1)
    model.eval().save_pretrained(str(folder))
    return model


def _quietly(call: Callable[[], Any]) -> tuple[Any, int]:
    """The result, and how many warnings there were."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return call(), len([w for w in caught if issubclass(w.category, UserWarning)])


def other_weights() -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        _saved(Path(folder))
        other = tiny("bert")
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        _, said = _quietly(lambda: peft.PeftModel.from_pretrained(other, folder))
    return Outcome(f"loaded onto weights half as large again, {said} warnings", said > 0)


def other_weights_here() -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        ours("lora", "bert", 1, "a").save(f"{folder}/a")
        other = tiny("bert")
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        return refused(lambda: Delta.load(f"{folder}/a", Backbone(other)))


def _deeper(blocks: int) -> nn.Module:
    from transformers import AutoModel, BertConfig

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=blocks, num_attention_heads=4, intermediate_size=48
    )
    made: nn.Module = AutoModel.from_config(config).eval()
    return made


def half_an_adapter() -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        _saved(Path(folder), module=_deeper(4))
        _, said = _quietly(lambda: peft.PeftModel.from_pretrained(_deeper(2), folder))
    return Outcome(f"an adapter of 4 blocks on 2 blocks: half of it dropped, {said} warnings", said > 0)


def half_here() -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        four = Backbone(_deeper(4))
        moved(Delta.build(parse("lora"), four, name="a")).save(f"{folder}/a")
        return refused(lambda: Delta.load(f"{folder}/a", Backbone(_deeper(2)), verify=False))


def lost_tensor() -> Outcome:
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        model = _saved(Path(folder))
        whole = first(model, "bert")
        file = Path(folder) / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors.pop(next(name for name in tensors if "lora_B" in name))
        save_file(tensors, file, metadata={"format": "pt"})
        target: Any = peft.get_peft_model(tiny("bert"), peft.LoraConfig(r=2, target_modules=["query", "value"]), "mine")
        _, said = _quietly(lambda: target.load_adapter(folder, "theirs"))
        target.set_adapter("theirs")
        apart = off(first(target.eval(), "bert"), whole)
    return Outcome(f"a tensor is missing: output {apart:.2f} off, {said} warnings", said > 0 or apart < 1e-4)


def lost_here() -> Outcome:
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        backbone = Backbone(tiny("bert"))
        ours("lora", "bert", 1, "a", backbone).save(f"{folder}/a")
        file = Path(folder) / "a" / "delta.safetensors"
        tensors = load_file(file)
        tensors.pop(next(iter(tensors)))
        save_file(tensors, file)
        return refused(lambda: Delta.load(f"{folder}/a", backbone))


# What a call leaves behind


def leaked_hook() -> Outcome:
    model: Any = peft.get_peft_model(
        tiny("llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"), "a"
    )
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    stirred(model, ("lora_",), 1)
    model.eval().set_adapter("a")
    before = first(model, "llama")
    down = model.base_model.model.model.layers[1].mlp.down_proj

    def fail(*_: Any) -> None:
        raise MemoryError

    handle = down.register_forward_hook(fail)
    try:
        first(model, "llama", adapter_names=["b"] * 4)
    except MemoryError:
        handle.remove()
    after = first(model, "llama")
    apart = off(after, before)
    return Outcome(f"after a routed call that ran out of memory, an ordinary call is {apart:.2f} off", apart < 1e-5)


def leaked_here() -> Outcome:
    backbone = Backbone(tiny("llama"))
    a, b = (ours("lora", "llama", seed, name, backbone) for seed, name in ((1, "a"), (2, "b")))
    with Adapted(backbone, [a, b]) as adapted:
        before = first(adapted, "llama", deltas=["a"] * 4)

        def fail(*_: Any) -> None:
            raise MemoryError

        handle = backbone.module.get_submodule("model.layers.1.mlp.down_proj").register_forward_hook(fail)
        try:
            first(adapted, "llama", deltas=["b"] * 4)
        except MemoryError:
            handle.remove()
        apart = off(first(adapted, "llama", deltas=["a"] * 4), before)
    return Outcome(f"the next call is what it was, {apart:.0e} off", apart == 0.0)


def existing_name() -> Outcome:
    config = peft.LoraConfig(r=2, target_modules=["query", "value"])
    model: Any = peft.get_peft_model(tiny("bert"), config, "a")
    model.add_adapter("b", config)
    stirred(model, ("lora_",), 1)
    model.eval()
    model.set_adapter("b")
    before = first(model, "bert")
    _, said = _quietly(lambda: model.add_weighted_adapter(["a", "b"], [0.9, 0.1], "b"))
    model.set_adapter("b")
    apart = off(first(model, "bert"), before)
    return Outcome(f"asked for the mean of two under the name of one: that one is {apart:.0e} off what it was, {said} warnings", said > 0 or apart > 1e-4)


def existing_here() -> Outcome:
    backbone = Backbone(tiny("bert"))
    a, b = (ours("lora", "bert", seed, name, backbone) for seed, name in ((1, "a"), (2, "b")))
    mean = soup([a, b], [0.9, 0.1])
    mean.name = "b"
    return refused(lambda: Adapted(backbone, [a, b, mean]))


def encoder_prefix() -> Outcome:
    model: Any = peft.get_peft_model(
        tiny("t5"), peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    )
    stirred(model, ("prompt_encoder",), 1)
    batch = inputs("t5")
    ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        bare = tiny("t5").get_encoder()(**ids)[0]  # type: ignore[operator]
        found = model.eval()(**batch).encoder_last_hidden_state
    apart = off(found, bare)
    return Outcome(f"with a prefix, the encoder's output is {apart:.0e} off the bare encoder's", apart > 1e-4)


def encoder_here() -> Outcome:
    backbone = Backbone(tiny("t5"))
    batch = inputs("t5")
    ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        bare = tiny("t5").get_encoder()(**ids)[0]  # type: ignore[operator]
        with Adapted(backbone, [ours("prefix(n=3)", "t5", 1, "a", backbone)]) as adapted:
            found = adapted(**batch).encoder_last_hidden_state
    apart = off(found, bare)
    return Outcome(f"the encoder has its prefix, too: {apart:.2f} off the bare one", apart > 1e-4)


def base_changed() -> Outcome:
    base = tiny("bert")
    before = first(base, "bert")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query", "value"]))
    stirred(model, ("lora_",), 1)
    apart = off(first(base, "bert"), before)
    return Outcome(f"the backbone itself, used elsewhere, is {apart:.2f} off what it was", apart < 1e-6)


def base_here() -> Outcome:
    base = tiny("bert")
    before = first(base, "bert")
    backbone = Backbone(base)
    with Adapted(backbone, [ours("lora", "bert", 1, "a", backbone)]):
        apart = off(first(base, "bert"), before)
    return Outcome(f"a delta acts in calls of the adapted model alone: {apart:.0e} off", apart == 0.0)


CASES = (
    Case("PEFT: `adapter_names=[...]` with (IA)³", ia3_rows, lambda: _routed_here("ia3", "llama")),
    Case("PEFT: `adapter_names=[...]` with prompts", prompt_rows, lambda: _routed_here("prompt(n=3)", "llama")),
    Case("PEFT: `from_pretrained` on a backbone with other weights", other_weights, other_weights_here),
    Case("PEFT: `from_pretrained` on a backbone with fewer blocks", half_an_adapter, half_here),
    Case("PEFT: `load_adapter` of a file that lacks a tensor", lost_tensor, lost_here),
    Case("PEFT: a call after a routed call that failed", leaked_hook, leaked_here),
    Case("PEFT: `add_weighted_adapter` under a name that is taken", existing_name, existing_here),
    Case("PEFT: a prefix on T5", encoder_prefix, encoder_here),
    Case("PEFT: the backbone after `get_peft_model`", base_changed, base_here),
)

# Runs in the environment of adapters, which knows nothing of this package.
THEIRS = '''
import json, torch, transformers, adapters
from adapters.composition import Average, BatchSplit
config = transformers.BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
ids = torch.arange(5, 33).reshape(4, 7)
def model(*kinds):
    torch.manual_seed(0)
    made = adapters.AutoAdapterModel.from_config(config)
    for name, kind in kinds:
        made.add_adapter(name, config=kind)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n, p in made.named_parameters():
            if any(f".{name}." in n or n.endswith(f".{name}") for name, _ in kinds):
                p.add_(0.3 * torch.randn(p.shape, generator=draw))
    return made.eval()
def out(made, setup):
    made.set_active_adapters(setup)
    with torch.no_grad():
        return made(ids).last_hidden_state if hasattr(made(ids), "last_hidden_state") else made(ids)[0]
said = {}
m = model(("a", "seq_bn"))
alone = out(m, "a"); same = out(m, Average("a", "a", weights=[0.5, 0.5])) if True else None
said["average"] = float((alone - same).abs().max())
m = model(("l", "lora"), ("i", "ia3"))
lora = out(m, "l"); mixed = out(m, BatchSplit("l", "i", batch_sizes=[2, 2]))
said["mixed"] = float((mixed[:2] - lora[:2]).abs().max())
print(json.dumps({"said": said, "adapters": adapters.__version__, "transformers": transformers.__version__}))
'''


def main() -> None:
    """Run the cases and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--page", type=Path, default=PAGE)
    chosen = parser.parse_args()
    lines = []
    for case in CASES:
        there, here = case.theirs(), case.ours()
        print(f"{case.what}\n  there: {there.said} ({'right' if there.right else 'wrong, and silent'})\n  here: {here.said}")
        lines.append((case.what, there.said + (" – no longer a fault" if there.right else ""), here.said))
        if not here.right:
            sys.exit(f"ours is wrong: {here.said}")
    print(table(("call", "there", "here"), lines))


if __name__ == "__main__":
    main()

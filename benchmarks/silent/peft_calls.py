"""Nine ordinary calls of PEFT. Both sides have the same tensors wherever deltatune reads PEFT's folder."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from silent.by_hand import t5_encoder
from silent.case import Case, Measured, bare, counted, distance, first, read, stirred, with_changes
from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.compose.expression import parse
from deltatune.delta.adapted import Adapted
from deltatune.delta.algebra import soup
from deltatune.delta.delta import Delta
from deltatune.laws.families import inputs, tiny
from deltatune.laws.subject import moved

NAMES = ("first", "second")
ROWS = ("first", "second", None, "second")
IA3: Any = functools.partial(peft.IA3Config, task_type="CAUSAL_LM")
PROMPT: Any = functools.partial(peft.PromptTuningConfig, task_type="CAUSAL_LM", num_virtual_tokens=3)
LLAMA_LORA: Any = functools.partial(peft.LoraConfig, r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
LORA: Any = functools.partial(peft.LoraConfig, r=2, target_modules=["query", "value"])
PREFIX: Any = functools.partial(peft.PrefixTuningConfig, task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)


def pair(config: Any, word: str, family: str) -> Any:
    """A PEFT model with two adapters that were moved away from their starts."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = peft.get_peft_model(tiny(family), config(), adapter_name=NAMES[0])
        model.add_adapter(NAMES[1], config())
    stirred(model, word, 1)
    return model.eval()


@contextlib.contextmanager
def saved(model: Any) -> Iterator[Path]:
    """The folder that a PEFT model is saved into."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        yield Path(folder)


def both_read(model: Any, backbone: Backbone) -> list[Delta]:
    """The two adapters of a PEFT model as deltas of ours."""
    with saved(model) as folder:
        return [read(str(folder / name), backbone, name) for name in NAMES]


# Rows routed to adapters by name


def alone(model: Any, family: str) -> Tensor:
    """What each row gives under its own adapter, asked for one adapter at a time."""
    found: dict[str | None, Tensor] = {}
    for name in NAMES:
        model.set_adapter(name)
        found[name] = first(model, family)[:, -inputs(family)["input_ids"].shape[1] :]
    found[None] = bare(family)
    model.set_adapter(NAMES[0])
    return torch.stack([found[name][row] for row, name in enumerate(ROWS)])


def rows_theirs(config: Any, word: str, family: str) -> Measured:
    model = pair(config, word, family)
    right = alone(model, family)
    mixed, warned = counted(lambda: first(model, family, adapter_names=[name or "__base__" for name in ROWS]))
    return Measured(distance(mixed[:, -right.shape[1] :], right), distance(right, bare(family)), warned)


def rows_ours(config: Any, word: str, family: str) -> Measured:
    model = pair(config, word, family)
    right = alone(model, family)
    backbone = Backbone(tiny(family))
    with Adapted(backbone, both_read(model, backbone)) as adapted:
        mixed = first(adapted, family, deltas=list(ROWS))
    return Measured(distance(mixed, right), distance(right, bare(family)))


# Files on backbones that they do not belong to


def trained(module: nn.Module | None = None) -> Any:
    """A PEFT model with one LoRA that was moved away from its start."""
    torch.manual_seed(0)
    model: Any = peft.get_peft_model(module or tiny("bert"), LORA())
    stirred(model, "lora_", 1)
    return model.eval()


def altered() -> nn.Module:
    """The family's network after some training of its own: the same shapes, other weights."""
    module = tiny("bert")
    stirred(module, "encoder", 7)
    return module


def deeper(blocks: int) -> nn.Module:
    """A BERT of so many blocks; a smaller one has the same weights as the first blocks of a larger one."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = dict(vocab_size=99, hidden_size=32, num_attention_heads=4, intermediate_size=48)
    module = BertModel(BertConfig(num_hidden_layers=4, **sizes))
    del module.encoder.layer[blocks:]
    module.config.num_hidden_layers = blocks
    return module.eval()


def loaded_theirs(made: nn.Module, other: nn.Module) -> Measured:
    model = trained(made)
    right = first(model)
    with model.disable_adapter():
        scale = distance(right, first(model))
    with saved(model) as folder:
        found, warned = counted(lambda: peft.PeftModel.from_pretrained(other, folder))
    return Measured(distance(first(found.eval()), right), scale, warned)


def other_weights_ours() -> Measured:
    backbone = Backbone(tiny("bert"))
    delta = moved(Delta.build(parse("lora(r=2)"), backbone, name="mine"))
    with tempfile.TemporaryDirectory() as folder, Adapted(backbone, [delta]) as adapted:
        right = first(adapted)
        delta.save(f"{folder}/mine")
        other = Backbone(altered())
        with Adapted(other, [Delta.load(f"{folder}/mine", other)]) as there:
            return Measured(distance(first(there), right))


def fewer_blocks_ours() -> Measured:
    model = trained(deeper(4))
    right = first(model)
    backbone = Backbone(deeper(2))
    with saved(model) as folder, Adapted(backbone, [read(str(folder), backbone, "mine")]) as adapted:
        return Measured(distance(first(adapted), right))


@contextlib.contextmanager
def torn() -> Iterator[tuple[Path, Tensor]]:
    """A saved adapter that has lost one tensor, and the output that it had before."""
    from safetensors.torch import load_file, save_file

    model = trained()
    with saved(model) as folder:
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors.pop(next(name for name in tensors if "lora_B" in name))
        save_file(tensors, file, metadata={"format": "pt"})
        yield folder, first(model)


def lost_tensor_theirs() -> Measured:
    with torn() as (folder, right):
        target: Any = peft.get_peft_model(tiny("bert"), LORA(), NAMES[0])
        _, warned = counted(lambda: target.load_adapter(folder, NAMES[1]))
    target.set_adapter(NAMES[1])
    return Measured(distance(first(target.eval()), right), distance(right, bare()), warned)


def lost_tensor_ours() -> Measured:
    backbone = Backbone(tiny("bert"))
    with torn() as (folder, right), Adapted(backbone, [read(str(folder), backbone, "mine")]) as adapted:
        return Measured(distance(first(adapted), right))


# What a call leaves behind


def fail(*_: Any) -> None:
    """What a call does that runs out of memory half-way."""
    raise MemoryError


def after_failure(model: Any, inside: nn.Module, before: dict[str, Any], failing: dict[str, Any]) -> Measured:
    """How far an ordinary call is off after one that failed in the module `inside`."""
    right = first(model, "llama", **before)
    handle = inside.register_forward_hook(fail)
    with contextlib.suppress(MemoryError):
        first(model, "llama", **failing)
    handle.remove()
    found, warned = counted(lambda: first(model, "llama", **before))
    return Measured(distance(found, right), distance(right, bare("llama")), warned)


def after_failure_theirs() -> Measured:
    model = pair(LLAMA_LORA, "lora_", "llama")
    inside = model.base_model.model.model.layers[1].mlp.down_proj
    return after_failure(model, inside, {}, {"adapter_names": [NAMES[1]] * 4})


def after_failure_ours() -> Measured:
    backbone = Backbone(tiny("llama"))
    inside = backbone.module.get_submodule("model.layers.1.mlp.down_proj")
    with Adapted(backbone, both_read(pair(LLAMA_LORA, "lora_", "llama"), backbone)) as adapted:
        return after_failure(adapted, inside, {"deltas": NAMES[0]}, {"deltas": NAMES[1]})


# Means of two


def mean_by_hand(model: Any, weights: tuple[float, float]) -> Tensor:
    """The output of the backbone with the weighted sum of the two LoRAs' changes added to its weights."""
    changes: dict[str, Tensor] = {}
    for path, layer in model.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            parts = (weight * layer.get_delta_weight(name) for name, weight in zip(NAMES, weights, strict=True))
            changes[f"{path}.weight"] = sum(parts, torch.zeros(()))
    return with_changes("bert", changes)


def taken_name_theirs() -> Measured:
    model = pair(LORA, "lora_", "bert")
    right = mean_by_hand(model, (0.9, 0.1))
    _, warned = counted(lambda: model.add_weighted_adapter(list(NAMES), [0.9, 0.1], NAMES[1]))
    model.set_adapter(NAMES[1])
    return Measured(distance(first(model), right), distance(right, bare()), warned)


def taken_name_ours() -> Measured:
    model = pair(LORA, "lora_", "bert")
    backbone = Backbone(tiny("bert"))
    deltas = both_read(model, backbone)
    mean = soup(deltas, [0.9, 0.1])
    mean.name = NAMES[1]
    with Adapted(backbone, [*deltas, mean]) as adapted:
        return Measured(distance(first(adapted, deltas=NAMES[1]), mean_by_hand(model, (0.9, 0.1))))


def linear_mean_theirs() -> Measured:
    model = pair(LORA, "lora_", "bert")
    right = mean_by_hand(model, (0.5, 0.5))
    mean = functools.partial(model.add_weighted_adapter, list(NAMES), [0.5, 0.5], "mean", combination_type="linear")
    _, warned = counted(mean)
    model.set_adapter("mean")
    return Measured(distance(first(model), right), distance(right, bare()), warned)


def linear_mean_ours() -> Measured:
    model = pair(LORA, "lora_", "bert")
    right = mean_by_hand(model, (0.5, 0.5))
    backbone = Backbone(tiny("bert"))
    one, two = both_read(model, backbone)
    with Adapted(backbone, [0.5 * one + 0.5 * two]) as adapted:
        return Measured(distance(first(adapted), right), distance(right, bare()))


# A prefix on a network with two stacks


def encoder_theirs() -> Measured:
    torch.manual_seed(0)
    model: Any = peft.get_peft_model(tiny("t5"), PREFIX())
    stirred(model, "prompt_encoder", 1)
    model.eval()
    weight = model.get_prompt_embedding_to_save("default").reshape(3, 2, 2, -1)
    prefix = [(weight[:, block, 0], weight[:, block, 1]) for block in range(2)]
    right, plain = (t5_encoder(tiny("t5"), own) for own in (prefix, None))
    with torch.no_grad():
        found, warned = counted(lambda: model(**inputs("t5")).encoder_last_hidden_state)
    return Measured(distance(found, right), distance(right, plain), warned)


def encoder_ours() -> Measured:
    backbone = Backbone(tiny("t5"))
    delta = moved(Delta.build(parse("prefix(n=3)"), backbone, name="mine"), 1, 0.5)
    own = {site.key: layer for site, layer in delta.at_sites()}
    layers = [own[f"encoder.{block}.attn"] for block in range(2)]
    prefix = [(layer.get_parameter("keys"), layer.get_parameter("values")) for layer in layers]
    right, plain = (t5_encoder(tiny("t5"), one) for one in (prefix, None))
    with Adapted(backbone, [delta]) as adapted, torch.no_grad():
        found = adapted(**inputs("t5")).encoder_last_hidden_state
    return Measured(distance(found, right), distance(right, plain))


def case(name: str, call: str, expected: str, right: str, note: str, theirs: Any, ours: Any) -> Case:
    return Case(name, "peft", call, expected, right, note, ours, theirs)


CASES = (
    case("ia3_rows", "`model(..., adapter_names=[...])` with (IA)³", "each row under its own adapter",
         "each adapter alone, by `set_adapter`", "The names are ignored and the active adapter acts on all rows. They are"
         " read for LoRA, RoAd and GLoRA (peft#759).", functools.partial(rows_theirs, IA3, "ia3_l", "llama"),
         functools.partial(rows_ours, IA3, "ia3_l", "llama")),
    case("prompt_rows", "`model(..., adapter_names=[...])` with prompt tuning", "each row under its own prompt",
         "each prompt alone, by `set_adapter`", "As above.",
         functools.partial(rows_theirs, PROMPT, "prompt_encoder", "llama"),
         functools.partial(rows_ours, PROMPT, "prompt_encoder", "llama")),
    case("other_weights", "`PeftModel.from_pretrained` on a backbone with other weights", "the adapted model as it was saved",
         "the saved model's output", "The folder names its backbone and does not describe its weights (peft#1932). Of such"
         " a folder deltatune can only warn that it cannot verify them; its own files carry a fingerprint.",
         lambda: loaded_theirs(tiny("bert"), altered()), other_weights_ours),
    case("fewer_blocks", "`PeftModel.from_pretrained` on a backbone with half the blocks", "the adapted model as it was saved",
         "the saved model's output", "Tensors for places that the backbone lacks are left out.",
         lambda: loaded_theirs(deeper(4), deeper(2)), fewer_blocks_ours),
    case("lost_tensor", "`model.load_adapter` of a file that has lost a tensor", "the adapted model as it was saved",
         "the saved model's output", "What is missing is in the value that `load_adapter` returns; the tensor keeps its"
         " start. `from_pretrained` warns.", lost_tensor_theirs, lost_tensor_ours),
    case("after_failure", "an ordinary call after an `adapter_names` call that ran out of memory", "what the call gave before",
         "the same call before", "The hooks of the failed call stay (peft#3475).", after_failure_theirs,
         after_failure_ours),
    case("taken_name", "`add_weighted_adapter` under the name of an adapter that exists", "the weighted mean of the two",
         "the mean of the changes added to the weights by hand", "The call returns without doing anything.",
         taken_name_theirs, taken_name_ours),
    case("linear_mean", '`add_weighted_adapter(..., combination_type="linear")`', "the mean of the two LoRAs' effects",
         "the mean of the changes added to the weights by hand", "A and B are summed each for itself, by the roots of the"
         " weights, so that A of one meets B of the other. The default, `svd`, has no such terms.", linear_mean_theirs,
         linear_mean_ours),
    case("encoder_prefix", "prefix tuning of T5", "keys and values before the encoder's own, too",
         "the encoder written out by hand", "The prefix stands in the decoder alone (peft#1188); in the paper it stands in both stacks.", encoder_theirs,
         encoder_ours),
)  # fmt: skip

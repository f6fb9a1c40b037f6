"""Three ordinary calls of adapters; run by its own interpreter, in which deltatune is not installed.

Prints one JSON object: the versions, and for each case how far off the output is, what the adapter moves it by, and the
warnings there were.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import adapters
import torch
import transformers
from adapters.composition import Average, BatchSplit
from torch import Tensor

SIZES = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
BERT = transformers.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
GEMMA = transformers.Gemma2Config(
    **SIZES, num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2
)
IDS = torch.arange(5, 33).reshape(4, 7)
told: list[str] = []


class Heard(logging.Handler):
    """Keep what the libraries say to their user; that no adapter is active is said of the bare backbone's run."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING and "none are activated" not in record.getMessage():
            told.append(record.getMessage())


def model(cls: Any, config: Any, **kinds: Any) -> Any:
    """A tiny random model with adapters that were moved away from their starts."""
    torch.manual_seed(0)
    made = cls(config)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)  # at the default 0.02 the blocks do next to nothing
            else:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    adapters.init(made)
    for name, kind in kinds.items():
        made.add_adapter(name, config=kind)
    with torch.no_grad():
        for path, parameter in made.named_parameters():
            if any(f".{name}." in path for name in kinds):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return made.eval()


def output(made: Any, setup: Any) -> Tensor:
    """The hidden states under a set-up of adapters."""
    made.set_active_adapters(setup)
    with torch.no_grad():
        found: Tensor = made(IDS)[0]
    return found


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def average() -> tuple[float, float]:
    """Average of two LoRAs, beside the mean of their changes added to the weights by hand."""
    kinds = {name: adapters.LoRAConfig(r=2) for name in ("one", "two")}
    made = model(transformers.BertModel, BERT, **kinds)
    found, bare = output(made, Average("one", "two", weights=[0.5, 0.5])), output(made, None)
    with torch.no_grad():
        for module in made.modules():
            loras = getattr(module, "loras", {})
            if "one" in loras:
                for name in kinds:
                    low = loras[name]
                    module.weight.add_(0.5 * low.scaling * (low.lora_B @ low.lora_A))
    right = output(made, None)
    return distance(found, right), distance(right, bare)


def batch_split() -> tuple[float, float]:
    """Two rows under a LoRA and two under a DoRA, beside each adapter alone."""
    made = model(transformers.BertModel, BERT, lora=adapters.LoRAConfig(r=2), dora=adapters.DoRAConfig(r=2))
    found = output(made, BatchSplit("lora", "dora", batch_sizes=[2, 2]))
    right = torch.cat([output(made, "lora")[:2], output(made, "dora")[2:]])
    return distance(found, right), distance(right, output(made, None))


def bottleneck() -> tuple[float, float]:
    """The bottleneck adapter of Gemma 2, beside the same with each block's own norm handed to its hook."""
    made = model(transformers.Gemma2Model, GEMMA, one="seq_bn")
    found, bare = output(made, "one"), output(made, None)
    for block in made.layers:
        hooks = block.mlp.down_proj._forward_hooks
        for key, hook in list(hooks.items()):
            if isinstance(hook, partial):
                hooks[key] = partial(hook.func, hook.args[0], lambda block=block: block.post_feedforward_layernorm)
    right = output(made, "one")
    return distance(found, right), distance(right, bare)


def measured(call: Callable[[], tuple[float, float]]) -> dict[str, float]:
    told.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        off, scale = call()
    heard = [one for one in caught if not issubclass(one.category, DeprecationWarning | FutureWarning)]
    return {"off": off, "scale": scale, "warned": len(heard) + len(told)}


if __name__ == "__main__":
    for library in ("adapters", "transformers"):
        logging.getLogger(library).addHandler(Heard())
    figures = {call.__name__: measured(call) for call in (average, batch_split, bottleneck)}
    versions = {package.__name__: package.__version__ for package in (adapters, transformers, torch)}
    print(json.dumps({"figures": figures, "versions": versions}))

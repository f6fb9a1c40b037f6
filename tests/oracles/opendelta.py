"""What OpenDelta 0.3.2 computes, written by hand in torch, and its files.

OpenDelta cannot be imported beside today's transformers. Its layers stand in the network here as they do there, under
the same names, so that a file has the keys that it would have; what they compute is done by hooks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_orig": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "relu": lambda x: x * (x > 0),
    "swish": lambda x: x / (1 + torch.exp(-x)),
    "leakyrelu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "tanh": lambda x: 2 / (1 + torch.exp(-2 * x)) - 1,
}


class LowRank(nn.Module):
    def __init__(self, d_in: int, d_out: int, r: int) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(torch.zeros(r, d_in)), nn.Parameter(torch.zeros(d_out, r))


class Bottleneck(nn.Module):
    def __init__(self, width: int, m: int, act: str) -> None:
        super().__init__()
        self.act = ACTS[act]
        self.modulelist = nn.Sequential()
        self.modulelist.add_module("down_proj", nn.Linear(width, m))
        self.modulelist.add_module("non_linear", nn.Identity())
        self.modulelist.add_module("up_proj", nn.Linear(m, width))

    def forward(self, h: Tensor) -> Tensor:
        down, _, up = self.modulelist
        return up(self.act(down(h)))  # type: ignore[no-any-return]


class Bias(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))


def changed(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A module's output, or the first thing in it, after a change."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def lora(model: nn.Module, paths: Sequence[str], r: int, alpha: float) -> None:
    for path in paths:
        module = model.get_submodule(path)
        layer = LowRank(module.in_features, module.out_features, r)
        module.add_module("lora", layer)

        def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, layer: LowRank = layer) -> Tensor:
            return output + args[0] @ layer.lora_A.T @ layer.lora_B.T * (alpha / r)

        module.register_forward_hook(after)


def adapter(model: nn.Module, paths: Sequence[str], width: int, m: int, act: str = "gelu_new") -> None:
    for path in paths:
        module = model.get_submodule(path)
        layer = Bottleneck(width, m, act)
        module.add_module("adapter", layer)

        def after(_: nn.Module, args: object, output: Any, layer: Bottleneck = layer) -> Any:
            return changed(output, lambda h: layer(h) + h)

        module.register_forward_hook(after)


def parallel_adapter(
    model: nn.Module, pairs: Sequence[tuple[str, str]], width: int, m: int, act: str = "gelu_new"
) -> None:
    for first, last in pairs:
        layer = Bottleneck(width, m, act)
        model.get_submodule(first).add_module("parallel_adapter", layer)
        model.get_submodule(last).add_module(f"parallel_adapter{'_1' if first == last else ''}", layer)
        kept: dict[str, Tensor] = {}

        def before(
            _: nn.Module, args: Any, kwargs: Any, layer: Bottleneck = layer, kept: dict[str, Tensor] = kept
        ) -> None:
            kept["x"] = layer(args[0] if args else kwargs["hidden_states"])

        def after(_: nn.Module, args: object, output: Any, kept: dict[str, Tensor] = kept) -> Any:
            return changed(output, lambda h: kept["x"] + h)

        model.get_submodule(first).register_forward_pre_hook(before, with_kwargs=True)
        model.get_submodule(last).register_forward_hook(after)


def bitfit(model: nn.Module, paths: Sequence[str], beside: Sequence[str] = ()) -> None:
    """Unfreeze the biases at `paths`, give one to linears that have none, and one of its own to those in `beside`."""
    model.requires_grad_(False)
    for path in paths:
        module = model.get_submodule(path)
        if module.bias is None:
            module.register_parameter("bias", nn.Parameter(torch.zeros(module.out_features)))
        module.bias.requires_grad_()
    for path in beside:
        module = model.get_submodule(path)
        layer = Bias(module.weight.shape[0])
        module.add_module("bitfit", layer)
        module.register_forward_hook(lambda _, args, output, layer=layer: output + layer.bias)


class Prefixed(nn.Module):
    """A network with OpenDelta's prefixes: keys and values that stand in the cache of each block, while positions stay."""

    def __init__(self, model: nn.Module, paths: Sequence[str], n: int, network: bool) -> None:
        super().__init__()
        config: Any = model.config
        self.model, self.paths, self.n, self.network = model, paths, n, network
        self.heads, self.d = config.num_attention_heads, config.hidden_size
        holder = nn.Module()
        if network:
            holder.wte = nn.Embedding(n, 6)
            holder.control_trans = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2 * len(paths) * self.d))
            model.get_submodule(paths[0]).add_module("reparams", holder)
            return
        for path in paths:
            one = nn.Module()
            one.past_key, one.past_value = nn.Parameter(torch.randn(n, self.d)), nn.Parameter(torch.randn(n, self.d))
            model.get_submodule(path).add_module("prefix", one)

    def tables(self) -> list[tuple[Tensor, Tensor]]:
        if not self.network:
            holders: list[Any] = [self.model.get_submodule(f"{path}.prefix") for path in self.paths]
            return [(one.past_key, one.past_value) for one in holders]
        holder: Any = self.model.get_submodule(f"{self.paths[0]}.reparams")
        made = holder.control_trans(holder.wte(torch.arange(self.n))).view(self.n, 2 * len(self.paths), self.d)
        return [(made[:, 2 * i], made[:, 2 * i + 1]) for i in range(len(self.paths))]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        rows = len(input_ids)
        cache = hf.DynamicCache()
        for block, pair in enumerate(self.tables()):
            split = [x.reshape(self.n, self.heads, -1).transpose(0, 1).expand(rows, -1, -1, -1) for x in pair]
            cache.update(*split, block)
        positions = torch.arange(input_ids.shape[1]).expand(rows, -1)
        if self.model.config.model_type == "roberta":
            positions = attention_mask.cumsum(1) * attention_mask + 1
        return self.model(
            input_ids=input_ids,
            attention_mask=torch.cat([attention_mask.new_ones(rows, self.n), attention_mask], 1),
            position_ids=positions,
            past_key_values=cache,
        )


class Prompted(nn.Module):
    """A network with OpenDelta's soft prompt before its (encoder's) first token."""

    def __init__(self, model: nn.Module, n: int, at: str = "") -> None:
        super().__init__()
        self.model, self.n = model, n
        self.layer = nn.Module()
        self.layer.soft_embeds = nn.Parameter(torch.randn(n, model.get_input_embeddings().embedding_dim))
        model.get_submodule(at).add_module("soft_prompt_layer", self.layer)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **more: Tensor) -> Any:
        rows = len(input_ids)
        tokens = self.layer.soft_embeds.expand(rows, -1, -1)
        return self.model(
            inputs_embeds=torch.cat([tokens, self.model.get_input_embeddings()(input_ids)], 1),
            attention_mask=torch.cat([attention_mask.new_ones(rows, self.n), attention_mask], 1),
            **more,
        )


def stirred(model: nn.Module, own: Callable[[str], bool], seed: int = 0) -> None:
    """Move what OpenDelta trains away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if own(name):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def save(model: nn.Module, own: Callable[[str], bool], folder: Path, kind: str, **options: Any) -> Path:
    """Write what OpenDelta writes: the trained tensors under their first names, and a config with what it adds."""
    folder.mkdir(parents=True)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters() if own(name)}
    assert tensors
    torch.save(tensors, folder / "pytorch_model.bin")
    config = {
        "delta_type": kind,
        "opendelta_version": "0.3.0",
        "transformers_version": "4.24.0",
        "backbone_class": type(model).__name__,
        "backbone_checkpoint_name": "their-backbone",
        "backbone_hash": "d41d8cd98f00b204e9800998ecf8427e",
        "exclude_modules": ["lm_head"],
        **options,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder

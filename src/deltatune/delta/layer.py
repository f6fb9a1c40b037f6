"""Layers: what a delta computes at a site.

A layer is a pure function of its parameters and its inputs. The engine passes the parameters in, so that the same
formula runs for one delta or for many: every tensor has a leading axis `deltas`, matrices are [deltas, a, b] and
vectors [deltas, 1, a].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

Port = Literal["output", "input", "kv", "tokens", "weight"]
Needs = Literal["output", "weight-read", "weight-write"]


class Params:
    """The parameters of one layer, or of several of one kind, by name."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.__dict__.update(tensors)

    def __getattr__(self, name: str) -> Tensor:
        raise AttributeError(f"this layer has no parameter {name!r}; it has: {', '.join(self.__dict__)}")


class Layer(nn.Module):
    """Base of all layers; the facts are declared by the class and checked by the laws.

    port              where it acts: on the exit of a span, the entry of a span, keys and values, tokens, the weights
    reads_input       forward wants the tensor at the entry of the span; `x` is None otherwise
    reads_ids         that tensor is token ids [deltas, positions, 1]: the layer stands at a table
    identity_at_init  a fresh layer changes nothing
    needs             what it asks of the backbone's weights: only `output` works on any quantised linear as it is;
                      `weight-read` gets the weight of its linear through `read`
    scalable          a weight other than 0 and 1 has a meaning: h + w * (forward(x, h) - h)
    mergeable         the effect is a change of the weights
    linear            how the effect depends on the parameters: linear, bilinear or neither
    proportional      parameters to which the effect is proportional, counted from `neutral`, where they do nothing
    additive          the effect does not depend on what is at the site: h + f(x)
    positionwise      every position by itself; else forward gets whole rows [rows, positions, width] of one delta
    """

    port: ClassVar[Port] = "output"
    reads_input: ClassVar[bool] = True
    reads_ids: ClassVar[bool] = False
    identity_at_init: ClassVar[bool] = True
    needs: ClassVar[Needs] = "output"
    scalable: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False
    linear: ClassVar[Literal["linear", "bilinear", "no"]] = "no"
    proportional: ClassVar[tuple[str, ...]] = ()
    neutral: ClassVar[float] = 0.0
    additive: ClassVar[bool] = False
    positionwise: ClassVar[bool] = True

    dropout: float = 0.0
    shift: int = 0  # by how many positions it moves the text on
    member: int = 0  # which of its delta's methods it belongs to; set by the delta
    tied: tuple[str, ...] = ()  # names of parameters that other sites of the same delta share; set by the delta

    def static(self) -> tuple[Any, ...]:
        """Constants that forward uses; only layers with equal constants run as one batch."""
        return ()

    def kind(self) -> tuple[Any, ...]:
        """Key of the layers that may run as one batch: class, constants and parameter shapes."""
        shapes = tuple((name, tuple(p.shape)) for name, p in self.named_parameters(recurse=False))
        return (type(self), self.static(), self.dropout, self.tied, shapes)

    def names(self) -> Iterator[str]:
        """Names of the parameters, in a fixed order."""
        return (name for name, _ in self.named_parameters(recurse=False))

    def forward(self, p: Params, x: Tensor | None, h: Tensor) -> Tensor:
        """Return the new tensor at the site.

        x [deltas, positions, d_in] at the entry of the span (None unless `reads_input`), h [deltas, positions, d_out]
        at its exit (for an input port, h is the entry itself). The result has the shape of h.
        """
        raise NotImplementedError

    def read(self, p: Params, weight: Tensor, bias: Tensor | None) -> Params:
        """Return what `forward` and `merged` take, for a layer that reads the weight; p itself for any other.

        weight [d_out, d_in] and bias [d_out] are the backbone's own at this site, whatever else acts there, and p is
        in float32 at least. Called once per call where nothing is trained. Every tensor of the result has the leading
        axis `deltas`, or one that stands for all of them.
        """
        return p

    def merged(self, p: Params, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight and bias that have this layer's effect, for a mergeable layer; p as `read` gives it.

        weight [d_out, d_in] of a linear, [d_out, tokens] of a table or [d_out] of a norm, bias [d_out] or None where
        there is none.
        """
        raise NotImplementedError


def own_params(layer: Layer, dtype: torch.dtype, device: torch.device | str | None = None) -> Params:
    """Return the parameters of a layer in the shape that its formula takes, as for one delta; on their own device."""
    return Params(
        {
            name: (p.detach()[None, None] if p.ndim == 1 else p.detach()[None]).to(device or p.device).to(dtype)
            for name, p in layer.named_parameters(recurse=False)
        }
    )


class SpanningLayer(Layer):
    """A layer that hands values from one site to another: a gate, a ladder, a shared pool.

    It names what it `writes` and `reads`; the engine carries the values, delta by delta, within one call. It gets whole
    rows, since such values are often one per row.
    """

    reads: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[tuple[str, ...]] = ()
    positionwise: ClassVar[bool] = False

    def span(
        self, p: Params, x: Tensor | None, h: Tensor, read: Mapping[str, Tensor]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the new tensor at the site and what is written; x and h are [rows, positions, width] of one delta."""
        raise NotImplementedError


class ExpertLayer(Layer):
    """A layer inside a mixture that has parameters of its own for each expert: matrices are [deltas, experts, a, b]."""

    def pairs(self, p: Params, x: Tensor | None, h: Tensor, expert: Tensor) -> Tensor:
        """Return the new tensor of pairs of a token and one of its experts; a delta's pairs stand in one row.

        x [deltas, pairs, d_in], h [deltas, pairs, d_out], expert [deltas, pairs] the number of each pair's expert.
        """
        raise NotImplementedError

    def of_expert(self, p: Params, expert: int) -> Params:
        """Return the parameters of one expert, for `merged`."""
        return Params({name: tensor[:, expert] for name, tensor in vars(p).items()})


class KeyValueLayer(Layer):
    """A sequence layer inside attention: keys and values that every query may attend to."""

    port: ClassVar[Port] = "kv"
    reads_input: ClassVar[bool] = False
    identity_at_init: ClassVar[bool] = False
    scalable: ClassVar[bool] = False

    def keys_values(self, p: Params) -> tuple[Tensor, Tensor]:
        """Return keys and values, each [deltas, length, heads * width]."""
        raise NotImplementedError


class TokenLayer(Layer):
    """A sequence layer at the input: tokens put before (BERT-like: after the first token of) each row."""

    port: ClassVar[Port] = "tokens"
    reads_input: ClassVar[bool] = False
    identity_at_init: ClassVar[bool] = False
    scalable: ClassVar[bool] = False

    def tokens(self, p: Params) -> Tensor:
        """Return the tokens [deltas, length, width]."""
        raise NotImplementedError


class DeepTokenLayer(TokenLayer):
    """Tokens before a block, in place of what has become of those that the same method put in at the input."""

    port: ClassVar[Port] = "input"
    positionwise: ClassVar[bool] = False


class WeightLayer(Layer):
    """A layer that acts on weights: all rows of a call share it, since each delta needs dense weights of its own."""

    port: ClassVar[Port] = "weight"
    reads_input: ClassVar[bool] = False
    needs: ClassVar[Needs] = "weight-write"
    scalable: ClassVar[bool] = False

    def weight(self, p: Params, name: str, weight: Tensor) -> Tensor:
        """Return the new value of the backbone's parameter `name`."""
        raise NotImplementedError


def normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> nn.Parameter:
    """A parameter drawn from N(0, std²)."""
    return nn.Parameter(torch.empty(shape).normal_(0.0, std, generator=generator))


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> nn.Parameter:
    """A parameter drawn from U(-bound, bound)."""
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))


def constant(shape: tuple[int, ...], value: float) -> nn.Parameter:
    """A parameter filled with one value."""
    return nn.Parameter(torch.full(shape, value))

"""Several deltas blended into one: their changes of the weights, made sparse, brought to a consensus, kept as a LoRA.

For every method whose effect is a change of the weights. A blend is a sparsifier times a consensus; the names that the
literature gives to some pairs are in `BLENDS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Site
from deltatune.delta.assemble import Part, assembled, members_of
from deltatune.delta.delta import Delta, generator
from deltatune.delta.layer import WeightLayer
from deltatune.delta.merge import fold
from deltatune.errors import SiteError, UnknownName, UserError

Sparsifier = Callable[[Tensor, float, torch.Generator], Tensor]


def keep(change: Tensor, density: float, draw: torch.Generator) -> Tensor:
    """Keep everything."""
    return change


def magnitude(change: Tensor, density: float, draw: torch.Generator) -> Tensor:
    """Keep the largest share of the entries by magnitude (TIES' trim)."""
    return change * _largest(change, density)


def random(change: Tensor, density: float, draw: torch.Generator) -> Tensor:
    """Keep each entry with the probability `density`, and divide by it (DARE)."""
    kept = torch.rand(change.shape, generator=draw, dtype=torch.float64) < density
    return change * kept.to(change) / density


def breadcrumbs(change: Tensor, density: float, draw: torch.Generator) -> Tensor:
    """Drop the largest hundredth of the entries as outliers and, below, all but `density` of them."""
    outliers = 0.01 if density < 0.99 else 1 - density
    return change * (_largest(change, min(1.0, density + outliers)) & ~_largest(change, outliers))


def ranked(change: Tensor, density: float, draw: torch.Generator) -> Tensor:
    """Keep entries with a probability that rises with their rank in their row, and divide by it (DELLA's MagPrune)."""
    rows = change if change.ndim == 2 else change[None]
    rank = rows.abs().argsort(dim=1).argsort(dim=1).to(torch.float64)  # 0: the smallest
    width = max(1, rows.shape[1] - 1)
    spread = min(0.1, density / 2, (1 - density) / 2)
    chance = (density - spread + 2 * spread * rank / width).reshape(change.shape).clamp(min=1e-6, max=1.0)
    kept = torch.rand(change.shape, generator=draw, dtype=torch.float64) < chance
    return change * (kept / chance).to(change)


def mean(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum."""
    return torch.stack([w * change for w, change in zip(weights, changes, strict=True)]).sum(dim=0)


def sign(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean of those entries that have the sign of the weighted sum, times the weights' sum (TIES)."""
    weighted = torch.stack([w * change for w, change in zip(weights, changes, strict=True)])
    agreeing = weighted * (weighted.sign() == weighted.sum(dim=0).sign())
    shares = weighted.new_tensor([abs(w) for w in weights]).reshape(-1, *[1] * (weighted.ndim - 1))
    counted = (shares * (agreeing != 0)).sum(dim=0)
    return agreeing.sum(dim=0) / counted.clamp(min=1e-12) * shares.sum()


SPARSIFIERS: dict[str, Sparsifier] = {
    "keep": keep, "magnitude": magnitude, "random": random, "breadcrumbs": breadcrumbs, "ranked": ranked
}  # fmt: skip
CONSENSUS = {"mean": mean, "sign": sign}


@dataclass(frozen=True)
class Blend:
    """A sparsifier, a consensus, the usual density, the source."""

    sparsifier: str
    consensus: str
    density: float
    paper: str


BLENDS: dict[str, Blend] = {
    "linear": Blend("keep", "mean", 1.0, "Ilharco et al. 2022, arXiv:2212.04089"),
    "magnitude": Blend("magnitude", "mean", 0.5, "Yadav et al. 2023, arXiv:2306.01708: its first step alone"),
    "ties": Blend("magnitude", "sign", 0.2, "Yadav et al. 2023, arXiv:2306.01708"),
    "dare": Blend("random", "mean", 0.5, "Yu et al. 2023, arXiv:2311.03099"),
    "dare_ties": Blend("random", "sign", 0.5, "Yu et al. 2023, arXiv:2311.03099"),
    "breadcrumbs": Blend("breadcrumbs", "mean", 0.9, "Davari and Belilovsky 2023, arXiv:2312.06795"),
    "breadcrumbs_ties": Blend("breadcrumbs", "sign", 0.9, "Davari and Belilovsky 2023, arXiv:2312.06795"),
    "della": Blend("ranked", "sign", 0.5, "Deep et al. 2024, arXiv:2406.11617"),
    "della_linear": Blend("ranked", "mean", 0.5, "Deep et al. 2024, arXiv:2406.11617"),
}


def blend(
    deltas: Sequence[Delta],
    backbone: Backbone,
    how: str = "ties",
    *,
    weights: Sequence[float] | None = None,
    density: float | None = None,
    rank: int | None = None,
    energy: float | None = None,
    seed: int = 0,
) -> Delta:
    """Blend deltas by one of `BLENDS` and return a LoRA (with BitFit for changed biases) that comes closest to it.

    `weights` default to equal ones that sum to 1; `density` is the share of entries that a sparsifier keeps. The rank
    is given, or the least that keeps a share `energy` of the squared norm at each site; without either it is exact.
    UnknownName for another blend, UserError for values out of range, SiteError for a delta that is no change of
    weights at linears and biases.
    """
    if how not in BLENDS:
        raise UnknownName("blend", how, BLENDS, "'linear' concatenates, and takes the SVD where a rank is given")
    if not deltas:
        raise UserError("no delta to blend; give one at least")
    shares = [1 / len(deltas)] * len(deltas) if weights is None else list(weights)
    if len(shares) != len(deltas) or not all(map(math.isfinite, shares)):
        raise UserError(f"weights {shares}: expected {len(deltas)} finite numbers, one for each delta")
    row = BLENDS[how]
    kept = row.density if density is None else density
    if not 0 < kept <= 1:
        raise UserError(f"density={kept:g}: expected a share of the entries, above 0 and at most 1")
    effects = [effect(delta, backbone) for delta in deltas]
    sites = {key: site for one in effects for key, (site, _, _) in one.items()}
    blended: Effect = {}
    for key, site in sites.items():
        parts: list[Tensor | None] = []
        for place, of in enumerate(("weight", "bias")):
            changes: list[Tensor | None] = [one[key][1:][place] if key in one else None for one in effects]
            like = next((change for change in changes if change is not None), None)
            if like is None:
                parts.append(None)
                continue
            sparse = [
                SPARSIFIERS[row.sparsifier](
                    torch.zeros_like(like) if change is None else change, kept, generator(seed, how, key, of, number)
                )
                for number, change in enumerate(changes)
            ]
            parts.append(CONSENSUS[row.consensus](sparse, shares))
        blended[key] = (site, parts[0], parts[1])
    made = lora_of(blended, backbone, rank=rank, energy=energy)
    made.name = f"{how} of " + ", ".join(delta.name for delta in deltas)
    made.record = {
        "made": {
            "blend": how,
            "density": kept,
            "seed": seed,
            "of": [[w, d.name] for w, d in zip(shares, deltas, strict=True)],
        }
    }
    return made


def to_lora(delta: Delta, backbone: Backbone, *, rank: int | None = None, energy: float | None = None) -> Delta:
    """Return the LoRA that comes closest to a delta's change of the weights, at a rank or a share of its energy.

    The head stays. UserError for values out of range, SiteError for a delta that is no change of linears and biases.
    """
    made = lora_of(effect(delta, backbone), backbone, rank=rank, energy=energy)
    made.name, made.head = f"{delta.name} as LoRA", delta.head
    made.record = {**delta.record, "made": {"from": str(delta.spec), "rank": rank, "energy": energy}}
    return made


Effect = dict[str, tuple[Site, Tensor | None, Tensor | None]]  # site key -> change of weight [d_out, d_in], of bias


def effect(delta: Delta, backbone: Backbone) -> Effect:
    """Return what a delta changes at each linear. SiteError if it is anything else."""
    if any(isinstance(layer, WeightLayer) for layer in delta.layers.values()):
        raise SiteError(f"{delta.name!r} changes all weights, norms and embeddings too; a LoRA stands at linears alone")
    found: Effect = {}
    for one in fold(backbone, delta):
        if one.weight.ndim != 2:
            raise SiteError(f"{delta.name!r} changes a norm at {one.sites[0].key}; a LoRA stands at linears alone")
        for site in one.sites:
            rows = torch.arange(len(one.weight), device=one.weight.device)
            rows = rows if site.view is None else site.view.take(rows)
            change = one.weight_after[rows] - one.weight[rows]
            bias = None
            if one.bias_after is not None:
                before = torch.zeros_like(one.bias_after) if one.bias is None else one.bias
                bias = (one.bias_after - before)[rows]
            found[site.key] = (
                site,
                change if change.any() else None,
                bias if bias is not None and bias.any() else None,
            )
    return found


def lora_of(effects: Effect, backbone: Backbone, *, rank: int | None, energy: float | None) -> Delta:
    """Return a LoRA of one rank (alpha = rank) with these changes by truncated SVD, and BitFit for those of biases."""
    if rank is not None and (rank < 1 or energy is not None):
        raise UserError(f"rank={rank}, energy={energy}: expected a rank from 1 on, or a share of the energy, not both")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"energy={energy:g}: expected a share, above 0 and at most 1")
    thin: dict[str, tuple[Site, Tensor, Tensor]] = {}
    for key, (site, change, _) in effects.items():
        if change is not None:
            thin[key] = (site, *_thin(change, rank, energy))
    biases = {key: (site, bias) for key, (site, _, bias) in effects.items() if bias is not None}
    dtype = torch.promote_types(backbone.dtype, torch.float32)
    parts: list[Part] = []
    r = max((len(A) for _, A, _ in thin.values()), default=0)
    for site, A, B in thin.values():
        lacking = r - len(A)
        tensors = {"A": pad(A, (0, 0, 0, lacking)), "B": pad(B, (0, lacking))}
        parts.append(Part(site, {name: tensor.to(dtype) for name, tensor in tensors.items()}))
    shifted = [Part(site, {"bias": bias.to(dtype)}) for site, bias in biases.values()]
    members = members_of("lora", {"r": r, "alpha": float(r)}, parts, backbone) if parts else []
    members += members_of("bitfit", {}, shifted, backbone) if shifted else []
    if not members:
        raise UserError("these deltas change nothing; there is nothing to make a LoRA of")
    return assembled(members, backbone, "")


def _thin(change: Tensor, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor]:
    """A [r, d_in] and B [d_out, r] with B A the best approximation of a change of that rank."""
    U, S, V = torch.linalg.svd(change.double(), full_matrices=False)
    if rank is not None:
        r = min(rank, len(S))
    else:
        share = S.square().cumsum(0) / S.square().sum()
        # Without either: the rank that it has, up to what rounding of the weights adds.
        r = int((1e-10 * S[0] < S).sum()) if energy is None else min(len(S), int((share < energy).sum()) + 1)
    root = S[:r].sqrt()
    return (root[:, None] * V[:r]).contiguous(), (U[:, :r] * root).contiguous()


def _largest(change: Tensor, share: float) -> Tensor:
    """Where the largest share of the entries by magnitude stands."""
    number = min(change.numel(), round(share * change.numel()))
    kept = torch.zeros(change.numel(), dtype=torch.bool, device=change.device)
    if number:
        kept[change.reshape(-1).abs().topk(number).indices] = True
    return kept.reshape(change.shape)

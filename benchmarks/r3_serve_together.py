"""Time one token for a batch of 64 rows under up to 64 different LoRAs, beside PEFT's `adapter_names`.

Run as: .venv/bin/python benchmarks/r3_serve_together.py [--rounds 15] [--models toy smollm2]

LoRAs of rank 8 on all seven linears of every block, the same weights on both sides; row i takes LoRA i mod k. The toy is
a Llama of 8 blocks, width 128. PEFT at its defaults holds all 64, in float32; its best is the fastest cell of a scripted
search: dtype × attention × threads × only the k in use loaded × mixed batch or one `set_adapter` after the other. Ours
holds all 64 always. The limit is the bare model on the same batch.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from common import Rows, interleave, milliseconds, parser, plain, publish, ratio, table, timed
from torch import Tensor, nn

from deltatune.backbone.load import Backbone, load
from deltatune.delta.adapted import Adapted
from deltatune.delta.delta import Delta, generator
from deltatune.methods.reparameterization.lora import LoRA

NAME = "r3_serve_together"
SITES = "attn.{q,k,v,o} ffn.{up,gate,down}"
ROWS = 64


@dataclass(frozen=True)
class Cell:
    """One cell of the search over PEFT's settings; the first values are its defaults."""

    dtype: str = "float32"
    attention: str = "sdpa"
    threads: int = 0
    loaded: int = ROWS
    mixed: bool = True

    def __str__(self) -> str:
        route = "adapter_names" if self.mixed else "set_adapter in turn"
        threads = f"{self.threads} threads" if self.threads != 1 else "1 thread"
        return f"{self.dtype}, {self.attention} attention, {threads}, {self.loaded} loaded, {route}"


def toy() -> Backbone:
    """A Llama of 8 blocks, width 128, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return Backbone(LlamaForCausalLM(config).eval(), name="toy")


def made_deltas(backbone: Backbone) -> list[Delta]:
    """Make 64 LoRAs that differ, none of them zero."""
    deltas = [Delta.build(LoRA(r=8, alpha=16, at=SITES), backbone, seed=n, name=f"d{n}") for n in range(ROWS)]
    for number, delta in enumerate(deltas):
        for name, parameter in delta.named_parameters():
            if name.endswith(".B"):
                nn.init.normal_(parameter, std=0.02, generator=generator(number, name))
    return deltas


class Peft:
    """PEFT models with the first k LoRAs loaded, by k and dtype."""

    def __init__(self, backbone: Backbone, deltas: Sequence[Delta]) -> None:
        self.backbone, self.deltas = backbone, deltas
        self.models: dict[tuple[int, str], Any] = {}

    def model(self, k: int, dtype: str) -> Any:
        if (k, dtype) not in self.models:
            if dtype == "float32":
                self.models[k, dtype] = self._loaded(k)
            else:
                self.models[k, dtype] = copy.deepcopy(self.model(k, "float32")).to(getattr(torch, dtype))
        return self.models[k, dtype]

    def forget(self, k: int) -> None:
        for key in [key for key in self.models if key[0] == k]:
            del self.models[key]

    def _loaded(self, k: int) -> Any:
        from peft import LoraConfig, get_peft_model

        targets = sorted({site.exit.rpartition(".")[2] for site in self.deltas[0].sites.values()})
        config = LoraConfig(r=8, lora_alpha=16, target_modules=targets)
        model = get_peft_model(copy.deepcopy(self.backbone.module), config, adapter_name="d0")
        for delta in self.deltas[1:k]:
            model.add_adapter(delta.name, config)
        for delta in self.deltas[:k]:
            for site, layer in delta.at_sites():
                module = model.get_submodule(f"base_model.model.{site.exit}")
                module.lora_A[delta.name].weight.data.copy_(layer.get_parameter("A").data)
                module.lora_B[delta.name].weight.data.copy_(layer.get_parameter("B").data)
        return model.eval()

    def run(self, cell: Cell, names: Sequence[str], ids: Tensor) -> Callable[[int], Tensor]:
        """Return a forward of the batch; it returns the logits [rows, 1, words]."""
        model = self.model(cell.loaded, cell.dtype)
        places = {name: [i for i, own in enumerate(names) if own == name] for name in dict.fromkeys(names)}

        def mixed(_: int) -> Tensor:
            logits: Tensor = model(input_ids=ids, adapter_names=list(names), use_cache=False).logits
            return logits

        def in_turn(_: int) -> Tensor:
            found: dict[int, Tensor] = {}
            for name, own in places.items():
                model.set_adapter(name)
                found.update(zip(own, model(input_ids=ids[own], use_cache=False).logits, strict=True))
            return torch.stack([found[i] for i in range(len(names))])

        def run(number: int) -> Tensor:
            threads = torch.get_num_threads()
            torch.set_num_threads(cell.threads or threads)
            model.get_base_model().set_attn_implementation(cell.attention)
            try:
                with torch.inference_mode():
                    return (mixed if cell.mixed else in_turn)(number)
            finally:
                torch.set_num_threads(threads)

        return run


class Ours:
    """Our side in one dtype: all 64 attached."""

    def __init__(self, backbone: Backbone, deltas: Sequence[Delta], dtype: torch.dtype) -> None:
        self.bare = copy.deepcopy(backbone.module).to(dtype)
        # The same weights in a module of its own, which takes the hooks.
        twin = copy.deepcopy(self.bare, {id(p): p for p in self.bare.parameters()})
        self.adapted = Adapted(Backbone(twin, name=backbone.name), deltas, verify=False)
        self.adapted.bank.to(dtype)
        self.adapted.bank.eval()

    def run(self, names: Sequence[str], ids: Tensor, *, batched: bool = True) -> Callable[[int], Tensor]:
        """Return a forward of the batch, by batched products or by a loop over deltas."""

        def run(_: int) -> Tensor:
            self.adapted.batched = batched
            with torch.inference_mode():
                logits: Tensor = self.adapted(input_ids=ids, deltas=list(names), use_cache=False).logits
                return logits

        return run

    def forward(self, ids: Tensor) -> Callable[[int], Tensor]:
        """Return a forward of the bare model."""

        def run(_: int) -> Tensor:
            with torch.inference_mode():
                logits: Tensor = self.bare(input_ids=ids, use_cache=False).logits
                return logits

        return run


def gate(ours: Ours, peft: Peft, names: Sequence[str], ids: Tensor) -> dict[str, Any]:
    """Compare the logits of the mixed batch with each row alone and with PEFT's, in float32.

    A matrix product rounds otherwise in a batch than for one row, in the bare model too, so differences are shares of
    the largest logit.
    """
    together = ours.run(names, ids)(0)
    alone = torch.cat([ours.run([name], ids[i : i + 1])(0) for i, name in enumerate(names)])
    bare = torch.cat([ours.forward(ids[i : i + 1])(0) for i in range(len(ids))])
    theirs = peft.run(Cell(), names, ids)(0)
    with_first = ours.run([names[0]] * len(names), ids)(0)
    size = float(together.abs().max())
    apart, from_peft, of_bare = (
        float((a - b).abs().max()) / size
        for a, b in ((together, alone), (together, theirs), (ours.forward(ids)(0), bare))
    )
    effect = float((together - with_first)[1:].abs().amax(dim=(1, 2)).min()) / size
    return {
        "passed": apart <= 1e-4 and from_peft <= 1e-4 and effect > 1e-3,
        "mixed and alone": apart,
        "the same of the bare model": of_bare,
        "ours and PEFT": from_peft,
        "least change by another LoRA": effect,
    }


def search(peft: Peft, k: int, names: Sequence[str], ids: Tensor, rows: Rows, model: str) -> Cell:
    """Return PEFT's fastest cell for k LoRAs: each runs five times after a warm-up, the median counts.

    A route whose first cell takes over four times the best so far in its warm-up is given up.
    """
    threads = sorted({1, torch.get_num_threads()})
    found: dict[Cell, float] = {}
    for mixed, loaded in itertools.product((True, False), sorted({k, ROWS}, reverse=True)):
        for values in itertools.product(("float32", "bfloat16"), ("sdpa", "eager"), threads):
            cell = Cell(*values, loaded, mixed)
            key = {"search": asdict(cell), "model": model, "k": k}
            if not rows.matching(**key):
                run = peft.run(cell, names, ids)
                times = [timed(run, 0)]
                if not _hopeless(times, found):
                    times = [timed(run, n) for n in range(5)]
                rows.add({**key, "times": times})
            times = rows.matching(**key)[0]["times"]
            if _hopeless(times, found):
                break
            found[cell] = statistics.median(times)
    return min(found, key=found.__getitem__)


def _hopeless(times: Sequence[float], found: dict[Cell, float]) -> bool:
    return bool(found) and len(times) == 1 and times[0] > 4 * min(found.values())


def measure(backbone: Backbone, rows: Rows, options: Any) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Measure one model; return the gate and, by k, the seconds of each variant and PEFT's best cell."""
    deltas = made_deltas(backbone)
    ours = {
        "float32": Ours(backbone, deltas, torch.float32),
        "bfloat16": Ours(backbone, made_deltas(backbone), torch.bfloat16),
    }
    peft = Peft(backbone, deltas)
    words = backbone.module.config.vocab_size  # type: ignore[union-attr]
    ids = torch.randint(words, (ROWS, 1), generator=torch.Generator().manual_seed(0))
    checked = gate(ours["float32"], peft, [f"d{i}" for i in range(ROWS)], ids)
    found = {}
    for k in options.k:
        names = [f"d{i % k}" for i in range(ROWS)]
        best = search(peft, k, names, ids, rows, backbone.name)
        variants: dict[str, Callable[[int], object]] = {
            "PEFT, defaults": peft.run(Cell(), names, ids),
            "PEFT, best": peft.run(best, names, ids),
        }
        for name, side in ours.items():
            variants[f"ours, {name}"] = side.run(names, ids)
            variants[f"bare, {name}"] = side.forward(ids)
        variants["ours, float32, loop over deltas"] = ours["float32"].run(names, ids, batched=False)
        seconds = interleave(variants, options.rounds, rows, {"model": backbone.name, "k": k, "best": asdict(best)})
        found[k] = {"seconds": seconds, "best": best}
        print(
            f"{backbone.name}, k={k}: {', '.join(f'{n} {milliseconds(s)} ms' for n, s in seconds.items())}", flush=True
        )
        if k != ROWS:
            peft.forget(k)
    return checked, found


def ratios(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return the ratios for one k; PEFT's best is compared with the faster dtype of ours, its defaults with float32."""
    wide, narrow = seconds["ours, float32"], seconds["ours, bfloat16"]
    mine, bare = min(
        (wide, seconds["bare, float32"]),
        (narrow, seconds["bare, bfloat16"]),
        key=lambda p: sorted(p[0])[len(wide) // 2],
    )
    return {
        "over_default": ratio(seconds["PEFT, defaults"], wide),
        "over_tuned": ratio(seconds["PEFT, best"], mine),
        "over_limit": ratio(wide, seconds["bare, float32"]),
        "over_limit_of_best": ratio(mine, bare),
        "factors": {"batching": ratio(seconds["ours, float32, loop over deltas"], wide), "dtype": ratio(wide, narrow)},
    }


def told(model: str, checked: dict[str, Any], found: dict[int, dict[str, Any]]) -> str:
    """Say one model as a table."""
    lines = []
    for k, one in found.items():
        seconds, r = one["seconds"], ratios(one["seconds"])
        lines.append(
            (
                k,
                *(
                    milliseconds(seconds[f"{who}, {dtype}"])
                    for dtype in ("float32", "bfloat16")
                    for who in ("bare", "ours")
                ),
                milliseconds(seconds["PEFT, defaults"]),
                r["over_default"],
                milliseconds(seconds["PEFT, best"]),
                r["over_tuned"],
                r["over_limit"],
                r["factors"]["batching"],
            )
        )
    header = (
        "LoRAs in the batch", "bare, ms", "ours", "bare, bf16", "ours, bf16", "PEFT, defaults", "times ours", "PEFT, best",
        "times our best", "ours over bare", "loop over deltas, times ours",
    )  # fmt: skip
    figures = "; ".join(f"{name} {value:.1e}" for name, value in checked.items() if name != "passed")
    cells = "; ".join(f"{k}: {one['best']}" for k, one in found.items())
    return (
        f"### {model}: {ROWS} rows, one token\n\nGate {'passed' if checked['passed'] else 'FAILED'}: largest difference "
        f"of a logit, as a share of the largest logit: {figures}.\n\n{table(header, lines)}\n\nPEFT's best cells: {cells}."
    )


def main() -> None:
    """Measure what is lacking and publish the tables."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--models", nargs="*", default=["toy", "smollm2"])
    options.add_argument("--k", nargs="*", type=int, default=[1, 2, 8, 32, ROWS])
    chosen = options.parse_args()
    rows = Rows(NAME, chosen)
    texts, gates, made = [], {}, {}
    for model in chosen.models:
        checked, found = measure(toy() if model == "toy" else load(model), rows, chosen)
        gates[model] = checked
        made |= {f"{model}, {k}": {**ratios(one["seconds"]), "best": str(one["best"])} for k, one in found.items()}
        texts.append(told(model, checked, found))
    head = made[f"{chosen.models[0]}, {chosen.k[-1]}"]
    passed = all(one["passed"] for one in gates.values())
    publish(
        NAME, "\n\n".join(texts), {"gate": {"passed": passed, **gates}, **plain(head), "settings": plain(made)}, chosen
    )


if __name__ == "__main__":
    main()

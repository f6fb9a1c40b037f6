"""Delta tuning: adapt frozen pre-trained models by training a small delta instead of the model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public name -> the module that defines it. Modules load on first use, so that `import deltatune` never loads torch.
_LAZY: dict[str, str] = {
    "Adapted": "deltatune.delta.adapted",
    "Adapter": "deltatune.methods.addition.adapter",
    "Backbone": "deltatune.backbone.load",
    "BitFit": "deltatune.methods.specification.bitfit",
    "Delta": "deltatune.delta.delta",
    "DeltatuneError": "deltatune.errors",
    "DoRA": "deltatune.methods.reparameterization.dora",
    "Full": "deltatune.methods.baseline.full",
    "Head": "deltatune.methods.baseline.head",
    "IA3": "deltatune.methods.addition.ia3",
    "LNTuning": "deltatune.methods.specification.lntuning",
    "LoRA": "deltatune.methods.reparameterization.lora",
    "OFT": "deltatune.methods.reparameterization.oft",
    "PTuning": "deltatune.methods.addition.ptuning",
    "ParallelAdapter": "deltatune.methods.addition.parallel_adapter",
    "Prefix": "deltatune.methods.addition.prefix",
    "Prompt": "deltatune.methods.addition.prompt",
    "Task": "deltatune.data.task",
    "TrainableTokens": "deltatune.methods.specification.trainabletokens",
    "UserError": "deltatune.errors",
    "VeRA": "deltatune.methods.reparameterization.vera",
    "adapt": "deltatune.delta.adapted",
    "blend": "deltatune.delta.blend",
    "fit": "deltatune.studies.verbs",
    "fit_many": "deltatune.studies.verbs",
    "lerp": "deltatune.delta.algebra",
    "load": "deltatune.backbone.load",
    "merge": "deltatune.delta.merge",
    "optimizer_groups": "deltatune.training.groups",
    "parse": "deltatune.compose.expression",
    "soup": "deltatune.delta.algebra",
    "task": "deltatune.data.load",
    "to_lora": "deltatune.delta.blend",
    "tune": "deltatune.studies.verbs",
}

if TYPE_CHECKING:
    from deltatune.backbone.load import Backbone as Backbone
    from deltatune.backbone.load import load as load
    from deltatune.compose.expression import parse as parse
    from deltatune.data.load import task as task
    from deltatune.data.task import Task as Task
    from deltatune.delta.adapted import Adapted as Adapted
    from deltatune.delta.adapted import adapt as adapt
    from deltatune.delta.algebra import lerp as lerp
    from deltatune.delta.algebra import soup as soup
    from deltatune.delta.blend import blend as blend
    from deltatune.delta.blend import to_lora as to_lora
    from deltatune.delta.delta import Delta as Delta
    from deltatune.delta.merge import merge as merge
    from deltatune.errors import DeltatuneError as DeltatuneError
    from deltatune.errors import UserError as UserError
    from deltatune.methods.addition.adapter import Adapter as Adapter
    from deltatune.methods.addition.ia3 import IA3 as IA3
    from deltatune.methods.addition.parallel_adapter import ParallelAdapter as ParallelAdapter
    from deltatune.methods.addition.prefix import Prefix as Prefix
    from deltatune.methods.addition.prompt import Prompt as Prompt
    from deltatune.methods.addition.ptuning import PTuning as PTuning
    from deltatune.methods.baseline.full import Full as Full
    from deltatune.methods.baseline.head import Head as Head
    from deltatune.methods.reparameterization.dora import DoRA as DoRA
    from deltatune.methods.reparameterization.lora import LoRA as LoRA
    from deltatune.methods.reparameterization.oft import OFT as OFT
    from deltatune.methods.reparameterization.vera import VeRA as VeRA
    from deltatune.methods.specification.bitfit import BitFit as BitFit
    from deltatune.methods.specification.lntuning import LNTuning as LNTuning
    from deltatune.methods.specification.trainabletokens import TrainableTokens as TrainableTokens
    from deltatune.studies.verbs import fit as fit
    from deltatune.studies.verbs import fit_many as fit_many
    from deltatune.studies.verbs import tune as tune
    from deltatune.training.groups import optimizer_groups as optimizer_groups

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

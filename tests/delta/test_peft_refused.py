"""What of PEFT's folders has no counterpart here, and what of ours has none there, is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from tests.backbone.families import GROUPED
from tests.delta.test_peft_files import theirs_in
from torch import nn

from deltatune.backbone.load import Backbone
from deltatune.compose.expression import parse
from deltatune.delta.delta import Delta
from deltatune.delta.exchange.peft import export
from deltatune.delta.merge import merge
from deltatune.errors import DeltaFileError, SiteError, UserError
from deltatune.laws.families import tiny
from deltatune.laws.subject import moved

pytestmark = pytest.mark.filterwarnings("ignore")


def saved(model: nn.Module, config: Any, folder: Path) -> str:
    peft.get_peft_model(model, config).save_pretrained(str(folder))
    return str(folder)


def test_a_gain_of_zero_is_not_moved_by_a_factor(tmp_path: Path) -> None:
    theirs_in(tmp_path / "theirs", "llama", peft.LNTuningConfig(task_type="CAUSAL_LM"))
    backbone = Backbone(tiny("llama"))
    with torch.no_grad():
        backbone.module.model.norm.weight[3] = 0.0
    with pytest.raises(DeltaFileError, match=r"'model.norm' moves a gain that is zero in this backbone"):
        Delta.load(str(tmp_path / "theirs"), backbone)


def test_a_norm_that_is_at_no_site_is_refused(tmp_path: Path) -> None:
    model = hf.AutoModelForCausalLM.from_config(hf.Qwen3Config(**GROUPED))
    folder = saved(model, peft.LNTuningConfig(target_modules=["q_norm"]), tmp_path / "theirs")
    with pytest.raises(DeltaFileError, match=r"q_norm', which is no norm at a site of"):
        Delta.load(folder, Backbone(model))


def test_a_norm_has_one_copy_there() -> None:
    backbone = Backbone(tiny("bert"))
    delta = moved(Delta.build(parse("lntuning | lntuning(at='norm.attn')"), backbone))
    with pytest.raises(UserError, match="twice; PEFT has one copy of a norm"):
        export(delta, backbone)


def test_a_bias_is_not_merged_into_a_norm_that_would_pass_over_it() -> None:
    backbone = Backbone(tiny("llama"))
    delta = moved(Delta.build(parse("bitfit(at='norm.attn')"), backbone))
    with pytest.raises(SiteError, match="LlamaRMSNorm has none and would pass over it"):
        merge(backbone, delta)

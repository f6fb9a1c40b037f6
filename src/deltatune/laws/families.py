"""Tiny random models, one for each architecture family under the laws."""

from __future__ import annotations

from functools import cache

import torch
import transformers as hf
from torch import nn

SMALL = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
PLAIN = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=64)
IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)

CONFIGS = {
    "bert": lambda: hf.BertConfig(**SMALL, **PLAIN),
    "roberta": lambda: hf.RobertaConfig(**SMALL, **PLAIN),
    "distilbert": lambda: hf.DistilBertConfig(
        vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=48, dropout=0.0, attention_dropout=0.0,
        max_position_embeddings=64,
    ),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, **IDS,
    ),
    "llama": lambda: hf.LlamaConfig(**SMALL, num_key_value_heads=2, max_position_embeddings=64, **IDS),
    "t5": lambda: hf.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, eos_token_id=2, pad_token_id=0,
    ),
}  # fmt: skip
AUTO = {
    "gpt2": hf.AutoModelForCausalLM,
    "llama": hf.AutoModelForCausalLM,
    "t5": hf.AutoModelForSeq2SeqLM,
}
FAMILIES = tuple(CONFIGS)


@cache
def _state(family: str) -> dict[str, torch.Tensor]:
    model = build(family)
    return model.state_dict()


def build(family: str, seed: int = 0) -> nn.Module:
    """A fresh random model; biases and norms are perturbed, so that nothing is hidden by zeros and ones."""
    torch.manual_seed(seed)
    model = AUTO.get(family, hf.AutoModel).from_config(CONFIGS[family]())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                # At the default 0.02 the blocks do next to nothing; T5 starts wide by itself.
                parameter.mul_(1.0 if family == "t5" else 3.0)
    return model.eval()


def tiny(family: str) -> nn.Module:
    """The family's model with the same weights each time, an object of its own."""
    model = AUTO.get(family, hf.AutoModel).from_config(CONFIGS[family]())
    model.load_state_dict(_state(family))
    return model.eval()


def inputs(family: str, rows: int = 4, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Token ids [rows, length] with padding on the right in the later rows, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 99, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, length - (row % 3) :] = 0
    ids = ids * mask + (0 if family != "roberta" else 1) * (1 - mask)
    batch = {"input_ids": ids, "attention_mask": mask}
    if family == "t5":
        batch["decoder_input_ids"] = torch.randint(3, 99, (rows, 5), generator=generator)
    return batch

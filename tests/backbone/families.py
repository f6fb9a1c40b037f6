"""Tiny random models of many architecture families, and their inputs: what the proofs of sites run on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

SMALL: dict[str, Any] = dict(
    vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
# Whatever is random in training mode, by any of its names.
STILL: dict[str, Any] = dict.fromkeys((
    "hidden_dropout_prob", "attention_probs_dropout_prob", "hidden_dropout", "attention_dropout", "activation_dropout",
    "dropout", "dropout_rate", "attn_pdrop", "embd_pdrop", "emb_pdrop", "resid_pdrop", "embed_dropout",
    "embedding_dropout", "resid_dropout", "residual_dropout", "mlp_dropout", "final_dropout", "feat_proj_dropout",
    "drop_path_rate", "layerdrop", "encoder_layerdrop", "decoder_layerdrop", "router_jitter_noise",
    "input_jitter_noise",
), 0.0)  # fmt: skip
GROUPED = SMALL | dict(num_key_value_heads=2, head_dim=8)
SLIDING = GROUPED | dict(sliding_window=16)
EXPERTS = GROUPED | dict(moe_intermediate_size=24, num_experts=4, num_local_experts=4, num_experts_per_tok=2)
TWO: dict[str, Any] = dict(
    vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
    decoder_start_token_id=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, forced_eos_token_id=None,
)  # fmt: skip
T5: dict[str, Any] = dict(
    vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
    decoder_start_token_id=0, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
IMAGE: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
)
TOWERS: dict[str, Any] = dict(text_config=SMALL | dict(projection_dim=16), vision_config=dict(IMAGE), projection_dim=16)

# model type -> what its config is made of; the kind of input is in KINDS.
TEXT: dict[str, dict[str, Any]] = {
    "albert": SMALL | dict(embedding_size=16),
    "bert": SMALL,
    "bert-generation": SMALL,
    "big_bird": SMALL | dict(attention_type="original_full"),
    "camembert": SMALL,
    "convbert": SMALL | dict(embedding_size=32),
    "data2vec-text": SMALL,
    "deberta": SMALL | dict(relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta-v2": SMALL | dict(relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=True),
    "distilbert": dict(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64),
    "electra": SMALL | dict(embedding_size=16),
    "ernie": SMALL,
    "esm": SMALL,
    "megatron-bert": SMALL,
    "modernbert": SMALL | dict(cls_token_id=1, sep_token_id=2, local_attention=8),
    "mpnet": SMALL,
    "nystromformer": SMALL | dict(num_landmarks=7, segment_means_seq_len=7),
    "rembert": SMALL | dict(input_embedding_size=16, output_embedding_size=16),
    "roberta": SMALL,
    "roberta-prelayernorm": SMALL,
    "roformer": SMALL | dict(embedding_size=32),
    "splinter": SMALL | dict(question_token_id=4),
    "xlm-roberta": SMALL,
    "xlm-roberta-xl": SMALL,
    "yoso": SMALL,
}
CAUSAL: dict[str, dict[str, Any]] = {
    "biogpt": SMALL,
    "bloom": dict(vocab_size=99, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0),
    "codegen": dict(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, n_ctx=64, rotary_dim=4, n_inner=48),
    "cohere": GROUPED,
    "cohere2": SLIDING,
    "falcon": dict(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_hidden_size=48, alibi=False,
        multi_query=False, parallel_attn=False, new_decoder_architecture=False, num_ln_in_parallel_attn=None,
    ),
    "gemma": GROUPED,
    "gemma2": SLIDING,
    "gemma3_text": SLIDING,
    "glm": GROUPED,
    "glm4": GROUPED,
    "gpt2": dict(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=64),
    "gpt_bigcode": dict(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=64),
    "gpt_neo": dict(
        vocab_size=99, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]],
    ),
    "gpt_neox": SMALL | dict(use_parallel_residual=False),
    "gpt_neox_japanese": SMALL | dict(intermediate_multiple_size=2),
    "gptj": dict(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, n_inner=48),
    "granite": GROUPED,
    "helium": GROUPED,
    "llama": GROUPED,
    "mistral": SLIDING,
    "mixtral": EXPERTS,
    "mpt": dict(vocab_size=99, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, expansion_ratio=2),
    "nemotron": GROUPED,
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "olmoe": EXPERTS | dict(num_key_value_heads=4),
    "opt": SMALL | dict(ffn_dim=48, word_embed_proj_dim=32),
    "persimmon": SMALL,
    "phi": GROUPED,
    "phi3": GROUPED,
    "phimoe": EXPERTS,
    "qwen2": GROUPED,
    "qwen2_moe": EXPERTS | dict(shared_expert_intermediate_size=24),
    "qwen3": GROUPED,
    "qwen3_moe": EXPERTS,
    "smollm3": GROUPED,
    "stablelm": GROUPED,
    "starcoder2": GROUPED,
    "xglm": dict(vocab_size=99, d_model=32, num_layers=2, attention_heads=4, ffn_dim=48, max_position_embeddings=64),
}  # fmt: skip
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "bart": TWO,
    "blenderbot": TWO,
    "blenderbot-small": TWO,
    "longt5": T5 | dict(local_radius=4),
    "m2m_100": TWO,
    "marian": TWO,
    "mbart": TWO,
    "mt5": T5,
    "mvp": TWO,
    "pegasus": TWO,
    "plbart": TWO,
    "t5": T5,
    "umt5": T5,
}  # fmt: skip
PIXELS: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": IMAGE | dict(
        max_length=16, num_mel_bins=16, frequency_stride=8, time_stride=8
    ),
    "beit": IMAGE,
    "clip_vision_model": IMAGE,
    "data2vec-vision": IMAGE,
    "deit": IMAGE,
    "dinov2": IMAGE | dict(mlp_ratio=2),
    "dinov2_with_registers": IMAGE | dict(mlp_ratio=2),
    "ijepa": IMAGE,
    "siglip_vision_model": IMAGE,
    "swin": dict(image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, mlp_ratio=2),
    "vit": IMAGE,
    "vit_mae": IMAGE | dict(mask_ratio=0.0),
    "vit_msn": IMAGE,
    "yolos": IMAGE | dict(image_size=[16, 16], num_detection_tokens=3),
}  # fmt: skip
BOTH: dict[str, dict[str, Any]] = {"clip": TOWERS, "siglip": TOWERS}
SOUND: dict[str, dict[str, Any]] = {
    name: dict(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, apply_spec_augment=False,
    )
    for name in ("hubert", "wav2vec2", "unispeech-sat")
}  # fmt: skip
MEL: dict[str, dict[str, Any]] = {
    "whisper": TWO | dict(num_mel_bins=8, max_source_positions=8, max_target_positions=16),
    "speech_to_text": TWO | dict(
        input_feat_per_channel=8, num_conv_layers=2, conv_kernel_sizes=[3, 3], conv_channels=16,
        max_source_positions=64, max_target_positions=16,
    ),
}  # fmt: skip
KINDS = {"text": TEXT, "causal": CAUSAL, "seq2seq": SEQ2SEQ, "pixels": PIXELS, "both": BOTH, "sound": SOUND, "mel": MEL}
AUTO: dict[str, Any] = {
    "causal": hf.AutoModelForCausalLM, "seq2seq": hf.AutoModelForSeq2SeqLM, "mel": hf.AutoModelForSpeechSeq2Seq
}  # fmt: skip
MIXTURES = ("mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe")
FAMILIES = tuple(name for table in KINDS.values() for name in table)


def kind(family: str) -> str:
    """The kind of input that a family takes."""
    return next(kind for kind, table in KINDS.items() if family in table)


def build(family: str, experts_implementation: str = "eager") -> nn.Module:
    """A random model, the same each time; biases and norms are perturbed, so that nothing is hidden by zeros and ones."""
    known = set(vars(hf.AutoConfig.for_model(family)))
    given = KINDS[kind(family)][family]
    experts = {"experts_implementation": experts_implementation}  # the others multiply no float64
    config = hf.AutoConfig.for_model(family, **given, **experts, **{k: v for k, v in STILL.items() if k in known})
    torch.manual_seed(0)
    model = AUTO.get(kind(family), hf.AutoModel).from_config(config)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
            elif parameter.numel() > 1 and parameter.std() < 0.03:  # at the default 0.02 the blocks do next to nothing
                parameter.mul_(5.0)
    made: nn.Module = model.eval()
    return made


@cache
def _state(family: str) -> dict[str, Tensor]:
    return build(family).state_dict()


def inputs(family: str, rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    """A batch of `rows` rows."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 99, (rows, length), generator=draw)
    what = kind(family)
    batch: dict[str, Tensor] = {}
    if what in ("text", "causal", "seq2seq", "both"):
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if what in ("seq2seq", "mel"):
        batch["decoder_input_ids"] = torch.randint(3, 99, (rows, 5), generator=draw)
    if what == "mel":
        batch["input_features"] = torch.randn(rows, *((8, 16) if family == "whisper" else (16, 8)), generator=draw)
    if what in ("pixels", "both"):
        batch["pixel_values"] = torch.randn(rows, 3, 16, 16, generator=draw)
    if family == "vit_mae":  # by which it orders the patches, at random unless it is given
        batch["noise"] = torch.rand(rows, 4, generator=draw)
    if family == "audio-spectrogram-transformer":
        batch = {"input_values": torch.randn(rows, 16, 16, generator=draw)}
    if what == "sound":
        batch["input_values"] = torch.randn(rows, 300, generator=draw)
    return batch


Family = Callable[[], nn.Module]

"""Synonyms: what the modules of a transformer are called in one architecture or another.

One table for all of them; a data row at the end for those that defy it.
"""

from __future__ import annotations

import re

CROSS = re.compile(r"(^|\.)(EncDecAttention|crossattention|encoder_attn|cross_attn)(\.|$)")
ATTENTION = re.compile(
    r"(^|\.)(attention|self_attn|attn|SelfAttention|LocalSelfAttention|TransientGlobalSelfAttention|self_attention|self)"
    r"(\.|$)"
)
# A linear's last path component (or last two) -> its part. `dense` alone says nothing, so its parent is named too.
PARTS: dict[str, re.Pattern[str]] = {
    "q": re.compile(r"(^|\.)(query|query_proj|q_proj|q_lin|q)$"),
    "k": re.compile(r"(^|\.)(key|key_proj|k_proj|k_lin|k)$"),
    "v": re.compile(r"(^|\.)(value|value_proj|v_proj|v_lin|v)$"),
    "o": re.compile(r"(^|\.)(o_proj|out_proj|out_lin|o|dense|c_proj|Wo)$"),
    "qkv": re.compile(r"(^|\.)(c_attn|qkv_proj|query_key_value|in_proj|Wqkv)$"),
    "up": re.compile(
        r"(^|\.)(intermediate\.dense|intermediate_dense|lin1|c_fc|fc_in|up_proj|wi|wi_1|fc1|dense_h_to_4h|ffn)$"
    ),
    "gate": re.compile(r"(^|\.)(gate_proj|wi_0)$"),
    "gate_up": re.compile(r"(^|\.)(gate_up_proj|Wi)$"),
    "down": re.compile(
        r"(^|\.)(output\.dense|output_dense|lin2|c_proj|fc_out|down_proj|wo|Wo|fc2|dense_4h_to_h|ffn_output)$"
    ),
}  # fmt: skip
ACTIVATION = re.compile(r"(^|\.)(intermediate_act_fn|activation|activation_fn|act|act_fn|gelu_impl)$")
# A mixture of experts: its experts are one parameter for all, or modules that see tokens sorted by expert.
EXPERTS = re.compile(r"(^|\.)(experts|shared_experts?)(\.|$)")
# Norms of queries and keys alone belong to no sub-layer.
HEAD_NORM = re.compile(r"(^|\.)[qk]_(norm|layernorm)$")
# The norm of a sub-layer by its own name; the first of the names that a block has is meant. Where a block has norms
# before and after a sub-layer, the one before it is meant.
NORMS: dict[str, tuple[str, ...]] = {
    "attn": (
        "ln_1", "input_layernorm", "sa_layer_norm", "self_attn_layer_norm", "layernorm_before", "layer_norm1", "norm1",
        "norm_1", "attn_norm", "layer_norm", "post_attention_layernorm",
    ),
    "cross": ("encoder_attn_layer_norm", "ln_cross_attn"),
    "ffn": (
        "ln_2", "pre_feedforward_layernorm", "post_feedforward_layernorm", "post_attention_layernorm",
        "output_layer_norm", "final_layer_norm", "layernorm_after", "layer_norm2", "norm2", "norm_2", "mlp_norm",
        "full_layer_layer_norm", "LayerNorm", "ln",
    ),
}  # fmt: skip
EMBEDDING_NORM = re.compile(r"embed|(^|\.)pre_layr?norm$")
FINAL_NORM = re.compile(
    r"(^|\.)(ln_f|norm|norm_f|final_norm|"
    r"final_layer_norm|final_layernorm|post_layernorm|emb_layer_norm_after)$"
)
# Before the blocks or after them: the order in which the parent holds it and the blocks says which.
PLAIN_NORM = re.compile(r"(^|\.)(layer_norm|layernorm|LayerNorm|ln)$")
# What makes positions of something that is no token.
PATCHES = re.compile(r"(^|\.)(embeddings|feature_projection)$")
TOWERS = {"text_model": "text", "vision_model": "vision"}
# Parameters outside the blocks that do not shape the hidden states.
BESIDE = re.compile(r"(^|\.)(pooler|head|lm_head|classifier|\w+_head)(\.|$)")
# Classes of tables that are computed and never learn, though they are kept as parameters.
COMPUTED = re.compile(r"Sinusoidal")
# What stands in for hidden patches or frames in pre-training; otherwise nothing reads it, so it learns nothing.
STAND_INS = ("mask_token", "masked_spec_embed")

# Data rows, by model type. Decoders that say so on no module:
CAUSAL = ("bloom", "codegen", "gpt_neox_japanese", "mpt", "xglm")
# Fused projections that are cut up per group of heads (others are contiguous): all that are called query_key_value, and
INTERLEAVED = ("deberta", "gpt_bigcode")
# Fused projections in so many chunks, and the order of the parts in a chunk.
CHUNKED = {"codegen": (4, "qvk")}

# Decoders that flatten rows and tokens for the feed-forward and its norm.
FLATTENED = ("opt",)
# Networks whose `inputs_embeds` stand behind the whole embedding layer, positions included.
EMBEDDED = ("esm",)
# Attention that hands its weights to one function of torch, so that its projections never run as modules.
BYPASSED = ("wavlm",)

ABSENT_REASON = {
    "cross": "no attention to an encoder",
    "ffn.gate": "the feed-forward has no gate",
    "norm.cross": "no attention to an encoder",
    "norm.final": "no norm after the last block: where norms stand after each sub-layer, its norm.ffn is the last one",
    "norm.embed": "no norm after the embeddings",
    "lm_head": "loaded without a language-model head",
    "ffn.act": "the activation is a plain function, not a module",
}
ABSENT_WITH_EXPERTS = dict.fromkeys(
    ("ffn.up", "ffn.gate", "ffn.act", "ffn.down"),
    "the experts are one parameter for all, not modules; `ffn` is the whole mixture",
)
ABSENT_BYPASSED = dict.fromkeys(
    ("attn", "attn.q", "attn.k", "attn.v", "attn.o"),
    "the attention hands its weights to one function of torch; its projections never run as modules",
)
ABSENT_WITHOUT_NORM = {
    "norm.attn": "the block has no norm of its own for the attention",
    "norm.ffn": "one norm serves attention and feed-forward alike: it is norm.attn",
}
UNFOUND = "no module found for it"
# Reasons that say nothing of the network, only of how it is written.
OUT_OF_REACH = {UNFOUND, ABSENT_REASON["ffn.act"], *ABSENT_WITH_EXPERTS.values(), *ABSENT_BYPASSED.values()}

"""GGUF files of tiny models, written without the code under test."""

import gguf
import numpy as np

from tests import tiny

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name):
    known = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in known:
        return known[name]
    stem, _, kind = name.rpartition(".")
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"


def permuted(weight, heads):
    """GGUF stores the two halves of each rotary pair side by side."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, architecture="llama", seed=0, plain=None, tokens=None, dtype=np.float32, strings=None, **fields):
    """Write the tiny Llama of this seed, or ``plain``, with its tokens; ``fields`` replace numbers of the metadata."""
    plain = plain or tiny.base(seed=seed)
    config = plain.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_organization("Someone")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10_000.0)
    writer.add_key_length(8)
    writer.add_vocab_size(len(tiny.WORDS))
    writer.add_tokenizer_model("llama")
    # transformers adds these three where they are not there.
    writer.add_token_list(tokens or ["<unk>", "<s>", "</s>", *tiny.WORDS[3:]])
    writer.add_token_scores([0.0] * len(tiny.WORDS))
    writer.add_token_types([2, 3, 3, *[1] * (len(tiny.WORDS) - 3)])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, text in (strings or {}).items():
        writer.add_string(key, text)
    for key, value in fields.items():
        name = f"{architecture}.{key.replace('__', '.')}"
        if name in writer.kv_data[0]:
            writer.kv_data[0][name].value = value
        else:
            writer.add_uint32(name, value)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in plain.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = weight.numpy().astype(np.float32 if weight.dim() == 1 else dtype)
        for part, count in heads.items():
            if part in name and architecture == "llama":
                array = permuted(array, count)
        writer.add_tensor(gguf_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return plain

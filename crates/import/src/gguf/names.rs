//! What GGUF calls a Llama's tensors, and which of them it orders its own way.

use retort_model::Architecture;

/// Divisors of the rotary frequencies, f32 `[head_dim / 2]`, of a model that scales them.
pub const ROPE_FREQS: &str = "rope_freqs.weight";

/// Whether llama.cpp has this tensor's rows (Hugging Face's `name`) with each head's rotary halves interleaved.
pub fn interleaves_rotary(architecture: Architecture, name: &str) -> bool {
    architecture != Architecture::Qwen2 && (name.contains(".q_proj.") || name.contains(".k_proj."))
}

/// What GGUF calls the tensor that Hugging Face calls `name`.
pub fn tensor_name(name: &str) -> Option<String> {
    match name {
        "model.embed_tokens.weight" => return Some("token_embd.weight".to_owned()),
        "model.norm.weight" => return Some("output_norm.weight".to_owned()),
        "lm_head.weight" => return Some("output.weight".to_owned()),
        _ => {}
    }
    let (layer, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (module, kind) = part.rsplit_once('.')?;
    let theirs = match module {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "post_attention_layernorm" => "ffn_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        _ => return None,
    };
    Some(format!("blk.{layer}.{theirs}.{kind}"))
}

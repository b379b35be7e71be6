"""The config.json of models that tests make."""

from lens.models.transformer import TransformerConfig


def llama(c: TransformerConfig) -> dict:
    """Of a plain llama, as transformers 5 writes it, without token ids."""
    return {
        'model_type': 'llama',
        'vocab_size': c.vocab_size,
        'hidden_size': c.d_model,
        'intermediate_size': c.d_ff,
        'num_hidden_layers': c.n_layers,
        'num_attention_heads': c.n_heads,
        'num_key_value_heads': c.n_kv_heads,
        'head_dim': c.head_dim,
        'hidden_act': 'silu',
        'rms_norm_eps': c.norm_eps,
        'tie_word_embeddings': c.tied,
        'max_position_embeddings': c.max_positions,
        'rope_parameters': {'rope_type': 'default', 'rope_theta': c.ropes[0].theta},
    }

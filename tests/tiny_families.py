"""A tiny random model of each family whose head or masks do something of their own: (name, class of configuration, changes)."""

_COMMON = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
}
_OLD = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}

FAMILIES = {
    "llama": ("LlamaConfig", _COMMON),
    "llama tied": ("LlamaConfig", {**_COMMON, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**_COMMON, "sliding_window": 4}),
    "mixtral": ("MixtralConfig", {**_COMMON, "num_local_experts": 4}),
    "qwen2": ("Qwen2Config", _COMMON),
    "qwen3": ("Qwen3Config", {**_COMMON, "head_dim": 8}),
    "gemma": ("GemmaConfig", {**_COMMON, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**_COMMON, "head_dim": 8, "final_logit_softcapping": 30.0, "sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", {**_COMMON, "head_dim": 8, "final_logit_softcapping": 20.0, "sliding_window": 4}),
    "cohere": ("CohereConfig", {**_COMMON, "logit_scale": 0.0625}),
    "cohere2": ("Cohere2Config", {**_COMMON, "logit_scale": 0.25, "sliding_window": 4}),
    "granite": ("GraniteConfig", {**_COMMON, "logits_scaling": 8.0}),
    "granitemoe": ("GraniteMoeConfig", {**_COMMON, "logits_scaling": 8.0, "num_local_experts": 4}),
    "hyperclovax": ("HyperCLOVAXConfig", {**_COMMON, "logits_scaling": 0.25}),
    "minicpm3": ("MiniCPM3Config", {**_COMMON, "num_key_value_heads": 4, "head_dim": 4, "q_lora_rank": 8, "kv_lora_rank": 8,
                                    "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8, "dim_model_base": 16}),
    "phi": ("PhiConfig", _COMMON),
    "phi3": ("Phi3Config", _COMMON),
    "olmo2": ("Olmo2Config", _COMMON),
    "smollm3": ("SmolLM3Config", _COMMON),
    "starcoder2": ("Starcoder2Config", _COMMON),
    "stablelm": ("StableLmConfig", _COMMON),
    "glm4": ("Glm4Config", {**_COMMON, "head_dim": 8}),
    "nanochat": ("NanoChatConfig", _COMMON),
    "gpt2": ("GPT2Config", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_OLD}),
    "gptj": ("GPTJConfig", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4, **_OLD}),
    "gpt_neox": ("GPTNeoXConfig", {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}),
    "opt": ("OPTConfig", {"vocab_size": 96, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                          "max_position_embeddings": 64, "word_embed_proj_dim": 32, **_OLD}),
    "falcon": ("FalconConfig", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **_OLD}),
    "falcon_h1": ("FalconH1Config", {**_COMMON, "lm_head_multiplier": 0.25, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
                                     "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}),
    "bloom": ("BloomConfig", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4, **_OLD}),
    "mamba": ("MambaConfig", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, **_OLD}),
}


def family_model(name: str, seed: int = 0, **changes):
    """The model of `FAMILIES[name]` in float32 and evaluation mode; biases are not zero, so that a lost one is seen."""
    import torch
    import transformers

    class_name, values = FAMILIES[name]
    config = getattr(transformers, class_name)(**{**values, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("bias"):
                    parameter.normal_(std=0.1)
    return model.eval()

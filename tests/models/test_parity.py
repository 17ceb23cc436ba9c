"""Every architecture that transformers has, against transformers, on checkpoints that transformers wrote.

float32 on both sides, so the only differences are the order of sums and the absorbed matrices of latent
attention: a few rounding errors of 6e-8 per layer. The bound is 5e-6 of the largest logit, ten times what
is measured and a thousand times less than any wrong formula would cost.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_oracle import chunked_logits, greedy, load
from transformers import AutoConfig, AutoModelForCausalLM
from world import COMMON, write_tokenizer

BOUND = 5e-6
PROMPT_LENGTHS = (37, 21, 5)  # blocks are of 8
GREEDY_TOKENS = 64

MOE = {"num_experts": 8, "moe_intermediate_size": 16}
MLA = {
    "n_routed_experts": 8, "moe_intermediate_size": 16, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "num_key_value_heads": 4,
}  # fmt: skip
GLM = {"n_routed_experts": 8, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "head_dim": 16}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip

CASES: dict[str, dict[str, Any]] = {
    "qwen3_moe gqa": {**MOE, "head_dim": 16, "norm_topk_prob": True},
    "qwen3_moe mha tied": {**MOE, "head_dim": 8, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3_moe bias sparse": {
        **MOE, "attention_bias": True, "num_hidden_layers": 4, "decoder_sparse_step": 2,
        "mlp_only_layers": [3], "head_dim": 16,
    },
    "qwen3_moe linear": {**MOE, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    "qwen3_moe llama3": {**MOE, "head_dim": 16, "rope_parameters": LLAMA3},
    "qwen3_moe yarn": {**MOE, "head_dim": 16, "rope_parameters": YARN},
    "qwen2_moe gqa": {**MOE, "shared_expert_intermediate_size": 24},
    "qwen2_moe mha tied": {
        **MOE, "shared_expert_intermediate_size": 16, "num_key_value_heads": 4, "tie_word_embeddings": True,
        "norm_topk_prob": True, "qkv_bias": False,
    },
    "qwen2_moe dense layer": {**MOE, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]},
    "mixtral gqa": {"num_local_experts": 8},
    "mixtral mha tied wide heads": {
        "num_local_experts": 4, "num_key_value_heads": 4, "head_dim": 16, "tie_word_embeddings": True,
    },
    "olmoe mha": {"num_experts": 8, "num_key_value_heads": 4},
    "olmoe gqa clip": {
        "num_experts": 8, "clip_qkv": 0.7, "norm_topk_prob": True, "tie_word_embeddings": True,
        "attention_bias": True,
    },
    "deepseek_v2 greedy": {**MLA, "n_shared_experts": 2},
    "deepseek_v2 groups q_lora": {
        **MLA, "q_lora_rank": 24, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
        "routed_scaling_factor": 4.0, "attention_bias": True,
    },
    "deepseek_v2 yarn": {**MLA, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9}},
    "deepseek_v3 groups q_lora": {**MLA, "q_lora_rank": 24, "n_group": 4, "topk_group": 2},
    "deepseek_v3 one group tied": {
        **MLA, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "tie_word_embeddings": True,
        "n_shared_experts": 2,
    },
    "deepseek_v3 yarn half": {
        **MLA, "n_group": 2, "topk_group": 1, "rope_interleave": False, "attention_bias": True,
        "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 8.0, "beta_slow": 2.0},
    },
    "glm4_moe": {**GLM, "n_group": 1, "topk_group": 1},
    "glm4_moe groups qk_norm bias": {
        **GLM, "n_group": 4, "topk_group": 2, "use_qk_norm": True, "attention_bias": True,
        "routed_scaling_factor": 2.5, "num_key_value_heads": 4,
    },
    "glm4_moe quarter rotary tied": {
        **GLM, "n_group": 2, "topk_group": 1, "partial_rotary_factor": 0.25, "norm_topk_prob": False,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def save_oracle(folder: Path, case: str) -> Any:
    """A transformers model with random weights of useful size, saved into ``folder`` by transformers."""
    common = {key: COMMON[key] for key in COMMON if key not in ("rope_theta", "torch_dtype", "eos_token_id")}
    config = AutoConfig.for_model(
        case.split()[0],
        **{**common, **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")), **CASES[case]},
    )
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(len(case))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "inv_freq" in name:
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() == 1:
            tensor.data = 0.2 * noise + ("norm" in name)
        else:
            tensor.data = noise if "embed_tokens" in name else noise * tensor.shape[-1] ** -0.5
    if config.tie_word_embeddings:
        model.tie_weights()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


@pytest.fixture(scope="module", params=CASES)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("oracle")
    return save_oracle(folder, request.param), folder


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(0, COMMON["vocab_size"], (length,), generator=generator) for length in PROMPT_LENGTHS
    ]


def test_logits_equal_transformers_over_chunks_and_mixed_batches(oracle: Any, backend: str) -> None:
    model, folder = oracle
    ours = chunked_logits(load(folder, backend), prompts())
    for ids, logits in zip(prompts(), ours, strict=True):
        with torch.no_grad():
            expected = model(ids[None]).logits[0]
        error = float((logits - expected).abs().max() / expected.abs().max())
        print(f"relative error {error:.1e}")
        assert error <= BOUND


def test_greedy_tokens_equal_transformers_generate(oracle: Any, backend: str) -> None:
    model, folder = oracle
    ids = prompts()[1]
    expected = model.generate(
        ids[None],
        attention_mask=torch.ones_like(ids[None]),
        max_new_tokens=GREEDY_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )[0, len(ids) :]
    assert greedy(load(folder, backend), ids, GREEDY_TOKENS) == expected.tolist()

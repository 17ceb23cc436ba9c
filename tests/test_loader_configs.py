"""Configs that would change the mathematics, exhaust memory or run code are refused at load."""

import json
from pathlib import Path
from typing import Any

import pytest
from model_oracle import load
from world import edit_config, tiny_checkpoint

from moe_runtime.errors import CheckpointError
from moe_runtime.kernels import choose
from moe_runtime.loader import load_model


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "model")


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "more experts than tensors": ({"num_experts": 16}, r"experts\.8\..*missing .*16 experts"),
    "fewer experts than tensors": ({"num_experts": 4}, r"experts\.4\..*: no part .*4 experts"),
    "more experts per token than experts": ({"num_experts_per_tok": 9}, "per_tok: 9 is outside 1..8"),
    "no experts per token": ({"num_experts_per_tok": 0}, r"num_experts_per_tok: 0 is outside"),
    "two counts of experts": ({"num_local_experts": 4}, r"num_experts and num_local_experts: .*disagree"),
    "negative width": ({"hidden_size": -32}, r"hidden_size: -32 is outside"),
    "zero layers": ({"num_hidden_layers": 0}, r"num_hidden_layers: 0 is outside"),
    "huge layers": ({"num_hidden_layers": 10**30}, r"num_hidden_layers: 10+ is outside"),
    "a thousand layers": ({"num_hidden_layers": 1024}, r"layers\.2\..*: missing"),
    "huge experts": ({"num_experts": 2**31}, r"num_experts: 2147483648 is outside"),
    "everything huge": (
        {"num_hidden_layers": 1024, "hidden_size": 1 << 20, "head_dim": 65536, "num_attention_heads": 65536},
        r"embed_tokens.weight: shape \[272, 32\], config.json makes it \[272, 1048576\]|layers.2.*missing",
    ),
    "boolean for integer": ({"num_hidden_layers": True}, r"num_hidden_layers: expected an integer, got True"),
    "float for integer": ({"hidden_size": 32.0}, r"hidden_size: expected an integer, got 32.0"),
    "string for integer": ({"hidden_size": "32"}, r"hidden_size: expected an integer, got '32'"),
    "integer for boolean": ({"norm_topk_prob": 1}, r"norm_topk_prob: expected true or false, got 1"),
    "string for number": ({"rms_norm_eps": "1e-6"}, r"rms_norm_eps: expected a number"),
    "boolean for number": ({"rms_norm_eps": True}, r"rms_norm_eps: expected a number"),
    "negative epsilon": ({"rms_norm_eps": -1e-6}, r"rms_norm_eps: -1e-06 is outside"),
    "missing width": ({"hidden_size": None}, r"config.json: hidden_size: missing"),
    "missing context": ({"max_position_embeddings": None}, r"max_position_embeddings: missing"),
    "heads that do not divide": ({"num_key_value_heads": 3}, r"num_key_value_heads: 3 does not divide 4"),
    "more key heads than heads": ({"num_key_value_heads": 8}, r"num_key_value_heads: 8 is outside 1..4"),
    "partly rotated": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is outside 1..1"),
    "odd head": ({"head_dim": 15}, r"rotary dimension 15"),
    "end of text outside the vocabulary": ({"eos_token_id": 272}, "eos_token_id: .* in 0..271"),
    "text for end of text": ({"eos_token_id": ["</s>"]}, r"eos_token_id: expected integers"),
    "unknown model": ({"model_type": "llama"}, "'llama' is not supported; supported: bailing"),
    "model type climbs out": ({"model_type": "../../evil"}, r"not supported; supported"),
    "model type is a module": ({"model_type": "__init__"}, r"not supported; supported"),
    "model type is a list": ({"model_type": ["qwen3_moe"]}, r"not supported; supported"),
    "no model type": ({"model_type": None}, r"not supported; supported"),
    "custom code": ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, r"auto_map .*code \(evil"),
    "custom code elsewhere": ({"auto_map": {"AutoConfig": "user/repo--m.C"}}, "auto_map asks for custom"),
    "custom code as text": ({"auto_map": "evil.Model"}, r"auto_map asks for custom code"),
    "unknown setting": ({"attention_sinks": 4}, r"attention_sinks: unknown setting \(4\)"),
    "unprintable setting": ({"\ud800\n": 4}, r"\\ud800\\n: unknown setting"),
    "unknown section": ({"per_layer_config": {"a": 1}}, r"per_layer_config: unknown setting"),
    "another activation": ({"hidden_act": "gelu"}, r"hidden_act: 'gelu' is not supported: only SiLU"),
    "unknown dtype": ({"torch_dtype": "int8"}, r"dtype: 'int8' is not supported"),
    "window": ({"use_sliding_window": True, "sliding_window": 64}, "sliding_window: .*window of 64"),
    "layers with windows": ({"layer_types": ["sliding_attention"]}, r"layer_types: 'sliding_attention'"),
    "dynamic rope": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"rope_scaling.type: 'dynamic'"),
    "longrope": ({"rope_scaling": {"rope_type": "longrope"}}, r"rope_type: 'longrope' is not supported"),
    "rope by image sections": (
        {"rope_scaling": {"rope_type": "default", "mrope_section": [8, 8]}}, "rope_scaling.mrope_section: ",
    ),
    "rope without factor": ({"rope_scaling": {"type": "yarn"}}, r"rope_scaling.factor: missing"),
    "rope factor below one": ({"rope_scaling": {"type": "linear", "factor": 0.5}}, r"factor: 0.5 is outside"),
    "rope is a list": ({"rope_scaling": [1]}, r"rope_scaling: expected an object"),
    "rope base of one": ({"rope_theta": 1.0}, r"rope_theta: 1.0 is outside"),
    "two rope bases": (
        {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        r"rope_parameters.*rope_theta: 10000, but 1e\+06 outside",
    ),
    "yarn bands swapped": (
        {"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": 1, "beta_slow": 32}},
        r"beta_fast: 1 is below beta_slow 32",
    ),
    "llama3 bands swapped": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}},
        r"high_freq_factor: 1 is not above",
    ),
    "quantised otherwise": ({"quantization_config": {"quant_method": "hqq"}}, r"quant_method: 'hqq'"),
    "float8 by tensor": ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size: .*block"),
    "float8 with static activations": (
        {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}},
        r"activation_scheme: 'static'",
    ),
    "encoder": ({"is_encoder_decoder": True}, r"is_encoder_decoder: True is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_wrong_configs_are_refused(good: Path, case: str) -> None:
    changes, message = BAD_CONFIGS[case]
    edit_config(good, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(good, "reference")


BAD_ROUTING: dict[str, tuple[str, dict[str, Any], str]] = {
    "groups that do not divide": ("deepseek_v3", {"n_group": 3}, r"n_group: 3 groups do not divide 8"),
    "more chosen groups than groups": ("glm4_moe", {"topk_group": 5}, r"topk_group: 5 exceeds the 4"),
    "groups of one": ("bailing_moe_v2", {"n_group": 8}, r"n_group: 8 groups leave fewer than two"),
    "too few experts to choose": ("deepseek_v3", {"topk_group": 1, "num_experts_per_tok": 3}, "exceed the 2"),
    "softmax in V3": ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func: 'softmax' is not"),
    "sigmoid in V2": ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func: 'sigmoid' is not"),
    "normalised V2": ("deepseek_v2", {"norm_topk_prob": True}, r"norm_topk_prob: True is not supported"),
    "unknown method": ("deepseek_v2", {"topk_method": "random"}, r"topk_method: 'random' is not supported"),
    "fewer latent key heads": ("deepseek_v2", {"num_key_value_heads": 2}, r"num_key_value_heads: latent"),
    "no groups in V3": ("deepseek_v3", {"n_group": None}, r"n_group: missing"),
    "unnormalised Ling": ("bailing_moe_v2", {"norm_topk_prob": False}, r"norm_topk_prob: Ling 2.0 always"),
    "softmax Ling": ("bailing_moe_v2", {"score_function": "softmax"}, r"score_function: 'softmax'"),
    "Ling rotary sizes": ("bailing_moe_v2", {"rotary_dim": 12}, r"rotary_dim.*disagrees"),
    "Mixtral window": ("mixtral", {"sliding_window": 128}, r"sliding_window: attention over a window of 128"),
    "MLP biases": ("deepseek_v2", {"mlp_bias": True}, r"mlp_bias: True is not supported"),
    "negative clip": ("olmoe", {"clip_qkv": -1.0}, r"clip_qkv: -1.0 is outside"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROUTING)
def test_settings_that_do_not_fit_the_architecture_are_refused(tmp_path: Path, case: str) -> None:
    architecture, changes, message = BAD_ROUTING[case]
    folder = tiny_checkpoint(tmp_path, architecture)
    load(folder, "reference")
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
        load(edit_config(folder, **changes), "reference")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_folder_without_its_files_is_refused(good: Path, name: str) -> None:
    (good / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        load(good, "reference")


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": 1, "a": 2}', '{"a": NaN}', "[" * 100_000, '"x"', '{"a": "\udc80"}']
)
def test_a_config_that_is_not_a_plain_object_is_refused(good: Path, text: str) -> None:
    (good / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(CheckpointError, match="config.json: "):
        load(good, "reference")


def test_a_tokenizer_that_comes_as_code_is_refused(good: Path) -> None:
    path = good / "tokenizer_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: auto_map asks .*tokenization_evil"):
        load(good, "reference")


def test_a_path_that_is_no_folder_is_refused(good: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        load_model(good / "config.json", choose("reference"))

"""``quantization_config`` of ``config.json``: how a published checkpoint holds its quantised matrices.

A setting that would change the mathematics and is not implemented is refused; what only says how the codes
were found is left aside. Modules the config lists as not converted are simply there as ordinary tensors.
"""

from moe_runtime.hf_config import Fields
from moe_runtime.model_config import Fp8Config, Int4Config

METHODS = ("fp8", "awq", "gptq")
MAX_GROUP = 65536
# How the quantising program ran, or how another engine should run the result.
GPTQ_BOOKKEEPING = (
    "batch_size", "block_name_to_quantize", "cache_block_outputs", "damp_percent", "dataset",
    "exllama_config", "max_input_length", "meta", "model_file_base_name", "model_name_or_path",
    "model_seqlen", "modules_in_block_to_quantize", "module_name_preceding_first_block", "pack_dtype",
    "pad_token_id", "static_groups", "tokenizer", "true_sequential", "use_cuda_fp16", "use_exllama",
)  # fmt: skip
AWQ_BOOKKEEPING = (
    "backend", "do_fuse", "exllama_config", "fuse_max_seq_len", "modules_to_fuse",
)  # fmt: skip


def read_quantization(fields: Fields) -> tuple[Fp8Config | None, Int4Config | None]:
    """What the section says; at most one of the two. Raises CheckpointError for what is not implemented."""
    section = fields.section("quantization_config")
    if section is None:
        return None, None
    method = section.choice("quant_method", METHODS)
    section.strings("modules_to_not_convert")
    if method == "fp8":
        result: tuple[Fp8Config | None, Int4Config | None] = _read_fp8(section), None
    elif method == "awq":
        result = None, _read_awq(section)
    else:
        result = None, _read_gptq(section)
    section.finish()
    return result


def _read_fp8(section: Fields) -> Fp8Config:
    """As DeepSeek and Qwen publish it: e4m3 weights, one scale per block."""
    section.choice("fmt", ("e4m3",), "e4m3")
    section.choice("scale_fmt", ("ue8m0", "float"), "float")
    section.choice("activation_scheme", ("dynamic",), "dynamic")  # activations stay float32 here
    section.flag("dequantize", False)
    block = section.integers("weight_block_size", 1, 65536)
    if len(block) != 2:
        raise section.error("weight_block_size", "expected two block sizes: only block-wise scales are read")
    return Fp8Config(*block)


def _read_awq(section: Fields) -> Int4Config:
    """As AutoAWQ publishes it."""
    section.skip(*AWQ_BOOKKEEPING)
    section.choice("version", ("gemm", "GEMM"), "gemm")  # the others order the codes differently
    section.expect("bits|w_bit", 4, "only 4-bit AWQ is read")
    section.expect("zero_point", True, "AWQ without zero points is not published by AutoAWQ")
    return Int4Config("awq", _group(section, "group_size|q_group_size"), zeros=True)


def _read_gptq(section: Fields) -> Int4Config:
    """As AutoGPTQ and GPTQModel publish it."""
    section.skip(*GPTQ_BOOKKEEPING)
    section.expect("bits", 4, "only 4-bit GPTQ is read")
    section.expect("is_marlin_format", False, "Marlin orders the codes differently; publish the plain format")
    section.expect("lm_head", False, "a quantised lm_head is not read")
    # With desc_act the inputs may be in another order; the tensors g_idx tell, and are checked when read.
    section.flag("desc_act", False)
    version = section.choice("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    symmetric = section.flag("sym", True)
    group = _group(section, "group_size")
    return Int4Config("gptq", group, zeros=not symmetric, zero_offset=int(version == "gptq"))


def _group(section: Fields, key: str) -> int:
    """The group size; 0 for one group per output (-1)."""
    group = section.integer(key, -1, MAX_GROUP)
    if group == -1:
        return 0
    if group not in (32, 64) and (group == 0 or group % 128):
        raise section.error(key, f"{group} is not supported; supported: -1, 32, 64 and multiples of 128")
    return group

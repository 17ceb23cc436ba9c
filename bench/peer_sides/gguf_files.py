"""A qwen3_moe checkpoint as GGUF files for llama.cpp: `python gguf_files.py CHECKPOINT OUT FORMAT ...`.

Runs in llama.cpp's own environment. BF16 is written here, expert matrices stacked as llama.cpp wants them;
every other FORMAT (Q8_0, Q4_0, Q4_K_S) is made from it by llama.cpp's own quantiser with its defaults.
"""

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

FILE_TYPES = {
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_K_S": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S,
}
PARTS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
BFLOAT16 = gguf.GGMLQuantizationType.BF16


class Tensors:
    """The checkpoint's tensors as numpy views: bfloat16 as uint16."""

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        self._views: dict[str, np.ndarray] = {}
        for file in sorted(set(index.values())):
            data = np.memmap(folder / file, np.uint8, mode="r")
            size = int(data[:8].view(np.uint64)[0])
            for name, entry in json.loads(data[8 : 8 + size].tobytes()).items():
                if name == "__metadata__":
                    continue
                if entry["dtype"] != "BF16":
                    raise SystemExit(f"{file}: {name} is {entry['dtype']}; this writer takes bfloat16 only")
                start, end = (8 + size + offset for offset in entry["data_offsets"])
                self._views[name] = data[start:end].view(np.uint16).reshape(entry["shape"])

    def bfloat16(self, *names: str) -> np.ndarray:
        """One tensor, or several stacked along a new first axis, as the bytes that GGUF stores."""
        views = [self._views[name] for name in names]
        return (views[0] if len(views) == 1 else np.stack(views)).view(np.uint8)

    def float32(self, name: str) -> np.ndarray:
        return (self._views[name].astype(np.uint32) << 16).view(np.float32)


def sources(config: dict[str, Any]) -> list[tuple[str, list[str], bool]]:
    """GGUF's name, ours (all experts of a stacked one), whether it is float32 (norms, router)."""
    result = [
        ("token_embd.weight", ["model.embed_tokens.weight"], False),
        ("output_norm.weight", ["model.norm.weight"], True),
        ("output.weight", ["lm_head.weight"], False),
    ]
    for layer in range(config["num_hidden_layers"]):
        theirs, ours = f"blk.{layer}.", f"model.layers.{layer}."
        for name, of, wide in (
            ("attn_norm", "input_layernorm", True),
            ("ffn_norm", "post_attention_layernorm", True),
            ("attn_q_norm", "self_attn.q_norm", True),
            ("attn_k_norm", "self_attn.k_norm", True),
            ("attn_q", "self_attn.q_proj", False),
            ("attn_k", "self_attn.k_proj", False),
            ("attn_v", "self_attn.v_proj", False),
            ("attn_output", "self_attn.o_proj", False),
            ("ffn_gate_inp", "mlp.gate", True),
        ):
            result.append((f"{theirs}{name}.weight", [f"{ours}{of}.weight"], wide))
        for name, of in PARTS.items():
            experts = [f"{ours}mlp.experts.{e}.{of}.weight" for e in range(config["num_experts"])]
            result.append((f"{theirs}ffn_{name}_exps.weight", experts, False))
    return result


def add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any], vocabulary: dict[str, int]) -> None:
    writer.add_name("slice")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    by_id = {token_id: token for token, token_id in vocabulary.items()}
    tokens = [by_id.get(token_id, f"<none{token_id}>") for token_id in range(config["vocab_size"])]
    control = {config["bos_token_id"], config["eos_token_id"]}
    kinds = [gguf.TokenType.CONTROL if i in control else gguf.TokenType.NORMAL for i in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["! !"])  # required, though the slice's tokenizer has none; prompts are token ids
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def write_bfloat16(folder: Path, path: Path) -> None:
    """The whole checkpoint, one stacked tensor in memory at a time."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "qwen3_moe" or not config["norm_topk_prob"] or config["tie_word_embeddings"]:
        raise SystemExit(f"{folder}: this writer knows the slice of slice_checkpoint.py (qwen3_moe) only")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    tensors = Tensors(folder)
    unfinished = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(unfinished, "qwen3moe")
    add_metadata(writer, config, vocabulary)
    plan = sources(config)
    for name, ours, wide in plan:
        one = tensors.float32(ours[0]) if wide else tensors.bfloat16(ours[0])
        shape = one.shape if len(ours) == 1 else (len(ours), *one.shape)
        writer.add_tensor_info(
            name, shape, one.dtype, one.nbytes * len(ours), raw_dtype=None if wide else BFLOAT16
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, ours, wide in plan:
        writer.write_tensor_data(tensors.float32(ours[0]) if wide else tensors.bfloat16(*ours))
    writer.close()
    unfinished.rename(path)


def quantise(source: Path, path: Path, name: str) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[name]
    unfinished = path.with_suffix(".partial")
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(unfinished).encode(), params)
    if code:
        raise SystemExit(f"llama_model_quantize({name}) gives {code}")
    unfinished.rename(path)


def main() -> None:
    folder, out, *names = sys.argv[1:]
    source = Path(out) / "BF16.gguf"
    Path(out).mkdir(parents=True, exist_ok=True)
    if not source.exists():
        write_bfloat16(Path(folder), source)
    for name in names:
        path = Path(out) / f"{name}.gguf"
        if not path.exists():
            quantise(source, path, name)


if __name__ == "__main__":
    main()

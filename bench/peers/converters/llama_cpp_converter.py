"""GGUF: `llama_cpp_converter.py HF_FOLDER OUTPUT int4|half GROUP_SIZE TOKENIZER_GGUF`, written as `OUTPUT/model.gguf`.

half: bf16 tensors. int4: the same through llama.cpp's own quantiser to Q4_0 (blocks of 32; the head in 6 bits). The
tokenizer's fields are copied from a GGUF file where there is one; without, the model has token ids only.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def main() -> None:
    source, output, precision, _, tokenizer = sys.argv[1:6]
    config = json.loads((Path(source) / "config.json").read_text())
    half = Path(output) / ("model.gguf" if precision == "half" else "half.gguf")
    _write_half(Path(source), config, tokenizer, half)
    if precision == "int4":
        _quantize(half, Path(output) / "model.gguf")
        half.unlink()


def _write_half(source: Path, config: dict[str, Any], tokenizer: str, target: Path) -> None:
    writer = gguf.GGUFWriter(str(target), "llama")
    _add_config(writer, config)
    if tokenizer:
        _copy_tokenizer(writer, gguf.GGUFReader(tokenizer))
    else:
        writer.add_tokenizer_model("no_vocab")
    bf16 = gguf.GGMLQuantizationType.BF16
    for name, values in _tensors(source, config):
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, bf16), raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters") or {}
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config.get("rope_theta") or rope.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _copy_tokenizer(writer: gguf.GGUFWriter, reader: gguf.GGUFReader) -> None:
    for field in reader.fields.values():
        if field.name.startswith("tokenizer."):
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)


def _tensors(source: Path, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """GGUF name and float32 values. llama.cpp rotates neighbours, Hugging Face halves: q and k are reordered."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for path in sorted(source.glob("*.safetensors")):
        for name, values in _bf16_tensors(path):
            target = _gguf_name(name)
            part = target.split(".")[-2]
            yield target, _interleaved(values, heads[part]) if part in heads else values


def _bf16_tensors(path: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """A safetensors file's tensors as float32: 8 bytes of header size, a JSON header, then the data."""
    header_end = 8 + int.from_bytes(path.open("rb").read(8), "little")
    header = json.loads(path.open("rb").read(header_end)[8:])
    data = np.memmap(path, np.uint8, "r", offset=header_end)
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            bits = data[begin:end].view(np.uint16).astype(np.uint32) << 16
            yield name, bits.view(np.float32).reshape(entry["shape"])


def _gguf_name(name: str) -> str:
    module = name.removesuffix(".weight")
    if module in _WHOLE:
        return f"{_WHOLE[module]}.weight"
    _, _, number, part = module.split(".", 3)
    return f"blk.{number}.{_LAYER[part]}.weight"


def _interleaved(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    rows, columns = values.shape
    return values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _quantize(source: Path, target: Path) -> None:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters)
    if status:
        raise SystemExit(f"llama.cpp's quantiser failed with status {status}")


main()

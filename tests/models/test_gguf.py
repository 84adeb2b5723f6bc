"""GGUF files: a real one, and small ones written here with the layouts that llama.cpp's converter produces."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from edgellm.builder.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from edgellm.builder.checkpoint.gguf_format import GgufContainer
from edgellm.builder.models import build_graph
from edgellm.engines.graph import WeightName
from edgellm.engines.reference import float32_oracle

SIZES = {"vocab": 8, "hidden": 16, "intermediate": 24, "heads": 4, "kv_heads": 2, "head_dim": 4}


@pytest.fixture(scope="module")
def smollm2_checkpoint(smollm2: Path) -> Checkpoint:
    return open_checkpoint(str(smollm2))


def test_real_model_computes_what_transformers_computes(
    smollm2_checkpoint: Checkpoint, run_sequence: Callable[..., Any], torch_logits: Callable[..., Any]
) -> None:
    """Its logits reach 30 and its residual stream thousands, so float32 alone accounts for 1e-4 of difference."""
    oracle = float32_oracle(build_graph(smollm2_checkpoint.config), smollm2_checkpoint.weights, kv_blocks=1)
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\nThe capital is"
    tokenizer = Tokenizer.from_str(smollm2_checkpoint.tokenizer.tokenizer_json)
    tokens = np.array(tokenizer.encode(text).ids, np.int32)
    expected = torch_logits(smollm2_checkpoint.load_torch(), tokens)
    logits = run_sequence(oracle, tokens, [10, len(tokens) - 11, 1])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-4)
    assert "Paris" in tokenizer.decode([int(logits[-1].argmax())])


@pytest.mark.slow
def test_real_model_as_transformers_reads_the_file(
    smollm2: Path, smollm2_checkpoint: Checkpoint, torch_logits: Callable[..., Any]
) -> None:
    """The same logits from transformers' own reader, dequantiser and row order."""
    theirs = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)
    tokens = np.arange(100, 140, dtype=np.int32)
    np.testing.assert_array_equal(
        torch_logits(smollm2_checkpoint.load_torch(), tokens), torch_logits(theirs.eval(), tokens)
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_written_model_as_transformers_reads_the_file(
    architecture: str, tmp_path: Path, run_sequence: Callable[..., Any], torch_logits: Callable[..., Any]
) -> None:
    rows = {"q": SIZES["heads"], "k": SIZES["kv_heads"], "v": SIZES["kv_heads"]}
    biases = {f"blk.0.attn_{part}.bias": np.arange(4 * n, dtype=np.float32) for part, n in rows.items()}
    write_gguf(tmp_path / "model.gguf", architecture=architecture, extra=biases if architecture == "qwen2" else {})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    checkpoint = open_checkpoint(str(tmp_path / "model.gguf"))
    tokens = np.random.default_rng(3).integers(0, SIZES["vocab"], 40).astype(np.int32)
    oracle = float32_oracle(build_graph(checkpoint.config), checkpoint.weights, kv_blocks=2)
    np.testing.assert_allclose(run_sequence(oracle, tokens, [40]), torch_logits(theirs, tokens), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(torch_logits(checkpoint.load_torch(), tokens), torch_logits(theirs, tokens))


def test_real_tokenizer(smollm2_checkpoint: Checkpoint, tmp_path: Path) -> None:
    smollm2_checkpoint.write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == smollm2_checkpoint.config.vocab_size
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>").ids == [1, 4093, 198, 6004, 2]
    assert tokenizer.encode("in 2024").tokens == ["in", "Ġ", "2", "0", "2", "4"]
    for text in ("Hello, world! 3.14", "  two  spaces\n\n\ttab", "naïve 日本語 🙂"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert "<|im_start|>" in (tmp_path / "chat_template.jinja").read_text()
    generation = smollm2_checkpoint.generation
    assert (generation.bos_token_id, generation.eos_token_ids) == (1, (2,))
    assert (generation.bos_token, generation.eos_token) == ("<|im_start|>", "<|im_end|>")


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    metadata: dict[str, Any] | None = None,
    without: str = "",
    extra: dict[str, np.ndarray[Any, Any]] | None = None,
) -> dict[str, np.ndarray[Any, Any]]:
    """One layer of random weights; the tensors as written, by GGUF name."""
    rng, size = np.random.default_rng(0), SIZES
    shapes = {
        "token_embd": (size["vocab"], size["hidden"]),
        "output_norm": (size["hidden"],),
        "output": (size["vocab"], size["hidden"]),
        "blk.0.attn_norm": (size["hidden"],),
        "blk.0.ffn_norm": (size["hidden"],),
        "blk.0.attn_q": (size["heads"] * size["head_dim"], size["hidden"]),
        "blk.0.attn_k": (size["kv_heads"] * size["head_dim"], size["hidden"]),
        "blk.0.attn_v": (size["kv_heads"] * size["head_dim"], size["hidden"]),
        "blk.0.attn_output": (size["hidden"], size["heads"] * size["head_dim"]),
        "blk.0.ffn_gate": (size["intermediate"], size["hidden"]),
        "blk.0.ffn_up": (size["intermediate"], size["hidden"]),
        "blk.0.ffn_down": (size["hidden"], size["intermediate"]),
    }
    tensors = {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if name != without} | (extra or {})
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_embedding_length(size["hidden"])
    writer.add_feed_forward_length(size["intermediate"])
    writer.add_head_count(size["heads"])
    writer.add_head_count_kv(size["kv_heads"])
    writer.add_context_length(64)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(size["vocab"])
    for name, value in (metadata or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}[type(value)]
        add(name, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_llama_rows_are_put_back_into_half_split_order(tmp_path: Path) -> None:
    """llama.cpp writes row 2i + j of a head where Hugging Face has row i + j * head_dim / 2."""
    written = write_gguf(tmp_path / "model.gguf")
    checkpoint = open_checkpoint(str(tmp_path / "model.gguf"))
    for part, module in (("attn_q", "q_proj"), ("attn_k", "k_proj")):
        ours = checkpoint.weights[WeightName(f"model.layers.0.self_attn.{module}.weight")]
        heads = written[f"blk.0.{part}.weight"].reshape(-1, SIZES["head_dim"], SIZES["hidden"])
        np.testing.assert_array_equal(ours, heads[:, [0, 2, 1, 3]].reshape(-1, SIZES["hidden"]))
    v = checkpoint.weights[WeightName("model.layers.0.self_attn.v_proj.weight")]
    np.testing.assert_array_equal(v, written["blk.0.attn_v.weight"])
    assert not checkpoint.config.tied_embeddings
    assert checkpoint.id == "model"


def test_qwen2_rows_stay_and_biases_load(tmp_path: Path) -> None:
    rows = {"q": SIZES["heads"], "k": SIZES["kv_heads"], "v": SIZES["kv_heads"]}
    biases = {f"blk.0.attn_{part}.bias": np.arange(4 * n, dtype=np.float32) for part, n in rows.items()}
    written = write_gguf(tmp_path / "model.gguf", architecture="qwen2", extra=biases, without="output.weight")
    checkpoint = open_checkpoint(str(tmp_path / "model.gguf"))
    assert checkpoint.config.tied_embeddings
    for kind in ("weight", "bias"):
        ours = checkpoint.weights[WeightName(f"model.layers.0.self_attn.q_proj.{kind}")]
        np.testing.assert_array_equal(ours, written[f"blk.0.attn_q.{kind}"])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"architecture": "gpt2"}, "gpt2"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "yarn"),
        ({"extra": {"rope_freqs.weight": np.ones(2, np.float32)}}, "rope_freqs"),
        ({"metadata": {"llama.expert_count": 8}}, "8 experts"),
        ({"metadata": {"llama.attention.sliding_window": 32}}, "sliding"),
        ({"without": "blk.0.ffn_up.weight"}, "up_proj"),
        ({"metadata": {"llama.attention.key_length": 6}}, "q_proj"),
        ({"metadata": {"llama.attention.key_length": 4, "llama.rope.dimension_count": 2}}, "rotating 2 of 4"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", **options)
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("kept", [3, 20, 300, 4000])
def test_truncated_file(kept: int, tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes((tmp_path / "whole.gguf").read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"broken\.gguf"):
        open_checkpoint(str(broken))


@pytest.mark.parametrize(
    ("offset", "value", "named"),
    [
        (0, b"GGML", "GGUF"),
        (4, b"\x01", "version 1"),
        (16, b"\xff\xff", "cannot be read"),
        (24, b"\xff" * 8, "past the"),
    ],
)
def test_damaged_header(offset: int, value: bytes, named: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    raw = bytearray((tmp_path / "model.gguf").read_bytes())
    raw[offset : offset + len(value)] = value
    (tmp_path / "model.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(str(tmp_path / "model.gguf"))


def test_quantised_tensors_are_read_as_the_gguf_package_reads_them(tmp_path: Path) -> None:
    """Of a type whose blocks are larger than one row of the rest of the model."""
    values = np.random.default_rng(1).normal(size=(4, 256)).astype(np.float32)
    kinds = (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.BF16)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for kind in kinds:
        writer.add_tensor(kind.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    container = GgufContainer(tmp_path / "model.gguf")
    for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(container.read(tensor.name), expected)
        assert container.tensors[tensor.name].shape == values.shape


def test_sentencepiece_vocabulary_starts_with_bos(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁ab"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -3.0, -4.0, -5.0, -1.0, -2.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 0,
    }
    write_gguf(tmp_path / "model.gguf", metadata=metadata)
    files = open_checkpoint(str(tmp_path / "model.gguf")).tokenizer
    assert Tokenizer.from_str(files.tokenizer_json).encode("ab").tokens == ["<s>", "▁ab"]
    assert (files.generation.bos_token, files.generation.eos_token_ids) == ("<s>", (2, 0))
    assert files.chat_template is None


def test_unknown_vocabulary_is_refused(tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.model": "rwkv", "tokenizer.ggml.tokens": ["a"] * 8}
    write_gguf(tmp_path / "model.gguf", metadata=metadata)
    checkpoint = open_checkpoint(str(tmp_path / "model.gguf"))
    with pytest.raises(CheckpointError, match="tokenizer does not convert"):
        _ = checkpoint.tokenizer

"""Damaged, incomplete and unsupported checkpoints: one error that names the path, the tensor or field, and a remedy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from edgellm.builder.checkpoint import CheckpointError, open_checkpoint
from edgellm.engines.graph import WeightName


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Llama."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    path = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refuse(folder: Path, *named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    assert str(folder) in str(caught.value)
    assert all(name in str(caught.value) for name in named), str(caught.value)


def test_the_fixture_opens(folder: Path) -> None:
    assert open_checkpoint(str(folder)).architecture == "llama"


def test_unknown_architecture(folder: Path) -> None:
    change_config(folder, model_type="falcon")
    refuse(folder, "'falcon'", "gpt_neox, llama, mistral, qwen2")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_size": ...}, "'hidden_size' is missing"),
        ({"num_hidden_layers": -3}, "-3"),
        ({"rms_norm_eps": "small"}, "'small'"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"hidden_act": "relu"}, "'relu'"),
        ({"num_attention_heads": 5, "head_dim": None}, "5"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq'"),
        ({"model_type": "mistral", "sliding_window": 4096}, "4096"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 77, "max_window_layers": 1}, "77"),
    ],
)
def test_config_fields(folder: Path, fields: dict[str, Any], named: str) -> None:
    change_config(folder, **fields)
    refuse(folder, named)


def test_a_sliding_window_that_never_slides_is_accepted(folder: Path) -> None:
    change_tensors(folder, add_qwen_biases)
    change_config(folder, model_type="qwen2", use_sliding_window=True, sliding_window=77, max_window_layers=2)
    assert open_checkpoint(str(folder)).architecture == "qwen2"


def add_qwen_biases(tensors: dict[str, Any]) -> None:
    biases = {
        f"model.layers.{layer}.self_attn.{part}_proj.bias": np.zeros(16, np.float32)
        for layer in range(2)
        for part in "qkv"
    }
    tensors.update(biases)


def test_missing_and_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    refuse(folder, "config.json", "JSON")
    (folder / "config.json").unlink()
    refuse(folder, "config.json")


def test_missing_tensor(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refuse(folder, "model.layers.1.mlp.up_proj.weight", "missing")


def test_misshapen_tensor(folder: Path) -> None:
    change_config(folder, vocab_size=33)
    refuse(folder, "model.embed_tokens.weight", "[32, 16]", "[33, 16]")


def test_tensor_with_nan(folder: Path) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    change_tensors(folder, lambda tensors: tensors[name].fill(np.nan))
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(CheckpointError, match=name):
        _ = checkpoint.weights[WeightName(name)]


def test_unsupported_dtype(folder: Path) -> None:
    name = "model.norm.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].astype(np.int32)}))
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*I32"):
        _ = checkpoint.weights[WeightName(name)]


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_weights(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refuse(path.parent, "model.safetensors", "download or copy it again")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 60]},
        {"dtype": "F32", "shape": [4, 4]},
        {"dtype": "F32", "shape": "4x4", "data_offsets": [0, 64]},
        {"dtype": "F32", "shape": [4, 4], "data_offsets": [-64, 0]},
        ["F32", [4, 4]],
    ],
)
def test_broken_header_entry(folder: Path, entry: object) -> None:
    header = json.dumps({"model.norm.weight": entry}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    refuse(folder, "model.safetensors")


def test_missing_shard_and_broken_index(folder: Path) -> None:
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="10KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    refuse(folder, shard.name, "missing")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    refuse(folder, "index")


def test_no_weights_and_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refuse(folder, "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"")
    refuse(folder, "save_pretrained")


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    refuse(tmp_path / "model.onnx", ".gguf")
    refuse(tmp_path / "absent", "no such folder")


def test_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"someone/some-model.*pass the path of its folder"):
        open_checkpoint("someone/some-model")


def test_sha256_follows_the_contents(folder: Path, tmp_path: Path) -> None:
    first = open_checkpoint(str(folder)).sha256
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert open_checkpoint(str(copy)).sha256 == first
    change_tensors(copy, lambda tensors: tensors["model.norm.weight"].fill(2))
    assert open_checkpoint(str(copy)).sha256 != first

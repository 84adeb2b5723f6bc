"""Two small real models, quantised once per session."""

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from edgellm.builder.checkpoint import open_checkpoint
from edgellm.builder.models import build_graph
from edgellm.calib.quantize import SourceOf, quantize
from edgellm.calib.recipe import Progress, QuantizeOptions
from edgellm.calib.sample import sample_windows
from edgellm.engines.graph import Graph, Int4, Linear, WeightName, linears
from edgellm.engines.kv import HostKvPool, KvContract
from edgellm.engines.reference import ReferenceEngine
from edgellm.engines.spec import EngineLimits, EngineSpec
from edgellm.engines.weights import Weight, WeightStore

OPTIONS = QuantizeOptions(outliers=4)


def silent(_step: str, _done: int, _total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SmallModel:
    """A checkpoint, the calibration text that it made itself, and what quantisation made of it."""

    graph: Graph
    weights: WeightStore
    torch_model: Any
    source_of: SourceOf
    bos_token_id: int | None
    contract: KvContract
    windows: torch.Tensor

    def quantize(self, options: QuantizeOptions = OPTIONS) -> tuple[Graph, dict[WeightName, Weight]]:
        return quantize(self.graph, self.weights, self.torch_model, self.windows, self.source_of, options, silent)

    @functools.cache  # noqa: B019 (one model lives as long as the session)
    def quantized(self, options: QuantizeOptions = OPTIONS) -> tuple[Graph, dict[WeightName, Weight]]:
        """The same, computed once."""
        return self.quantize(options)

    def sample(self, count: int, tokens: int, seed: int) -> npt.NDArray[np.int64]:
        return sample_windows(
            self.engine(self.graph, self.weights, self.pool(-(-tokens // 32) * count), max_sequences=count),
            bos_token_id=self.bos_token_id,
            count=count,
            tokens=tokens,
            seed=seed,
            progress=silent,
        )

    def engine(
        self, graph: Graph, weights: WeightStore, pool: HostKvPool, max_rows: int = 64, max_sequences: int = 1
    ) -> ReferenceEngine:
        spec = EngineSpec(
            name="test", phase="decode", backend="reference", backend_version="1", device_class="cpu-local",
            first_layer=0, num_layers=graph.num_layers, rank=0, world=1, precision="half",
            hidden_size=graph.hidden_size, vocab_size=graph.vocab_size, files=(),
            limits=EngineLimits(max_rows=max_rows, max_sequences=max_sequences, max_seq_len=512),
        )  # fmt: skip
        return ReferenceEngine(graph, weights, spec=spec, pool=pool)

    def int4_linears(self, graph: Graph) -> list[Linear]:
        return [op for op in linears(graph) if isinstance(op.precision, Int4)]

    def reference(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Logits [tokens, vocab_size] in full precision."""
        with torch.inference_mode():
            logits: npt.NDArray[np.float32] = self.torch_model(torch.from_numpy(tokens)[None]).logits[0].numpy()
        return logits

    def pool(self, num_blocks: int) -> HostKvPool:
        return HostKvPool(self.contract, range(self.graph.num_layers), num_blocks)


def load(path: Path) -> SmallModel:
    checkpoint = open_checkpoint(str(path))
    config, bos = checkpoint.config, checkpoint.generation.bos_token_id
    graph = build_graph(config)
    model = SmallModel(
        graph=graph,
        weights={name: checkpoint.weights[name] for name in checkpoint.weights},
        torch_model=checkpoint.load_torch(),
        source_of=checkpoint.source_of,
        bos_token_id=bos,
        contract=KvContract(num_layers=config.num_layers, kv_heads=config.kv_heads, head_dim=config.head_dim),
        windows=torch.empty(0),
    )
    return replace(model, windows=torch.from_numpy(model.sample(8, 128, seed=0)))


@pytest.fixture(scope="session")
def stories(stories260k: Path) -> SmallModel:
    return load(stories260k)


@pytest.fixture(scope="session")
def neox(gptneox_stories: Path) -> SmallModel:
    return load(gptneox_stories)


@pytest.fixture(scope="session", params=["stories", "neox"])
def small_model(request: pytest.FixtureRequest) -> SmallModel:
    model: SmallModel = request.getfixturevalue(request.param)
    return model


@pytest.fixture(scope="session")
def quantized(small_model: SmallModel) -> tuple[Graph, dict[WeightName, Weight]]:
    return small_model.quantized()


@pytest.fixture(scope="session")
def progress() -> Progress:
    return silent

"""Engines of ours for comparison: the decode recipe's precisions, rounded to nearest without calibration."""

from pathlib import Path

import msgspec

from bench.rounding import RoundedWeights
from edgellm.builder.checkpoint import open_checkpoint
from edgellm.builder.models import build_graph
from edgellm.builder.plan import PREFILL_ROWS
from edgellm.calib.recipe import QuantizeOptions, quantized_graph
from edgellm.engines.cpu.compiler import compile_engine
from edgellm.engines.kv import KvContract
from edgellm.engines.reference import reference_spec
from edgellm.engines.spec import EngineLimits

LIMITS = {
    "int4": EngineLimits(max_rows=64, max_sequences=32, max_seq_len=8192),
    "half": EngineLimits(max_rows=PREFILL_ROWS, max_sequences=1, max_seq_len=8192),
}
"""The phases that the two engines of a bundle serve: many sequences of one row, one sequence of many rows."""


def write(source: Path, precision: str, folder: Path) -> None:
    """Compile the Hugging Face folder `source` into `folder`, with an `engine.json` beside the plan."""
    checkpoint = open_checkpoint(str(source))
    config, graph, limits = checkpoint.config, build_graph(checkpoint.config), LIMITS[precision]
    weights = checkpoint.weights
    if precision == "int4":
        graph = quantized_graph(graph, QuantizeOptions())
        weights = RoundedWeights(graph, checkpoint.weights)
    contract = KvContract(num_layers=config.num_layers, kv_heads=config.kv_heads, head_dim=config.head_dim)
    compile_engine(graph, weights, contract=contract, limits=limits, folder=folder)
    (folder / "engine.json").write_bytes(msgspec.json.encode(reference_spec(graph, limits)))

"""Engines of ours for comparison: the decode recipe's precisions, rounded to nearest without calibration."""

from pathlib import Path
from typing import Final

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

DECODE_LIMITS: Final = EngineLimits(max_rows=64, max_sequences=32, max_seq_len=8192)
PREFILL_LIMITS: Final = EngineLimits(max_rows=PREFILL_ROWS, max_sequences=1, max_seq_len=8192)
"""The phases that the two engines of a bundle serve: many sequences of one row, one sequence of many rows."""


def write(source: Path, precision: str, folder: Path) -> None:
    """Compile the Hugging Face folder `source` into `folder`, with an `engine.json` beside the plan.

    precision: `half`, or `int4` with `-no-outliers` or `-kv8` after it.
    """
    checkpoint = open_checkpoint(str(source))
    config, graph, limits = checkpoint.config, build_graph(checkpoint.config), PREFILL_LIMITS
    weights = checkpoint.weights
    if precision != "half":
        options = QuantizeOptions(outliers=0) if precision == "int4-no-outliers" else QuantizeOptions()
        graph, limits = quantized_graph(graph, options), DECODE_LIMITS
        weights = RoundedWeights(graph, checkpoint.weights)
    contract = KvContract(
        num_layers=config.num_layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        dtype="int8" if precision == "int4-kv8" else "fp16",
    )
    compile_engine(graph, weights, contract=contract, limits=limits, folder=folder)
    (folder / "engine.json").write_bytes(msgspec.json.encode(reference_spec(graph, limits)))

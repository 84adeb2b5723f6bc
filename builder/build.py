"""From a checkpoint to a bundle, step by step."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from edgellm.builder.backends import Compiler, find_compiler
from edgellm.builder.bundle_writer import require_target, write_bundle
from edgellm.builder.checkpoint import open_checkpoint
from edgellm.builder.compile import compile_planned, compile_whole
from edgellm.builder.context import BuildContext
from edgellm.builder.errors import expected
from edgellm.builder.models import build_graph
from edgellm.builder.options import BuildOptions
from edgellm.builder.plan import BuildPlan, PlanInputs, make_plan
from edgellm.builder.recipes import Recipe, calibration_source, decode_graph, decode_recipe, half_recipe
from edgellm.builder.steps import StepCache, StepResult
from edgellm.builder.verify import measure
from edgellm.calib.recipe import Progress, kept_at_int8
from edgellm.engines.bundle import SCHEMA_VERSION, Bundle, ModelInfo, Quality
from edgellm.engines.kv import KvContract
from edgellm.engines.spec import Phase


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What a build did."""

    bundle: Bundle
    notes: tuple[str, ...]
    steps: tuple[StepResult, ...]
    """In order; each says whether it was done now or reused."""


def build(options: BuildOptions, *, show_plan: Callable[[BuildPlan], None], progress: Progress) -> BuildReport:
    """Build and write a bundle. `show_plan` is called once, before the first long step.

    Raises BuildError, CheckpointError or PlanError; each message says what to do.
    """
    require_target(options.output)
    context = _open(options, progress)
    planned = _plan(context)
    _require_targets(context, planned)
    show_plan(planned)
    half = half_recipe(context)
    decode = decode_recipe(context, lambda: compile_whole(context, planned, "prefill", half))
    engines = [
        compile_planned(context, engine, half if engine.phase == "prefill" else decode) for engine in planned.engines
    ]
    quality = _measure(context, planned, half, decode) if options.verify else None
    bundle = write_bundle(
        options.output, _describe(context, planned, quality), engines, context.checkpoint.write_tokenizer
    )
    return BuildReport(
        bundle=bundle,
        notes=(*planned.notes, *_summary(list(kept_at_int8(decode.graph)))),
        steps=context.cache.results,
    )


def _measure(context: BuildContext, planned: BuildPlan, half: Recipe, decode: Recipe) -> Quality:
    """Of engines with all layers that run on this machine, also where the plan cuts the model into parts, or has
    engines for other devices: they compute the same, or round the same weights."""
    return measure(
        context,
        prefill=compile_whole(context, planned, "prefill", half),
        decode=compile_whole(context, planned, "decode", decode),
    )


def _summary(sentences: Sequence[str]) -> tuple[str, ...]:
    """One line for what is mostly the same linear of every layer."""
    if not sentences:
        return ()
    return (sentences[0] if len(sentences) == 1 else f"{sentences[0]}; and {len(sentences) - 1} more",)


def _open(options: BuildOptions, progress: Progress) -> BuildContext:
    compilers: dict[Phase, Compiler] = {
        "prefill": find_compiler(options.backend_prefill),
        "decode": find_compiler(options.backend_decode),
    }
    checkpoint = open_checkpoint(options.checkpoint)
    config = checkpoint.config
    return BuildContext(
        options=options,
        checkpoint=checkpoint,
        load_torch=functools.cache(checkpoint.load_torch),
        max_seq_len=options.sequence_limit(config.max_seq_len),
        contract=KvContract(
            num_layers=config.num_layers, kv_heads=config.kv_heads, head_dim=config.head_dim, dtype=options.kv_dtype
        ),
        compilers=compilers,
        local=find_compiler("cpu"),
        cache=StepCache(options.cache_dir),
        progress=progress,
    )


def _plan(context: BuildContext) -> BuildPlan:
    return make_plan(
        PlanInputs(
            cluster=context.options.cluster,
            prefill_graph=build_graph(context.checkpoint.config),
            decode_graph=decode_graph(context),
            contract=context.contract,
            max_seq_len=context.max_seq_len,
            max_sequences={phase: compiler.max_sequences for phase, compiler in context.compilers.items()},
        )
    )


def _require_targets(context: BuildContext, planned: BuildPlan) -> None:
    """Raise BuildError for a device class that its backend cannot build for, before anything is computed."""
    with expected(ValueError):
        for engine in planned.engines:
            context.compilers[engine.phase].compute_capability(engine.device_class)


def _describe(context: BuildContext, planned: BuildPlan, quality: Quality | None) -> Bundle:
    """The bundle but for its files, which the writer fills in."""
    return Bundle(
        schema_version=SCHEMA_VERSION,
        model=_model_info(context),
        kv=context.contract,
        engines=(),
        plan=planned.plan,
        quality=quality,
        provenance=_provenance(context),
    )


def _model_info(context: BuildContext) -> ModelInfo:
    checkpoint, config = context.checkpoint, context.checkpoint.config
    return ModelInfo(
        id=checkpoint.id,
        architecture=checkpoint.architecture,
        checkpoint_sha256=checkpoint.sha256,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_seq_len=context.max_seq_len,
        bos_token_id=checkpoint.generation.bos_token_id,
        eos_token_ids=checkpoint.generation.eos_token_ids,
    )


def _provenance(context: BuildContext) -> dict[str, str]:
    """What this bundle was made with and from; nothing about where or when."""
    options = context.options
    tools = {name: version(name) for name in ("edgellm", "numpy", "torch", "nvidia-modelopt")}
    return tools | {
        "backend": " ".join(dict.fromkeys(compiler.version for compiler in context.compilers.values())),
        "measured_with": context.local.version,
        "precision_decode": options.precision_decode,
        "calibration_text": calibration_source(context).description,
        **{f"quantize.{name}": str(value) for name, value in sorted(vars(options.quantize).items())},
    }

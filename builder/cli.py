"""The edgellm-build command."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, get_args

from rich.console import Console

from edgellm.builder import show
from edgellm.builder.assignment import PlanError
from edgellm.builder.build import build
from edgellm.builder.checkpoint import CheckpointError
from edgellm.builder.cluster import LOCAL_CLUSTER, Cluster, ClusterError, cluster_of, read_cluster
from edgellm.builder.errors import BuildError, expected
from edgellm.builder.options import BuildOptions, DecodePrecision, KvDtype
from edgellm.builder.partition import PartitionError
from edgellm.builder.show_networks import read_manifests
from edgellm.calib.recipe import GROUP_SIZES, QuantizeOptions
from edgellm.engines.bundle import BundleError, engine_spec, open_bundle, verify_files

_EXPECTED_ERRORS: Final = (BuildError, BundleError, CheckpointError, ClusterError, PartitionError, PlanError)
_QUANTIZE: Final = {"cpu": QuantizeOptions(), "tensorrt": QuantizeOptions(act_bits=16, outliers=8)}
"""By decode backend. TensorRT leaves activations in half precision, so that outlier channels help less there, and each
costs a half-precision column of the weights."""
_KV_DTYPES: Final[Mapping[str, KvDtype]] = {"half": "fp16", "int8": "int8"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 for a failure that has a name; 2 for arguments that make no sense."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["inspect"]:
            _inspect(_inspect_parser().parse_args(given[1:]))
        else:
            _build(_options(_build_parser(), given))
    except _EXPECTED_ERRORS as error:
        print(f"edgellm-build: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("edgellm-build: interrupted; nothing was written, finished steps are kept", file=sys.stderr)
        return 130
    return 0


def _build(parsed: tuple[BuildOptions, bool]) -> None:
    options, as_json = parsed
    console = Console(stderr=as_json)
    with show.ProgressBars() as bars:
        report = build(
            options, show_plan=lambda planned: console.print(show.plan_table(planned.plan)), progress=bars.update
        )
    if as_json:
        print(show.report_json(options.output, report))
    else:
        console.print(*show.report_renderables(options.output, report), sep="\n")


def _inspect(parsed: argparse.Namespace) -> None:
    bundle = open_bundle(parsed.bundle)
    engines = [engine_spec(parsed.bundle, name) for name in bundle.engines]
    for spec in engines:
        verify_files(parsed.bundle / spec.name, spec.files)
    with expected(ValueError):
        manifests = read_manifests(parsed.bundle, engines)
    if parsed.json:
        print(show.bundle_json(parsed.bundle, bundle, engines, manifests))
    else:
        Console().print(*show.bundle_renderables(parsed.bundle, bundle, engines, manifests), sep="\n")


def _inspect_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edgellm-build inspect", description="Check a bundle and show what is in it.")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edgellm-build",
        description="Compile a checkpoint into a bundle of prefill and decode engines.",
        epilog="`edgellm-build inspect BUNDLE` checks a bundle and shows what is in it.",
    )
    _add_inputs(parser)
    _add_precision(parser)
    _add_running(parser)
    return parser


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="PATH|HUB_ID", help="model folder, .gguf file or hub id")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the bundle to write")
    parser.add_argument("--cluster", type=Path, metavar="FILE", help="cluster.toml (default: this machine alone)")
    for phase in ("", "-prefill", "-decode"):
        whose = f"of {phase[1:]} engines (default: --backend, --target)" if phase else "of all engines"
        default = "" if phase else " (default: cpu)"
        parser.add_argument(f"--backend{phase}", choices=("cpu", "tensorrt"), help=f"compiler {whose}{default}")
        parser.add_argument(
            f"--target{phase}", metavar="CLASS[,CLASS]", help=f"device classes {whose}, instead of --cluster"
        )
    parser.add_argument(
        "--calib-data",
        type=Path,
        metavar="FILE",
        help="calibration text: .jsonl with `text`, or .txt (default: text sampled from the model)",
    )
    parser.add_argument(
        "--eval-data", type=Path, metavar="FILE", help="text to measure quality on (default: sampled, another seed)"
    )


def _add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision-prefill", default="half", choices=("half",), help="default: %(default)s")
    parser.add_argument(
        "--precision-decode", default="int4", choices=get_args(DecodePrecision), help="default: %(default)s"
    )
    parser.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help=f"input channels per scale, one of {GROUP_SIZES} (default: the largest that fits)",
    )
    parser.add_argument(
        "--act-bits",
        type=int,
        metavar="N",
        help=f"4, 8 or 16 (default: {_QUANTIZE['cpu'].act_bits}, tensorrt {_QUANTIZE['tensorrt'].act_bits})",
    )
    parser.add_argument(
        "--outliers",
        type=int,
        metavar="N",
        help="input channels kept in half precision, an even number "
        f"(default: {_QUANTIZE['cpu'].outliers}, tensorrt {_QUANTIZE['tensorrt'].outliers})",
    )
    parser.add_argument("--kv-dtype", default="half", choices=tuple(_KV_DTYPES), help="default: %(default)s")
    parser.add_argument(
        "--max-seq-len", type=int, metavar="N", help="tokens of prompt and answer (default: the model's, at most 4096)"
    )


def _add_running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-verify", action="store_true", help="do not measure quality")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=default_cache_dir(),
        metavar="DIR",
        help="finished steps (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object when done")


def default_cache_dir() -> Path:
    """Where finished steps are kept: `edgellm/build` in the user's cache folder (XDG base directories)."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "edgellm" / "build"


def _options(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[BuildOptions, bool]:
    """The options, and whether to print JSON. Exits with status 2 for values that make no sense."""
    parsed = parser.parse_args(arguments)
    backend_prefill, backend_decode = (
        chosen or parsed.backend or "cpu" for chosen in (parsed.backend_prefill, parsed.backend_decode)
    )
    asked = {name: getattr(parsed, name) for name in ("group_size", "act_bits", "outliers")}
    try:
        given = {name: value for name, value in asked.items() if value is not None}
        quantize = dataclasses.replace(_QUANTIZE[backend_decode], **given)
    except ValueError as error:
        parser.error(str(error))
    options = BuildOptions(
        checkpoint=parsed.checkpoint,
        output=parsed.output,
        cache_dir=parsed.cache_dir,
        cluster=_cluster(parser, parsed),
        backend_prefill=backend_prefill,
        backend_decode=backend_decode,
        precision_decode=parsed.precision_decode,
        quantize=quantize,
        kv_dtype=_KV_DTYPES[parsed.kv_dtype],
        max_seq_len=parsed.max_seq_len,
        calib_data=parsed.calib_data,
        eval_data=parsed.eval_data,
        verify=not parsed.no_verify,
    )
    return options, parsed.json


def _cluster(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> Cluster:
    """From the file, from targets, or this machine."""
    prefill, decode = parsed.target_prefill or parsed.target, parsed.target_decode or parsed.target
    if parsed.cluster is not None:
        if prefill or decode:
            parser.error("--target names the devices that --cluster describes; give one of them")
        return read_cluster(parsed.cluster)
    if not prefill and not decode:
        return LOCAL_CLUSTER
    if not prefill or not decode:
        parser.error("both phases need a device: give --target, or both --target-prefill and --target-decode")
    return cluster_of(prefill.split(","), decode.split(","))


if __name__ == "__main__":
    sys.exit(main())

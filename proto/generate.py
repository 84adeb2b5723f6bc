"""Write the Python side of the wire contracts into runtime/rpc (`make proto`); `--check` only compares."""

import argparse
import sys
import sysconfig
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
PROTOS = sorted((ROOT / "edgellm" / "v1").glob("*.proto"))
TARGET = ROOT.parent / "runtime" / "rpc"


def generate(folder: Path) -> dict[str, str]:
    """Run protoc into `folder`; return file name -> text, with imports moved to edgellm.runtime.rpc."""
    outputs = [f"--{kind}_out={folder}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    scripts = Path(sysconfig.get_path("scripts"))
    plugins = [f"--plugin=protoc-gen-{kind}={scripts}/protoc-gen-{kind}" for kind in ("mypy", "mypy_grpc")]
    includes = [f"-I{ROOT}", f"-I{resources.files('grpc_tools') / '_proto'}"]
    if protoc.main(["protoc", *includes, *plugins, *outputs, *map(str, PROTOS)]) != 0:
        raise SystemExit("protoc failed; its message is above")
    return {
        path.name: path.read_text()
        .replace("from edgellm.v1 import", "from edgellm.runtime.rpc import")
        .replace("import edgellm.v1.", "import edgellm.runtime.rpc.")
        .replace("edgellm.v1.inference_pb2.", "edgellm.runtime.rpc.inference_pb2.")
        .replace("edgellm.v1.cluster_pb2.", "edgellm.runtime.rpc.cluster_pb2.")
        .replace("edgellm.v1.kv_pb2.", "edgellm.runtime.rpc.kv_pb2.")
        for path in sorted((folder / "edgellm" / "v1").iterdir())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a committed file differs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = generate(Path(folder))
    if options.check:
        on_disk = {path.name: path.read_text() for path in TARGET.iterdir() if path.is_file()}
        stale = [name for name, text in files.items() if on_disk.get(name) != text]
        if stale:
            sys.exit(f"stale generated files in runtime/rpc: {', '.join(stale)}; run `make proto`")
        return
    for name, text in files.items():
        (TARGET / name).write_text(text)


if __name__ == "__main__":
    main()

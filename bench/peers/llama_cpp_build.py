"""llama.cpp compiled for this machine from the sources that llama-cpp-python carries: its library and llama-server.

The package would build the library alone; its own Python server answers one request at a time, and llama-server is
what llama.cpp offers for many. One line is changed: g++ removes the stores to the tile configuration that its AMX
code loads, because nothing it knows of reads them, and the first product then dies of a general protection fault.
"""

import re
import sys
from pathlib import Path
from typing import Final

_CONFIGURE: Final = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
)


def commands(folder: Path, requirements: str) -> list[list[str]]:
    """What to run, one after the other, in a folder with an environment in `venv`; two compilers at a time."""
    package = "llama-cpp-python==" + pinned_version(requirements)
    source, build = folder / "source", folder / "build"
    download = [
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        "llama-cpp-python",
        "--dest",
        str(folder / "download"),
        package,
    ]
    return [
        [str(folder / "venv" / "bin" / "python"), "-m", "pip", *download],
        [sys.executable, "-c", _UNPACK, str(folder / "download"), str(source)],
        [
            sys.executable,
            "-c",
            _KEEP_TILE_CONFIGURATION,
            str(source / "vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp"),
        ],
        ["cmake", "-S", str(source / "vendor" / "llama.cpp"), "-B", str(build), *_CONFIGURE],
        ["cmake", "--build", str(build), "--parallel", "2", "--target", "llama", "llama-server"],
    ]


_UNPACK: Final = """
import pathlib, shutil, sys
archive, = pathlib.Path(sys.argv[1]).glob("*.tar.gz")
target = pathlib.Path(sys.argv[2])
shutil.unpack_archive(archive, target.parent / "unpacked", filter="data")
shutil.rmtree(target, ignore_errors=True)
(target.parent / "unpacked" / archive.name.removesuffix(".tar.gz")).rename(target)
"""

_KEEP_TILE_CONFIGURATION: Final = """
import pathlib, sys
path = pathlib.Path(sys.argv[1])
load = "_tile_loadconfig(&tc);"
path.write_text(path.read_text().replace(load, 'asm volatile("" : : "r"(&tc) : "memory"); ' + load))
"""


def pinned_version(requirements: str) -> str:
    """Of llama-cpp-python in a requirements file."""
    found = re.search(r"^llama-cpp-python==(\S+)$", requirements, re.MULTILINE)
    if found is None:
        raise ValueError("the requirements do not pin llama-cpp-python")
    return found[1]


def variables(folder: Path) -> dict[str, str]:
    """Tell the Python package which library to load."""
    libraries = str(folder / "build" / "bin")
    return {"LLAMA_CPP_LIB_PATH": libraries, "LD_LIBRARY_PATH": libraries}


def server(folder: Path) -> Path:
    """The llama-server program."""
    return folder / "build" / "bin" / "llama-server"

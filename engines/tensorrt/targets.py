"""Which compute capability a device class has, and what each module can build for."""

import re
from typing import Any, Final

from edgellm.engines.tensorrt.api import Api, TensorRtError

_BOARDS: Final = {
    "orin-nx-16gb": (8, 7),
    "orin-nx-8gb": (8, 7),
    "orin-nano-8gb": (8, 7),
    "orin-nano-4gb": (8, 7),
}


def compute_capability(device_class: str) -> tuple[int, int]:
    """Major and minor version: a known board's, or the one that a class such as `sm86` names.

    Raises TensorRtError for a class without a GPU.
    """
    if device_class in _BOARDS:
        return _BOARDS[device_class]
    named = re.fullmatch(r"sm(\d+)(\d)", device_class)
    if named is None:
        raise TensorRtError(
            f"device class {device_class!r} has no GPU that TensorRT knows; "
            f"use one of {', '.join(_BOARDS)}, or sm86 and the like"
        )
    return int(named[1]), int(named[2])


def capability_text(capability: tuple[int, int]) -> str:
    """As engine.json has it: `8.7`."""
    return f"{capability[0]}.{capability[1]}"


def build_capability(api: Api, device_class: str) -> tuple[int, int]:
    """The compute capability that the module builds for when it is to run on a device class.

    RTX builds for named capabilities. One that it does not name gets the code of the highest named one of its major
    version below it, which such a device can run (CUDA: binaries of one major version run on later minors). `tensorrt`
    builds for the GPU it finds. Raises TensorRtError where nothing fits.
    """
    wanted = compute_capability(device_class)
    if not hasattr(api.trt, "ComputeCapability"):
        return wanted
    known = sorted(filter(None, map(_parse, api.trt.ComputeCapability.__members__)))
    usable = [each for each in known if each[0] == wanted[0] and each[1] <= wanted[1]]
    if not usable:
        names = ", ".join(f"sm{major}{minor}" for major, minor in known)
        raise TensorRtError(f"{api.version} cannot build for {device_class}; it builds for {names}")
    return usable[-1]


def set_target(api: Api, config: Any, device_class: str) -> tuple[int, int]:
    """Make a builder config build for a device class; return `build_capability`."""
    major, minor = build_capability(api, device_class)
    if not hasattr(api.trt, "ComputeCapability"):
        return major, minor
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(getattr(api.trt.ComputeCapability, f"SM{major}{minor}"), 0):
        raise TensorRtError(f"{api.version} refused the target sm{major}{minor}; its log says why")
    return major, minor


def _parse(member: str) -> tuple[int, int] | None:
    found = re.fullmatch(r"SM(\d+)(\d)", member)
    return None if found is None else (int(found[1]), int(found[2]))


def require_device(built_for: str, device: tuple[int, int]) -> None:
    """Raise TensorRtError unless code for compute capability `built_for`, such as `8.6`, runs on a device of another:
    of the same major version, and no lower a minor one."""
    major, minor = (int(part) for part in built_for.split("."))
    if device[0] != major or device[1] < minor:
        raise TensorRtError(
            f"this engine is for compute capability {built_for}, the GPU here has {capability_text(device)}; "
            f"rebuild the bundle with --target sm{device[0]}{device[1]}, or for this board's class"
        )

"""Instruction sets that this build has kernels for and this machine can run."""

from edgellm.engines.cpu import _native


def available() -> tuple[str, ...]:
    """Best first, "portable" last. Results are bit-identical within one instruction set, not between two."""
    return tuple(_native.available_isas())


def choose(name: str | None) -> str:
    """`name`, or the best there is. ValueError if this machine cannot run it."""
    names = available()
    if name is not None and name not in names:
        raise ValueError(f"instruction set {name!r} is not available here; choose one of {', '.join(names)}")
    return names[0] if name is None else name

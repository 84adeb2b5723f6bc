"""Pauses as bars, by context and by how a server goes on; ours marked."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from bench.chart import OURS_COLOUR, PEER_COLOUR


def require_matplotlib() -> None:
    """ValueError where it is not installed: to be called before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--chart needs matplotlib: pip install 'edgellm[bench]', or leave the chart out")


def draw(pauses: Sequence[tuple[str, int, float]], path: Path) -> None:
    """pauses: way, context in tokens, milliseconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.45 * len(pauses) + 1), layout="constrained")
    axes = figure.add_subplot()
    names = [f"{way}, {context} tokens" for way, context, _ in pauses]
    colours = [OURS_COLOUR if way == "hot copy" else PEER_COLOUR for way, _, _ in pauses]
    bars = axes.barh(names, [pause_ms for _, _, pause_ms in pauses], color=colours)
    axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds from the kill of a decode node to the next token at the client", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)

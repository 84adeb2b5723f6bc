"""Tokens per second of every engine as bars, a panel per model and scenario, ours marked."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.comparison import Compared
from bench.engine_report import OursRow, PeerRow, peer_rows

OURS_COLOUR: Final = "#1f6f4a"
PEER_COLOUR: Final = "#a9b4c2"
_COLUMNS: Final = 5


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One model in one scenario; bars from the fastest to the slowest."""

    title: str
    engines: tuple[str, ...]
    tokens_per_s: tuple[float, ...]
    is_ours: tuple[bool, ...]


def panels(ours: Sequence[OursRow], compared: Sequence[Compared]) -> list[Panel]:
    """One for each row of ours."""
    peers = peer_rows(compared)
    return [_panel(row, [p for p in peers if (p.model, p.scenario) == (row.model, row.scenario)]) for row in ours]


def draw(panels: Sequence[Panel], path: Path) -> bool:
    """Write the chart; False where matplotlib is not installed, or there is nothing to draw."""
    if importlib.util.find_spec("matplotlib") is None or not panels:
        return False
    from matplotlib.figure import Figure

    rows = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(4 * min(len(panels), _COLUMNS), 2.4 * rows), layout="constrained")
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(rows, min(len(panels), _COLUMNS), number + 1)
        colours = [OURS_COLOUR if is_ours else PEER_COLOUR for is_ours in panel.is_ours]
        bars = axes.barh(panel.engines, panel.tokens_per_s, color=colours)
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        axes.set_title(panel.title, fontsize=9)
        axes.margins(x=0.2)
        axes.invert_yaxis()
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("tokens per second", fontsize=9)
    figure.savefig(path)
    return True


def _panel(ours: OursRow, peers: Sequence[PeerRow]) -> Panel:
    rows: list[OursRow | PeerRow] = sorted([ours, *peers], key=lambda row: -row.tokens_per_s)
    return Panel(
        title=f"{ours.model}, {ours.scenario}",
        engines=tuple(row.engine for row in rows),
        tokens_per_s=tuple(row.tokens_per_s for row in rows),
        is_ours=tuple(row is ours for row in rows),
    )

"""How many layers each device of a pipeline gets. Pure."""

import math
from collections.abc import Callable
from functools import cache


def balance_layers(
    num_layers: int, num_devices: int, stage_s: Callable[[int, int, int], float]
) -> tuple[int, ...] | None:
    """Layers per device, at least one each, in order, such that the slowest stage is as fast as it can be.

    `stage_s(device, first, end)` is the time of layers first..end-1 on a device, infinite where they do not fit.
    None if nothing fits. Dynamic programming over (device, layers placed so far).
    """

    @cache
    def best(devices: int, layers: int) -> tuple[float, tuple[int, ...]]:
        """(slowest stage, layers per device) of the first `layers` layers on the first `devices` devices."""
        if devices == 0:
            return (0.0, ()) if layers == 0 else (math.inf, ())
        choices = (
            (max(slowest, stage_s(devices - 1, cut, layers)), (*counts, layers - cut))
            for cut in range(devices - 1, layers)
            for slowest, counts in [best(devices - 1, cut)]
        )
        return min(choices, key=lambda choice: choice[0], default=(math.inf, ()))

    slowest, counts = best(num_devices, num_layers)
    return None if math.isinf(slowest) else counts

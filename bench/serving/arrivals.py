"""When requests come: at random, independently of each other and of how fast they are answered."""

import random


def poisson(rate_per_s: float, duration_s: float, seed: int) -> list[float]:
    """Seconds from the start, ascending, of a Poisson process; the same for the same arguments."""
    chance = random.Random(seed)
    times, now_s = list[float](), chance.expovariate(rate_per_s)
    while now_s < duration_s:
        times.append(now_s)
        now_s += chance.expovariate(rate_per_s)
    return times

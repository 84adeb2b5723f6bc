"""Types of command-line numbers: argparse then names the option, the value and the range."""

import argparse
import math
from collections.abc import Callable


def integer_from(smallest: int, largest: int = 2**63 - 1) -> Callable[[str], int]:
    """A whole number in [smallest, largest]."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not smallest <= number <= largest:
            raise argparse.ArgumentTypeError(f"{number} is outside of {smallest} to {largest}")
        return number

    return parse


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number

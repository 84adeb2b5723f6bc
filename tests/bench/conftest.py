"""The benchmarks are no part of the package: they are found from the repository's root, and drivers in their folder."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench" / "peers" / "drivers")]

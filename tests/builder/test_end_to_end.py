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
from edgellm.engines.kv import BlockId, HostKvPool
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
BLOCKS = [BlockId(0), BlockId(1)]


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


@pytest.fixture(scope="module", params=["stories260k", "gptneox_stories"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module")
def text_options(c4_file: Path) -> tuple[str, ...]:
    """Text from a file, which is quicker than sampling it, and short windows to measure."""
    return ("--calib-data", str(c4_file), "--eval-data", str(c4_file), "--max-seq-len", "64")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished steps that several tests can use."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def staged_bundle(
    checkpoint: Path, text_options: tuple[str, ...], cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """One prefill engine, two decode stages and their takeover engine."""
    folder = tmp_path_factory.mktemp("staged")
    (folder / "cluster.toml").write_text(TWO_STAGES)
    inputs = ["--checkpoint", checkpoint, "--cluster", folder / "cluster.toml", *text_options]
    assert main([*map(str, inputs), "--output", str(folder / "bundle"), "--cache-dir", str(cache), "--no-verify"]) == 0
    return folder / "bundle"


def test_a_bundle_repeats_and_its_steps_are_reused(
    checkpoint: Path, text_options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = build(checkpoint, tmp_path / "first", tmp_path / "cache", *text_options, capsys=capsys)
    again = build(checkpoint, tmp_path / "again", tmp_path / "cache", *text_options, capsys=capsys)
    afresh = build(checkpoint, tmp_path / "afresh", tmp_path / "other cache", *text_options, capsys=capsys)
    assert first["sha256"] == again["sha256"] == afresh["sha256"] == bundle_sha256(tmp_path / "afresh")
    assert [step["step"] for step in first["steps"]] == [
        "calibration-text",
        "quantize",
        "compile-prefill-tp0of1",
        "compile-decode-pp0of1",
        "evaluation-text",
        "quality",
    ]
    assert {step["reused"] for step in again["steps"]} == {True}
    assert {step["reused"] for step in first["steps"] + afresh["steps"]} == {False}
    quality = first["bundle"]["quality"]
    assert quality["text"] == "c4-800.jsonl"
    assert (quality["windows"], quality["window_tokens"]) == (24, 64)
    assert quality["perplexity"]["half"] == pytest.approx(quality["perplexity"]["reference"], rel=0.01)
    assert quality["perplexity"]["int4"] == pytest.approx(quality["perplexity"]["reference"], rel=0.3)
    assert quality["kl_to_reference"]["half"] < quality["kl_to_reference"]["hybrid"] < 0.5


def test_a_changed_option_redoes_what_depends_on_it(
    stories260k: Path, text_options: tuple[str, ...], cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*text_options, "--no-verify")
    first = build(stories260k, tmp_path / "bundle", cache, *options, capsys=capsys)
    fewer = build(stories260k, tmp_path / "bundle", cache, *options, "--outliers", "8", capsys=capsys)
    assert first["sha256"] != fewer["sha256"]
    assert {step["step"]: step["reused"] for step in fewer["steps"]} == {
        "calibration-text": True,
        "quantize": False,
        "compile-prefill-tp0of1": True,
        "compile-decode-pp0of1": False,
    }


def test_without_a_file_the_text_is_sampled(
    stories260k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--precision-decode", "half", "--max-seq-len", "32")
    report = build(stories260k, tmp_path / "bundle", tmp_path / "cache", *options, capsys=capsys)
    assert report["bundle"]["quality"]["text"] == "sampled from the model, seed 1"
    assert report["bundle"]["quality"]["window_tokens"] == 32


def test_prompt_kv_goes_from_prefill_to_decode(staged_bundle: Path) -> None:
    prefill, decode = load(staged_bundle, "prefill-tp0of1", "decode-pp0of1")
    run([prefill], TOKENS[:-1])
    for layer in range(open_bundle(staged_bundle).kv.num_layers):
        decode.kv.write(BLOCKS, layer, prefill.kv.read(BLOCKS, layer))
    hybrid = run([decode], TOKENS[-1:], len(TOKENS) - 1)
    half = run([prefill], TOKENS[-1:], len(TOKENS) - 1)
    assert np.corrcoef(hybrid[0], half[0])[0, 1] > 0.98


def test_stages_give_the_bits_of_the_takeover_engine(staged_bundle: Path) -> None:
    names = ("prefill-tp0of1", "decode-pp0of2", "decode-pp1of2", "decode-pp0of1")
    assert open_bundle(staged_bundle).engines == names
    stages = load(staged_bundle, "decode-pp0of2", "decode-pp1of2")
    whole = load(staged_bundle, "decode-pp0of1")
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
        (
            {"backend": "tensorrt"},
            "tensorrt backend cpu-[0-9]+, this one is tensorrt|pip install 'edgellm.tensorrt.'",
        ),
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


def test_inspect_finds_a_flipped_bit_in_the_weights(spare_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = spare_bundle / "decode-pp0of1" / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert main(["inspect", str(spare_bundle)]) == 1
    assert "weights.bin is damaged" in capsys.readouterr().err

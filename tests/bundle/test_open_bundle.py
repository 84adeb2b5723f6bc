"""Opening a bundle: what was written is what is read, and damage of any kind is named."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgellm.engines.bundle import BundleError, bundle_sha256, engine_spec, open_bundle, verify_files

ENGINE = "decode-pp0of1"
WEIGHTS = f"{ENGINE}/weights.bin"


def test_what_was_written_is_read(bundle_path: Path) -> None:
    bundle = open_bundle(bundle_path)
    assert bundle.model.id == "model"
    assert bundle.engines == ("prefill-tp0of1", ENGINE)
    assert [file.name for file in bundle.files] == [
        "decode-pp0of1/engine.json",
        "prefill-tp0of1/engine.json",
        "tokenizer/tokenizer.json",
    ]
    spec = engine_spec(bundle_path, ENGINE)
    assert [(file.name, file.bytes) for file in spec.files] == [("plan.json", 15), ("weights.bin", 16384)]
    verify_files(bundle_path / ENGINE, spec.files)


def test_its_identity_is_the_hash_of_bundle_json(bundle_path: Path) -> None:
    assert bundle_sha256(bundle_path) == hashlib.sha256((bundle_path / "bundle.json").read_bytes()).hexdigest()


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    "file", ["tokenizer/tokenizer.json", "decode-pp0of1/engine.json", "prefill-tp0of1/engine.json"]
)
@pytest.mark.parametrize(
    ("damage", "message"),
    [(flip_a_byte, "is damaged"), (cut_short, "bytes, .* were written"), (remove, "No such file")],
)
def test_small_files_are_hashed_on_opening(
    bundle_path: Path, file: str, damage: Callable[[Path], None], message: str
) -> None:
    damage(bundle_path / file)
    with pytest.raises(BundleError, match=message) as refused:
        open_bundle(bundle_path)
    assert file in str(refused.value)
    assert "copy the bundle again, or rebuild it" in str(refused.value)


@pytest.mark.parametrize(("damage", "message"), [(cut_short, "16383 bytes, 16384 were written"), (remove, "No such")])
def test_weights_are_measured_on_opening(bundle_path: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(bundle_path / WEIGHTS)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle_path)


def test_weights_are_hashed_on_verifying(bundle_path: Path) -> None:
    flip_a_byte(bundle_path / WEIGHTS)
    open_bundle(bundle_path)
    with pytest.raises(BundleError, match=r"weights\.bin is damaged: sha256"):
        verify_files(bundle_path / ENGINE, engine_spec(bundle_path, ENGINE).files)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_schema_is_refused(bundle_path: Path, version: object) -> None:
    edit(bundle_path / "bundle.json", lambda fields: fields.update(schema_version=version))
    with pytest.raises(BundleError, match=f"schema version {version}, this version of EdgeLLM reads 1; rebuild"):
        open_bundle(bundle_path)


def test_another_schema_need_not_look_like_ours(bundle_path: Path) -> None:
    (bundle_path / "bundle.json").write_text('{"schema_version": 7, "parts": []}')
    with pytest.raises(BundleError, match="schema version 7"):
        open_bundle(bundle_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields.pop("kv"), "missing required field `kv`"),
        (lambda fields: fields.update(engines="decode"), "Expected `array`"),
        (lambda fields: fields["kv"].update(dtype="fp8"), "Invalid enum value 'fp8'"),
    ],
)
def test_fields_that_make_no_sense_are_named(
    bundle_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(bundle_path / "bundle.json", change)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_what_is_not_json(bundle_path: Path, text: str) -> None:
    (bundle_path / "bundle.json").write_text(text, encoding="latin-1")
    with pytest.raises(BundleError, match=r"bundle\.json cannot be understood"):
        open_bundle(bundle_path)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no bundle at .*nowhere: bundle\.json cannot be read"):
        open_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="no bundle at"):
        bundle_sha256(tmp_path)


def test_an_engine_that_is_not_there_is_named_with_those_that_are(bundle_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no engine 'decode-pp1of2' .* it has \['decode-pp0of1', 'prefill-tp0of1'\]"):
        engine_spec(bundle_path, "decode-pp1of2")


def test_a_renamed_engine_folder_is_noticed(bundle_path: Path) -> None:
    shutil.copytree(bundle_path / ENGINE, bundle_path / "decode-pp0of2")
    with pytest.raises(BundleError, match="describes engine 'decode-pp0of1'"):
        engine_spec(bundle_path, "decode-pp0of2")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", ""])
def test_files_outside_of_the_bundle_are_refused(bundle_path: Path, name: str) -> None:
    edit(bundle_path / "bundle.json", lambda fields: fields["files"][0].update(name=name))
    with pytest.raises(BundleError, match="which is outside of it"):
        open_bundle(bundle_path)


def test_engines_outside_of_the_bundle_are_refused(bundle_path: Path) -> None:
    """Though there is an engine, with the very name."""
    outside = bundle_path.parent / ENGINE
    shutil.copytree(bundle_path / ENGINE, outside)
    for name in (f"../{ENGINE}", str(outside)):
        edit(outside / "engine.json", lambda fields, name=name: fields.update(name=name))
        edit(bundle_path / "bundle.json", lambda fields, name=name: fields.update(engines=[name]))
        with pytest.raises(BundleError, match="which is outside of it"):
            open_bundle(bundle_path)

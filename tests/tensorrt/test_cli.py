"""edgellm-build with the TensorRT backend: a bundle for boards, a mixed one, and what inspect says of them."""

import json

import pytest

from edgellm.builder.cli import main
from edgellm.engines.bundle import open_bundle

pytestmark = pytest.mark.timeout(900)
"""Seven engines are built; on a machine that other work shares, that takes its time."""


@pytest.fixture(scope="module")
def build(stories260k, c4_file, tmp_path_factory):
    """build(name, *options) -> the bundle's folder; calibrated on a file, quality not measured."""
    root = tmp_path_factory.mktemp("bundles")
    common = ["--checkpoint", stories260k, "--calib-data", c4_file, "--max-seq-len", 128, "--no-verify"]

    def run(name, *options):
        folder = root / name
        given = [*common, "--output", folder, "--cache-dir", root / "cache", *options]
        assert main([str(argument) for argument in given]) == 0
        return folder

    return run


@pytest.fixture(scope="module")
def boards(api, build):
    targets = ["--target-prefill", "orin-nx-16gb", "--target-decode", "orin-nano-8gb,orin-nano-8gb"]
    return build("boards", "--backend", "tensorrt", *targets)


def inspected(bundle, capsys):
    capsys.readouterr()
    assert main(["inspect", str(bundle), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_prefill_engine_and_two_decode_stages(boards, api, capsys):
    shown = inspected(boards, capsys)
    specs = {spec["name"]: spec for spec in shown["engine_specs"]}
    assert list(specs) == ["prefill-tp0of1", "decode-pp0of2", "decode-pp1of2", "decode-pp0of1"]
    assert {spec["backend_version"] for spec in specs.values()} == {api.version}
    assert {spec["compute_capability"] for spec in specs.values()} == {"8.6"}
    assert specs["prefill-tp0of1"]["precision"] == "half"
    assert specs["decode-pp0of2"]["precision"] == "int4-g64-a16-o8"
    assert {name: spec["device_class"] for name, spec in specs.items()} == {
        "prefill-tp0of1": "orin-nx-16gb",
        "decode-pp0of2": "orin-nano-8gb",
        "decode-pp1of2": "orin-nano-8gb",
        "decode-pp0of1": "orin-nano-8gb",
    }
    prefill, first, last = (shown["networks"][name]["networks"][0] for name in list(specs)[:3])
    assert prefill["layers"]["rotary_embedding"] == 10
    assert "int4" in first["constant_bytes"]
    assert [tensor["name"] for tensor in first["inputs"][:2]] == ["tokens", "positions"]
    assert "hidden" in [tensor["name"] for tensor in first["outputs"]]
    assert "hidden" in [tensor["name"] for tensor in last["inputs"]]
    assert "logits" in [tensor["name"] for tensor in last["outputs"]]


def test_inspect_for_people(boards, capsys):
    capsys.readouterr()
    assert main(["inspect", str(boards)]) == 0
    shown = capsys.readouterr().out
    for words in ("orin-nano-8gb, code for sm86", "kv_cache_update 10", "int4 linears", "tokens int32 [-1, 1]"):
        assert words in shown


def test_backends_mix_under_one_contract(boards, build, capsys):
    mixed = build(
        "mixed",
        *("--backend-prefill", "tensorrt", "--target-prefill", "orin-nx-16gb", "--target-decode", "cpu-local"),
    )
    specs = {spec["phase"]: spec for spec in inspected(mixed, capsys)["engine_specs"]}
    assert (specs["prefill"]["backend"], specs["decode"]["backend"]) == ("tensorrt", "cpu")
    assert specs["decode"]["compute_capability"] is None
    assert specs["decode"]["precision"] == "int4-g64-a8-o32"
    assert open_bundle(mixed).kv == open_bundle(boards).kv

"""What edgellm-build says to what it cannot do: one line that names the value and the fix, and nothing left behind."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgellm.builder.cli import main


def refuse(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused build prints."""
    assert main([str(argument) for argument in arguments]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def options(tmp_path: Path) -> list[str | Path]:
    """Where to build to."""
    return ["--output", tmp_path / "bundle", "--cache-dir", tmp_path / "cache", "--no-verify"]


@pytest.mark.parametrize(
    "wrong",
    [
        ["--backend", "abacus"],
        ["--precision-prefill", "int4"],
        ["--precision-decode", "int2"],
        ["--group-size", "100"],
        ["--group-size", "many"],
        ["--act-bits", "7"],
        ["--outliers", "-2"],
        ["--outliers", "3"],
        ["--kv-dtype", "fp8"],
        ["--max-seq-len", "long"],
        ["--unknown"],
    ],
)
def test_values_that_make_no_sense(
    wrong: list[str], stories260k: Path, options: list[str | Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--checkpoint", str(stories260k), *map(str, options), *wrong])
    assert wrong[-1] in capsys.readouterr().err


def test_checkpoint_and_output_are_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "--checkpoint, --output" in capsys.readouterr().err


def test_a_backend_whose_device_is_not_there(
    stories260k: Path, options: list[str | Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """This machine has no GPU that it would plan for; without NVIDIA's module the refusal is another, as clear."""
    message = refuse("--checkpoint", stories260k, *options, "--backend", "tensorrt", capsys=capsys)
    assert "'cpu-local' has no GPU that TensorRT knows" in message or "no TensorRT here" in message


def test_targets_beside_a_cluster_file(stories260k: Path, options: list[str | Path], tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.toml"
    given = ["--checkpoint", stories260k, *options, "--cluster", cluster, "--target", "sm86"]
    with pytest.raises(SystemExit, match="2"):
        main([str(argument) for argument in given])


def test_a_target_for_one_phase_only(stories260k: Path, options: list[str | Path]) -> None:
    given = ["--checkpoint", stories260k, *options, "--target-decode", "sm86"]
    with pytest.raises(SystemExit, match="2"):
        main([str(argument) for argument in given])


def test_an_unknown_target(stories260k: Path, options: list[str | Path], capsys: pytest.CaptureFixture[str]) -> None:
    message = refuse("--checkpoint", stories260k, *options, "--target", "toaster", capsys=capsys)
    assert "'toaster'; the known classes are" in message


@pytest.mark.parametrize("length", ["513", "16", "0", "-1"])
def test_more_tokens_than_the_model_has_positions(
    length: str, stories260k: Path, options: list[str | Path], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refuse("--checkpoint", stories260k, *options, "--max-seq-len", length, capsys=capsys)
    assert f"--max-seq-len {length}: this model takes 32 to 512 tokens" in message


@pytest.mark.parametrize("shard", ["../stolen.safetensors", "/stolen.safetensors", "parts/../../stolen.safetensors"])
def test_a_shard_outside_of_the_checkpoint(
    shard: str, tmp_path: Path, options: list[str | Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    index = {"weight_map": {"model.norm.weight": shard}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refuse("--checkpoint", tmp_path / "model", *options, capsys=capsys)
    assert f"names the shard {shard!r}, which is outside of its folder" in message


def test_a_model_without_a_config(
    tmp_path: Path, options: list[str | Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    assert "config.json" in refuse("--checkpoint", tmp_path / "model", *options, capsys=capsys)


def copy_model(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
    return target


def test_an_unsupported_architecture_is_named(
    stories260k: Path, tmp_path: Path, options: list[str | Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = copy_model(stories260k, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"model_type": "mamba"}
    (model / "config.json").write_text(json.dumps(config))
    assert "'mamba'" in refuse("--checkpoint", model, *options, capsys=capsys)


def test_a_checkpoint_that_was_cut_short(
    stories260k: Path, tmp_path: Path, options: list[str | Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = copy_model(stories260k, tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in refuse("--checkpoint", model, *options, capsys=capsys)


@pytest.mark.parametrize("option", ["--calib-data", "--eval-data"])
def test_text_that_is_not_there(
    option: str, stories260k: Path, tmp_path: Path, options: list[str | Path], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refuse("--checkpoint", stories260k, *options, option, tmp_path / "text.jsonl", capsys=capsys)
    assert "text.jsonl is not a file; pass a .jsonl file" in message


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("short.txt", "Once upon a time.", "but at least 512 are needed; give more text"),
        ("wrong.jsonl", '{"title": "a"}', "line 1: not a JSON object with a string `text`"),
        ("text.csv", "a,b", "is a .jsonl file with `text` in each line, or a .txt file"),
    ],
)
def test_text_that_cannot_be_used(
    name: str,
    text: str,
    message: str,
    stories260k: Path,
    tmp_path: Path,
    options: list[str | Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / name).write_text(text)
    refused = main(["--checkpoint", str(stories260k), *map(str, options), "--calib-data", str(tmp_path / name)])
    assert refused == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_an_output_below_a_file(
    stories260k: Path, tmp_path: Path, options: list[str | Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("text")
    arguments = ["--output", tmp_path / "file" / "bundle", "--precision-decode", "half"]
    assert main([str(argument) for argument in ("--checkpoint", stories260k, *options, *arguments)]) == 1
    assert "cannot write to" in capsys.readouterr().err


def test_a_cluster_file_with_an_unknown_class(
    stories260k: Path, tmp_path: Path, options: list[str | Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text('[devices.a]\nclass = "toaster"\n[pools]\nprefill = ["a"]\ndecode = ["a"]')
    message = refuse("--checkpoint", stories260k, *options, "--cluster", file, capsys=capsys)
    assert "'toaster'; the known classes are cpu-local" in message


def test_a_device_that_is_too_small(
    stories260k: Path, tmp_path: Path, options: list[str | Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text('[devices.a]\nclass = "cpu-local"\nmemory_gib = 0.501\n[pools]\nprefill = ["a"]\ndecode = ["a"]')
    message = refuse("--checkpoint", stories260k, *options, "--cluster", file, capsys=capsys)
    assert "device 'a' (cpu-local) is too small: prefill-tp0of1 (weights 0 MiB, activations" in message
    assert "1 MiB usable (513 MiB less 512 MiB for the system)" in message


def test_an_output_that_is_something_else(
    stories260k: Path, tmp_path: Path, options: list[str | Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "thesis.tex").write_text("text")
    assert "exists and is not a bundle" in refuse("--checkpoint", stories260k, *options, capsys=capsys)
    assert (tmp_path / "bundle" / "thesis.tex").read_text() == "text"


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.parametrize("precision", ["half", "int4"])
def test_a_full_disk(
    precision: str, stories260k: Path, c4_file: Path, tmp_path: Path, options: list[str | Path]
) -> None:
    """A limit on the size of files stands for it: the system refuses the same writes."""
    inputs = ["--checkpoint", stories260k, "--calib-data", c4_file, "--precision-decode", precision]
    done = subprocess.run(
        [sys.executable, "-m", "edgellm.builder.cli", *inputs, *options],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        preexec_fn=limit_file_size,
    )
    assert done.returncode == 1
    assert "no space left while writing to" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "bundle").exists()
    assert list(tmp_path.rglob("*.tmp")) == []
    unfinished = [path for path in tmp_path.glob("cache/*/*") if not (path / "step.json").is_file()]
    assert unfinished == []

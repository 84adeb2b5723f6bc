"""Writing a bundle: all of it or nothing."""

import resource
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edgellm.builder.bundle_writer import CompiledEngine, write_bundle
from edgellm.builder.errors import BuildError
from edgellm.builder.files import _exchange, new_folder
from edgellm.engines.bundle import Bundle, bundle_sha256, open_bundle


def write_tokenizer(folder: Path) -> None:
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")


def refuse_to_write(_folder: Path) -> None:
    raise RuntimeError("no tokenizer")


def test_equal_bundles_are_equal_bytes(tmp_path: Path, bundle: Bundle, compiled: list[CompiledEngine]) -> None:
    paths = [tmp_path / "one", tmp_path / "two"]
    for path in paths:
        write_bundle(path, bundle, compiled, write_tokenizer)
    assert bundle_sha256(paths[0]) == bundle_sha256(paths[1])


def test_a_bundle_is_replaced(bundle_path: Path, bundle: Bundle, compiled: list[CompiledEngine]) -> None:
    write_bundle(bundle_path, bundle, compiled[:1], write_tokenizer)
    assert open_bundle(bundle_path).engines == ("prefill-tp0of1",)
    assert sorted(path.name for path in bundle_path.iterdir()) == ["bundle.json", "prefill-tp0of1", "tokenizer"]
    assert sorted(path.name for path in bundle_path.parent.iterdir()) == ["bundle", "compiled"]


def test_a_failure_leaves_the_old_bundle(bundle_path: Path, bundle: Bundle, compiled: list[CompiledEngine]) -> None:
    before = bundle_sha256(bundle_path)
    with pytest.raises(RuntimeError, match="no tokenizer"):
        write_bundle(bundle_path, bundle, compiled, refuse_to_write)
    assert bundle_sha256(bundle_path) == before
    open_bundle(bundle_path)
    assert sorted(path.name for path in bundle_path.parent.iterdir()) == ["bundle", "compiled"]


def test_nothing_is_visible_before_the_end(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with new_folder(target) as folder:
        (folder / "file").write_text("text")
        assert not target.exists()
    assert (target / "file").read_text() == "text"


def test_a_replaced_folder_is_there_all_the_time(tmp_path: Path) -> None:
    target, other = tmp_path / "target", tmp_path / "other"
    target.mkdir()
    other.mkdir()
    if not _exchange(target, other):
        pytest.skip("this file system cannot exchange two folders")
    (target / "file").write_text("text")
    stop, missing = threading.Event(), []

    def watch() -> None:
        while not stop.is_set():
            if not target.exists():
                missing.append(target)

    with ThreadPoolExecutor() as threads:
        watching = threads.submit(watch)
        for _ in range(100):
            with new_folder(target) as folder:
                (folder / "file").write_text("text")
        stop.set()
        watching.result()
    assert not missing


def test_a_folder_is_replaced_where_none_can_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A C library without renameat2 stands for all that cannot."""
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    for text in ("old", "new"):
        with new_folder(tmp_path / "target") as folder:
            (folder / "file").write_text(text)
    assert (tmp_path / "target" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_folder_that_is_no_bundle_is_left_alone(
    tmp_path: Path, bundle: Bundle, compiled: list[CompiledEngine]
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    for target in (tmp_path / "photos", tmp_path / "photos" / "cat.jpg"):
        with pytest.raises(BuildError, match="exists and is not a bundle"):
            write_bundle(target, bundle, compiled, write_tokenizer)
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "cat"


def test_an_empty_folder_may_become_a_bundle(tmp_path: Path, bundle: Bundle, compiled: list[CompiledEngine]) -> None:
    (tmp_path / "empty").mkdir()
    write_bundle(tmp_path / "empty", bundle, compiled, write_tokenizer)
    open_bundle(tmp_path / "empty")


WRITE_TOO_MUCH = """
    import sys
    from pathlib import Path
    from edgellm.builder.errors import BuildError
    from edgellm.builder.files import copy_files, list_files, new_folder

    source, target = map(Path, sys.argv[1:])
    try:
        with new_folder(target) as folder:
            copy_files(source, folder, list_files(source))
    except BuildError as error:
        print(error)
"""


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def test_a_disk_that_takes_no_more_bytes_is_named_and_left_clean(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the system refuses the same write."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "weights.bin").write_bytes(bytes(100_000))
    (tmp_path / "disk").mkdir()
    command = [sys.executable, "-c", textwrap.dedent(WRITE_TOO_MUCH), tmp_path / "source", tmp_path / "disk" / "bundle"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, preexec_fn=limit_file_size)
    assert "no space left while writing to" in done.stdout
    assert "choose another --output or --cache-dir" in done.stdout
    assert list((tmp_path / "disk").iterdir()) == []

"""A file is hashed once as long as it stays as it is; a changed one is found."""

import os
import time

import pytest

from edgellm.engines import verified
from edgellm.engines.bundle import BundleError, file_sha256
from edgellm.engines.spec import EngineFile
from edgellm.engines.verified import verify_once

OLD_NS = 10**9


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(range(256)) * 64)
    return path


@pytest.fixture
def files(weights):
    return [EngineFile(name=weights.name, bytes=weights.stat().st_size, sha256=file_sha256(weights))]


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that were hashed; every file counts as left alone."""
    names = []
    verify_files = verified.verify_files

    def counting(folder, files):
        names.extend(file.name for file in files)
        verify_files(folder, files)

    monkeypatch.setattr(verified, "verify_files", counting)
    monkeypatch.setattr(verified, "SETTLED_S", -1.0)
    return names


def flip_bit(path):
    """In place: the same inode and size."""
    with path.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 4]))


def test_a_known_file_is_not_hashed_again(tmp_path, weights, files, hashed):
    for _ in range(3):
        verify_once(tmp_path, files, records=tmp_path / "records")
    assert hashed == [weights.name]


def test_a_flipped_bit_is_found_after_a_record(tmp_path, weights, files, hashed):
    verify_once(tmp_path, files, records=tmp_path / "records")
    time.sleep(0.02)  # over the file system's tick
    flip_bit(weights)
    with pytest.raises(BundleError, match="damaged"):
        verify_once(tmp_path, files, records=tmp_path / "records")


def test_an_old_time_does_not_hide_a_flipped_bit(tmp_path, weights, files, hashed):
    """The time of the last write can be set back, the time of the last change cannot."""
    status = weights.stat()
    verify_once(tmp_path, files, records=tmp_path / "records")
    time.sleep(0.02)
    flip_bit(weights)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(BundleError, match="damaged"):
        verify_once(tmp_path, files, records=tmp_path / "records")


def test_another_expected_hash_is_not_known(tmp_path, files, hashed):
    verify_once(tmp_path, files, records=tmp_path / "records")
    other = [EngineFile(name=file.name, bytes=file.bytes, sha256="0" * 64) for file in files]
    with pytest.raises(BundleError, match="damaged"):
        verify_once(tmp_path, other, records=tmp_path / "records")


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, files):
    verify_once(tmp_path, files, records=tmp_path / "records")
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize("content", [b"", b"not json", b"{}"])
def test_damaged_records_are_ignored(tmp_path, weights, files, hashed, content):
    verify_once(tmp_path, files, records=tmp_path / "records")
    next((tmp_path / "records").iterdir()).write_bytes(content)
    verify_once(tmp_path, files, records=tmp_path / "records")
    assert hashed == [weights.name, weights.name]


def test_without_a_cache_folder_files_are_hashed(tmp_path, weights, files, hashed):
    (tmp_path / "records").write_bytes(b"a file where the folder should be")
    for _ in range(2):
        verify_once(tmp_path, files, records=tmp_path / "records")
    assert hashed == [weights.name, weights.name]

"""Results that are kept, and what of them a report may be made of."""

import argparse
import dataclasses
from pathlib import Path

import msgspec
import pytest

from bench import engine
from bench.comparison import Compared
from bench.installed_code import Conditions, conditions, kernels_sha256, peer_code
from bench.pairs import DECODE_1, DECODE_8
from bench.peers.contenders import PEERS, TRANSFORMERS
from bench.peers.models import MODELS
from bench.result_store import ResultStore, Wanted
from edgellm.engines.cpu.plan import BACKEND_VERSION
from tests.bench.comparisons import compared

NOW = Conditions(cpu="a processor", threads=2, real_time=True, backend_version="cpu-9")
CELL = Wanted(model=MODELS["134m"], peer=PEERS[0], scenario=DECODE_8)
OTHER = Wanted(model=MODELS["134m"], peer=PEERS[1], scenario=DECODE_1)


def result(cell: Wanted = CELL, ours_s: float = 1.0) -> Compared:
    measured = compared(cell.scenario, ours_s, 2, peer=PEERS.index(cell.peer), model=cell.model.name)
    return dataclasses.replace(measured, conditions=NOW, kernels_sha256="kernels", peer_code=peer_code(cell.peer))


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return ResultStore(folder=tmp_path / "engine")


def test_a_result_comes_back_as_it_was(store: ResultStore) -> None:
    store.write(result())
    assert store.read(CELL) == result()
    assert store.read(OTHER) is None


def test_the_newer_result_of_a_cell_counts(store: ResultStore) -> None:
    store.write(result())
    store.write(result(ours_s=0.5))
    assert store.read(CELL) == result(ours_s=0.5)
    assert len(list(store.folder.iterdir())) == 1


def test_results_of_several_runs_make_one_report(store: ResultStore) -> None:
    store.write(result())
    store.write(result(OTHER))
    gathered = store.gather([CELL, OTHER], NOW, "kernels")
    assert gathered.results == [result(), result(OTHER)]
    assert gathered.notes == []


def test_a_disturbed_run_displaces_no_result(store: ResultStore) -> None:
    assert store.write(result()) is None
    disturbed = dataclasses.replace(result(), pairing=None, reason="others used 40% of the processors")
    kept = store.write(disturbed)
    assert kept is not None
    assert "others used 40% of the processors; the result of 2026-01-01 10:00 is kept" in kept
    assert store.read(CELL) == result()
    assert store.write(dataclasses.replace(disturbed, peer=OTHER.peer, scenario=OTHER.scenario)) is None


def test_results_of_another_way_of_measuring_have_a_folder_of_their_own() -> None:
    parser = argparse.ArgumentParser()
    engine.add_arguments(parser)
    usual = [str(engine.USUAL_THREADS)]
    assert engine.folder_name(parser.parse_args(["--threads", *usual])) == "engine"
    assert engine.folder_name(parser.parse_args(["--even-if-busy"])) == "engine-though-busy"
    assert engine.folder_name(parser.parse_args(["--threads", "99", "--normal-priority"])) == (
        "engine-99-threads-normal-priority"
    )


def test_what_was_not_measured_is_said(store: ResultStore) -> None:
    assert store.gather([CELL], NOW, "kernels").notes == [f"not measured: {CELL.name}"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"backend_version": "cpu-10"}, "backend version cpu-9, now cpu-10"),
        ({"threads": 4}, "threads 2, now 4"),
        ({"cpu": "another"}, "cpu a processor, now another"),
    ],
)
def test_a_result_of_other_conditions_is_left_out_and_named(
    store: ResultStore, change: dict[str, object], said: str
) -> None:
    store.write(result())
    check_left_out(store, dataclasses.replace(NOW, **change), said)  # type: ignore[arg-type]


def check_left_out(store: ResultStore, now: Conditions, said: str) -> None:
    gathered = store.gather([CELL], now, "kernels")
    assert gathered.results == []
    assert gathered.notes == [f"left out: {CELL.name}, of 2026-01-01 10:00: {said}"]
    assert not store.is_current(CELL, now)


def test_a_result_of_other_kernels_is_named(store: ResultStore) -> None:
    store.write(result())
    gathered = store.gather([CELL], NOW, "faster kernels")
    assert gathered.results == [result()]
    assert gathered.notes == [f"with other kernels than now: {CELL.name}, of 2026-01-01 10:00"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"environment": "an older one"}, "another version of the peer than now"),
        ({"drivers_sha256": "an older one"}, "other drivers than now"),
    ],
)
def test_a_result_of_another_peer_is_left_out_and_named(store: ResultStore, change: dict[str, str], said: str) -> None:
    older = dataclasses.replace(peer_code(CELL.peer), **change)
    store.write(dataclasses.replace(result(), peer_code=older))
    check_left_out(store, NOW, said)


def test_a_result_that_does_not_say_its_peer_is_as_measured(store: ResultStore) -> None:
    store.write(result())
    (file,) = store.folder.iterdir()
    contents = msgspec.json.decode(file.read_bytes())
    del contents["peer_code"]
    file.write_bytes(msgspec.json.encode(contents))
    assert store.is_current(CELL, NOW)
    gathered = store.gather([CELL], NOW, "kernels")
    assert [one.peer_code for one in gathered.results] == [None]
    assert gathered.notes == ["not known of which versions of the peer and its driver: 1 of the results"]


def test_peers_are_told_apart_by_what_is_installed_and_what_drives_them() -> None:
    codes = {peer_code(peer) for peer in PEERS}
    assert len(codes) == len({(peer.environment, peer.driver) for peer in PEERS})
    assert "transformers" in peer_code(TRANSFORMERS).environment


def test_a_cell_without_figures_is_measured_again(store: ResultStore) -> None:
    assert not store.is_current(CELL, NOW)
    store.write(dataclasses.replace(result(), pairing=None, reason="others used 40% of the processors"))
    assert not store.is_current(CELL, NOW)
    store.write(result())
    assert store.is_current(CELL, NOW)


def test_a_damaged_file_is_no_result(store: ResultStore) -> None:
    store.write(result())
    (file,) = store.folder.iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    assert store.read(CELL) is None


def test_conditions_name_the_version_that_is_installed() -> None:
    assert conditions(threads=2, real_time=False).backend_version == BACKEND_VERSION
    assert len(kernels_sha256()) == 64

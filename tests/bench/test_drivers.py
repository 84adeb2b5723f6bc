"""Drivers as processes: what they answer, and what becomes of one that fails."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.peers import compiled
from bench.peers.contenders import DRIVERS, OURS, PEERS
from bench.peers.environments import PROJECT, Environment, UnavailableError, run
from bench.peers.process import DriverProcess, started, status_mib

HERE = Environment(name=PROJECT, python=Path(sys.executable), variables={}, key="test")


@pytest.fixture(scope="module")
def engine(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    compiled.write(stories260k, "int4", folder)
    return folder


@pytest.fixture
def driver() -> Iterator[DriverProcess]:
    with started(HERE, DRIVERS / OURS["int4"].driver) as process:
        yield process


def load(driver: DriverProcess, engine: Path) -> dict[str, object]:
    return driver.ask(
        do="load", model=str(engine), threads=1, max_batch=4, kv_tokens=2048, vocab_size=512, real_time=False
    )


class TestOurDriver:
    def test_it_loads_prefills_and_decodes(self, driver: DriverProcess, engine: Path) -> None:
        loaded = load(driver, engine)
        assert loaded["scheduler"] == "SCHED_OTHER"
        assert set(loaded) == {"load_s", "scheduler"}
        assert set(driver.ask(do="prefill", tokens=40)) == {"seconds"}
        for _ in range(2):
            assert driver.ask(do="decode", batch=3, context=33, steps=2)["seconds"] > 0
        assert driver.rss_mib() > 1

    def test_an_error_is_answered_and_the_next_request_served(self, driver: DriverProcess, engine: Path) -> None:
        load(driver, engine)
        with pytest.raises(UnavailableError, match="sequences"):
            driver.ask(do="decode", batch=33, context=1, steps=1)
        assert driver.ask(do="decode", batch=1, context=1, steps=1)["seconds"] > 0

    def test_an_unknown_request_is_named(self, driver: DriverProcess) -> None:
        with pytest.raises(UnavailableError, match="'dance' is not known"):
            driver.ask(do="dance")


def test_a_driver_that_dies_is_reported_with_its_last_words(tmp_path: Path) -> None:
    script = tmp_path / "broken_driver.py"
    script.write_text("raise SystemExit('no such instruction on this machine')")
    with started(HERE, script) as process, pytest.raises(UnavailableError, match="no such instruction"):
        process.ask(do="load")


def test_a_converter_that_fails_is_reported_with_its_last_words(tmp_path: Path) -> None:
    script = tmp_path / "broken_converter.py"
    script.write_text("raise SystemExit('no half-precision models')")
    with pytest.raises(UnavailableError, match=r"broken_converter failed: no half-precision models"):
        run(HERE, script, [])


def test_every_contender_has_its_driver_and_its_requirements() -> None:
    for contender in (*OURS.values(), *PEERS):
        assert (DRIVERS / contender.driver).is_file()
        assert contender.environment == PROJECT or requirements(contender.environment)


@pytest.mark.parametrize("name", ["llama_cpp", "onnx", "openvino", "vllm"])
def test_requirements_are_pinned(name: str) -> None:
    assert all("==" in line for line in requirements(name))


def requirements(name: str) -> list[str]:
    lines = (DRIVERS.parent / "requirements" / f"{name}.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_memory_is_read_from_the_process_status() -> None:
    assert status_mib("Name:\tx\nVmRSS:\t  2048 kB\n", "VmRSS") == 2
    with pytest.raises(ValueError, match="VmHWM"):
        status_mib("Name:\tx\n", "VmHWM")

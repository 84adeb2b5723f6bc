"""Finished steps are found again, unless an input changed or a file was damaged."""

from pathlib import Path

import pytest

from edgellm.builder.steps import StepCache, code_sha256

INPUTS = {"checkpoint": "a", "options": "b"}


class Counter:
    """A step that counts how often it ran."""

    def __init__(self) -> None:
        self.runs = 0

    def make(self, folder: Path) -> None:
        self.runs += 1
        (folder / "result").write_text(f"run {self.runs}")


def test_a_step_is_done_once(tmp_path: Path) -> None:
    counter = Counter()
    first = StepCache(tmp_path).run("step", INPUTS, counter.make)
    second = StepCache(tmp_path).run("step", INPUTS, counter.make)
    assert counter.runs == 1
    assert (first.reused, second.reused) == (False, True)
    assert (first.key, first.folder, first.files) == (second.key, second.folder, second.files)
    assert [file.name for file in second.files] == ["result"]


def test_any_changed_input_is_another_step(tmp_path: Path) -> None:
    counter, cache = Counter(), StepCache(tmp_path)
    keys = {
        cache.run(step, inputs, counter.make).key
        for step in ("step", "other")
        for inputs in (INPUTS, INPUTS | {"options": "c"}, {"checkpoint": "a"})
    }
    assert len(keys) == counter.runs == 6


@pytest.mark.parametrize("damage", [lambda path: path.write_text("else"), lambda path: path.unlink()])
@pytest.mark.parametrize("file", ["result", "step.json"])
def test_a_damaged_step_is_done_again(tmp_path: Path, damage: object, file: str) -> None:
    counter = Counter()
    folder = StepCache(tmp_path).run("step", INPUTS, counter.make).folder
    damage(folder / file)  # type: ignore[operator]
    assert not StepCache(tmp_path).run("step", INPUTS, counter.make).reused
    assert (folder / "result").read_text() == "run 2"
    assert StepCache(tmp_path).run("step", INPUTS, counter.make).reused


@pytest.mark.parametrize("damaged", [False, True])
def test_of_two_builds_the_first_to_finish_a_step_wins(tmp_path: Path, damaged: bool) -> None:
    if damaged:
        damaged_step = StepCache(tmp_path).run("step", INPUTS, Counter().make)
        (damaged_step.folder / "result").write_text("else")

    def make_late(folder: Path) -> None:
        StepCache(tmp_path).run("step", INPUTS, lambda other: (other / "result").write_text("first"))  # type: ignore[arg-type,return-value]
        (folder / "late").write_text("late")

    late = StepCache(tmp_path).run("step", INPUTS, make_late)
    assert [file.name for file in late.files] == ["result"]
    assert (late.folder / "result").read_text() == "first"
    assert list((tmp_path / "step").iterdir()) == [late.folder]


def test_a_step_asked_for_twice_counts_as_the_first_time(tmp_path: Path) -> None:
    counter, cache = Counter(), StepCache(tmp_path)
    results = [cache.run("step", INPUTS, counter.make) for _ in range(2)]
    assert cache.results == (results[0],)
    assert not results[1].reused


def test_a_step_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("failed")

    with pytest.raises(RuntimeError, match="failed"):
        StepCache(tmp_path).run("step", INPUTS, fail)
    assert list((tmp_path / "step").iterdir()) == []


def test_code_has_a_hash() -> None:
    assert code_sha256("edgellm.builder.models") == code_sha256("edgellm.builder.models")
    assert code_sha256("edgellm.builder.models") != code_sha256("edgellm.builder.checkpoint")

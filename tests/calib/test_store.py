import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edgellm.calib.store import StoredWeightsError, load_quantized, save_quantized


def test_what_is_loaded_is_what_was_saved(quantized, tmp_path: Path) -> None:
    graph, weights = quantized
    save_quantized(tmp_path / "new", graph, weights)
    loaded_graph, loaded = load_quantized(tmp_path / "new")
    assert loaded_graph == graph
    assert list(loaded) == list(weights)
    for name, weight in weights.items():
        assert type(loaded[name]) is type(weight)
        if isinstance(weight, np.ndarray):
            np.testing.assert_array_equal(loaded[name], weight)
            continue
        for field in dataclasses.fields(weight):
            np.testing.assert_array_equal(getattr(loaded[name], field.name), getattr(weight, field.name))


def test_equal_weights_make_equal_files(quantized, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_quantized(tmp_path / name, *quantized)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["graph.json", "weights.safetensors"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("damage", ["missing", "truncated", "no index", "bad index"])
def test_damaged_files_are_refused(stories, quantized, tmp_path: Path, damage: str) -> None:
    save_quantized(tmp_path, *quantized)
    arrays, index = tmp_path / "weights.safetensors", tmp_path / "graph.json"
    match damage:
        case "missing":
            arrays.unlink()
        case "truncated":
            arrays.write_bytes(arrays.read_bytes()[:-100])
        case "no index":
            index.unlink()
        case "bad index":
            index.write_text("{}")
    with pytest.raises(StoredWeightsError, match="does not hold quantised weights, remove it"):
        load_quantized(tmp_path)

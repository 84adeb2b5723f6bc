"""Frequencies of every kind of rope scaling against transformers', and both generations of config fields."""

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from edgellm.builder.models import UnsupportedModelError
from edgellm.builder.models.rope import frequencies, read_rope

HEAD_DIM = 64
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
    },
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048, "attention_factor": 1.5},
    {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 20,
        "beta_slow": 2,
        "truncate": False,
    },
]


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"])
def test_frequencies_equal_transformers(scaling: dict[str, Any], theta: float) -> None:
    fields = {**scaling, "rope_theta": theta}
    config = LlamaConfig(head_dim=HEAD_DIM, max_position_embeddings=16384, rope_parameters=dict(fields))
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, None)
    inv_freq, attention_factor = frequencies(
        read_rope({"rope_parameters": fields, "max_position_embeddings": 16384}, head_dim=HEAD_DIM)
    )
    np.testing.assert_allclose(inv_freq, expected.numpy(), rtol=1e-5)
    assert attention_factor == pytest.approx(factor)


@pytest.mark.parametrize("scaling", [{}, *SCALINGS], ids=lambda scaling: scaling.get("rope_type", "default"))
def test_old_fields_mean_the_same_as_new_ones(scaling: dict[str, Any]) -> None:
    new = {"rope_parameters": {"rope_theta": 7e5, **scaling}, "max_position_embeddings": 4096}
    old_scaling = {"type" if name == "rope_type" else name: value for name, value in scaling.items()}
    old = {"rope_theta": 7e5, "rope_scaling": old_scaling or None, "max_position_embeddings": 4096}
    assert read_rope(old, head_dim=HEAD_DIM) == read_rope(new, head_dim=HEAD_DIM)


def test_old_gpt_neox_fields() -> None:
    old = {"rotary_pct": 0.5, "rotary_emb_base": 5000}
    new = {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 5000}}
    assert read_rope(old, head_dim=HEAD_DIM) == read_rope(new, head_dim=HEAD_DIM, partial=0.25)
    assert read_rope(old, head_dim=HEAD_DIM).rotary_dim == HEAD_DIM // 2


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "proportional"])
def test_other_scalings_are_refused_by_name(kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match=kind):
        read_rope({"rope_scaling": {"type": kind, "factor": 2.0}}, head_dim=HEAD_DIM)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": -1}, "-1"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "high_freq_factor"),
        ({"full_attention": {"rope_type": "default"}}, "layer type"),
        ({"partial_rotary_factor": 0.0}, "0.0"),
    ],
)
def test_incomplete_settings_are_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        read_rope({"rope_parameters": fields}, head_dim=HEAD_DIM)

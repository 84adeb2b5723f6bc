"""Values that nothing can be sampled with are refused by field and value."""

import math
from typing import Any

import pytest

from edgellm.engines.sampling import SamplingError, SamplingParams


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": 1e-5}, "temperature is 1e-05"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": math.nan}, "min_p is nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty is nan"),
        ({"logit_bias": {5: math.nan}}, "logit_bias of token 5 is nan"),
        ({"logit_bias": {5: -math.inf}}, "logit_bias of token 5 is -inf"),
        ({"logit_bias": {-1: 1.0}}, "token id is -1"),
        ({"logit_bias": {100: 1.0}}, "token id is 100"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
    ],
)
def test_out_of_range(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(SamplingError, match=named):
        SamplingParams(**{"seed": 0} | fields).validate(vocab_size=100)


def test_the_edges_are_valid() -> None:
    for fields in ({}, {"temperature": 100.0, "top_p": 1.0, "min_p": 1.0}, {"logit_bias": {99: -1000.0, 0: 1000.0}}):
        SamplingParams(seed=2**64 - 1, **fields).validate(vocab_size=100)  # type: ignore[arg-type]

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgellm.calib.forward import TorchWeights, linear_groups, linear_inputs
from edgellm.calib.int4 import choose_outliers
from edgellm.calib.rounding import CompensatedRounding, round_to_levels, search_scales
from edgellm.engines.graph import Int4


def correlated(seed: int, rows: int, channels: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, channels, generator=generator) @ torch.randn(channels, channels, generator=generator)


@given(st.integers(0, 2**32 - 1))
def test_a_searched_scale_is_never_worse_than_the_plain_one(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, importance = torch.randn(6, 64, generator=generator), torch.rand(64, generator=generator)

    def error(scale: torch.Tensor) -> torch.Tensor:
        steps = scale.repeat_interleave(32, dim=1)
        return ((round_to_levels(weight, steps) * steps - weight).square() * importance).sum(1)

    plain = weight.view(6, 2, 32).abs().amax(-1) / 8
    assert (error(search_scales(weight, importance, 32)) <= error(plain) + 1e-6).all()


def test_a_zero_group_gets_a_scale_that_gives_zeros() -> None:
    scale = search_scales(torch.zeros(2, 32), torch.ones(32), 32)
    assert torch.isfinite(scale).all()
    assert (scale != 0).all()
    assert not round_to_levels(torch.zeros(2, 32), scale).any()


@pytest.mark.parametrize("kept", [[], [3, 40]])
def test_compensation_reduces_the_output_error(kept: list[int]) -> None:
    x, weight = correlated(0, 500, 64), correlated(1, 10, 64)
    columns = torch.tensor(kept, dtype=torch.int64)
    scale = search_scales(weight.index_fill(1, columns, 0), torch.ones(64), 32)
    steps = scale.repeat_interleave(32, dim=1)
    levels, kept_weight = CompensatedRounding(x.T @ x / 500, columns).round(weight, scale)
    assert levels.min() >= -8
    assert levels.max() <= 7
    assert not levels[:, columns].any()
    plain = (round_to_levels(weight, steps) * steps).index_copy(1, columns, weight[:, columns])
    compensated = (levels * steps).index_copy(1, columns, kept_weight)
    error_plain, error = ((x @ (w - weight).T).square().sum() for w in (plain, compensated))
    assert error < 0.6 * error_plain


def test_without_correlation_nothing_is_compensated() -> None:
    weight = correlated(2, 5, 64)
    scale = search_scales(weight, torch.ones(64), 64)
    levels, _ = CompensatedRounding(torch.eye(64), torch.empty(0, dtype=torch.int64)).round(weight, scale)
    assert torch.equal(levels, round_to_levels(weight, scale.repeat_interleave(64, dim=1)))


def test_outliers_are_the_channels_that_cost_most() -> None:
    weight, importance = correlated(3, 50, 64), torch.ones(64)
    importance[[5, 60]] = 1000
    chosen = choose_outliers(weight, importance, Int4(group_size=32, outliers=2))
    assert chosen.tolist() == [5, 60]


def test_the_graph_runs_as_transformers_does(small_model) -> None:
    """The input of every linear of every layer, against hooks in the Hugging Face model."""
    expected: dict[str, torch.Tensor] = {}
    modules = {name: m for name, m in small_model.torch_model.named_modules() if isinstance(m, torch.nn.Linear)}
    handles = [
        module.register_forward_pre_hook(lambda _m, args, name=name: expected.update({name: args[0].flatten(0, 1)}))
        for name, module in modules.items()
    ]
    with torch.inference_mode():
        small_model.torch_model(small_model.windows)
        found = list(linear_inputs(small_model.graph, TorchWeights(small_model.weights), small_model.windows))
    for handle in handles:
        handle.remove()
    assert [group for group, _ in found] == linear_groups(small_model.graph)
    for group, x in found:
        for op in group.linears:
            np.testing.assert_allclose(x, expected[small_model.source_of(op.weight).module], atol=2e-4, rtol=1e-3)

import dataclasses

import numpy as np
import pytest
import torch

from edgellm.calib.quantize import CalibrationError, quantize_int8
from edgellm.calib.recipe import LinearSource, QuantizeOptions, kept_at_int8
from edgellm.engines.graph import Embed, Graph, Int4, Int8, WeightName, linears, op_weights
from edgellm.engines.weights import Int4Weight, Int8Weight, Weight

Quantized = tuple[Graph, dict[WeightName, Weight]]


def round_to_nearest(weight: np.ndarray, group_size: int) -> np.ndarray:
    """int4 with max|w| / 7 as the scale of each group: what we have to beat."""
    groups = weight.reshape(len(weight), -1, group_size)
    scale = np.abs(groups).max(axis=2, keepdims=True) / 7
    return (np.clip(np.rint(groups / scale), -8, 7) * scale).reshape(weight.shape)


def layer_inputs(small_model, monkeypatch_target: dict[str, torch.Tensor]) -> None:
    """Fill in the input [tokens, in_features] of every linear of the model, by module name."""
    handles = [
        module.register_forward_pre_hook(
            lambda _module, args, name=name: monkeypatch_target.update({name: args[0].flatten(0, 1)})
        )
        for name, module in small_model.torch_model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.inference_mode():
        small_model.torch_model(torch.from_numpy(small_model.sample(4, 128, seed=77)))
    for handle in handles:
        handle.remove()


def test_every_weight_has_the_form_and_shape_of_its_op(quantized: Quantized, small_model) -> None:
    graph, weights = quantized
    assert set(weights) == {name for op in graph.ops for name in op_weights(op)}
    for op in linears(graph):
        weight = weights[op.weight]
        if isinstance(op.precision, Int4):
            assert isinstance(weight, Int4Weight)
            groups = op.in_features // op.precision.group_size
            assert weight.q.shape == (op.out_features, op.in_features)
            assert weight.q.min() == -8
            assert weight.q.max() == 7
            assert weight.scale.shape == (op.out_features, groups)
            assert weight.outlier_weight.shape == (op.out_features, op.precision.outliers)
            assert (np.diff(weight.outlier_columns) > 0).all()
            assert not weight.q[:, weight.outlier_columns].any()
        else:
            assert isinstance(weight, Int8Weight)
    embedding = next(op for op in graph.ops if isinstance(op, Embed))
    assert isinstance(weights[embedding.weight], Int8Weight)
    assert small_model.int4_linears(graph)


def test_norms_and_biases_are_the_checkpoints(quantized: Quantized, small_model) -> None:
    _, weights = quantized
    plain = {name: weight for name, weight in weights.items() if isinstance(weight, np.ndarray)}
    assert plain
    for name, weight in plain.items():
        np.testing.assert_array_equal(weight, small_model.weights[name])


def test_linears_with_one_input_share_scale_and_outliers(quantized: Quantized, small_model) -> None:
    graph, weights = quantized
    first: dict[str, Int4Weight] = {}
    for op in small_model.int4_linears(graph):
        weight = weights[op.weight]
        shared = first.setdefault(op.x, weight)
        np.testing.assert_array_equal(weight.input_scale, shared.input_scale)
        np.testing.assert_array_equal(weight.outlier_columns, shared.outlier_columns)
    assert len(first) < len(small_model.int4_linears(graph))
    assert any(weight.input_scale is not None for weight in first.values())


def test_outputs_are_nearer_than_round_to_nearest_ones_on_other_text(quantized: Quantized, small_model) -> None:
    graph, weights = quantized
    inputs: dict[str, torch.Tensor] = {}
    layer_inputs(small_model, inputs)
    ratios = []
    for op in small_model.int4_linears(graph):
        x = inputs[small_model.source_of(op.weight).module].numpy()
        original = small_model.weights[op.weight]

        def error(weight: np.ndarray, x: np.ndarray = x, original: np.ndarray = original) -> float:
            return float(np.square(x @ (weight - original).T).sum())

        ratios.append(
            error(weights[op.weight].dequantize()) / error(round_to_nearest(original, op.precision.group_size))
        )
    assert max(ratios) < 1
    assert np.mean(ratios) < 0.5


def test_the_same_inputs_give_the_same_bytes(quantized: Quantized, small_model) -> None:
    graph, weights = quantized
    graph_again, weights_again = small_model.quantize()
    assert graph_again == graph
    for name, weight in weights.items():
        again = weights_again[name]
        if isinstance(weight, np.ndarray):
            assert again.tobytes() == weight.tobytes()
        else:
            for field in dataclasses.fields(weight):
                np.testing.assert_array_equal(getattr(again, field.name), getattr(weight, field.name))


def test_linears_that_no_group_size_divides_stay_int8_and_are_reported(stories) -> None:
    graph, weights = stories.quantized()
    down = [op for op in linears(graph) if op.in_features == 172]
    assert len(down) == 5
    assert all(op.precision == Int8() and isinstance(weights[op.weight], Int8Weight) for op in down)
    reports = list(kept_at_int8(graph))
    assert len(reports) == 5
    assert "model.layers.0.mlp.down_proj.weight stays int8" in reports[0]
    assert "172" in reports[0]


def test_a_tied_table_is_one_weight(stories) -> None:
    graph, weights = stories.quantized()
    *_, head = linears(graph)
    assert head.weight == next(op for op in graph.ops if isinstance(op, Embed)).weight
    assert head.precision == Int8(act_bits=16)
    assert isinstance(weights[head.weight], Int8Weight)


def test_without_outliers_every_channel_is_int4(neox) -> None:
    graph, weights = neox.quantized(QuantizeOptions(outliers=0, group_size=32))
    for op in neox.int4_linears(graph):
        assert op.precision.group_size == 32
        assert weights[op.weight].outlier_weight.shape == (op.out_features, 0)


def test_int8_rows_are_within_half_a_step() -> None:
    weight = np.random.default_rng(0).normal(size=(5, 33)).astype(np.float32)
    weight[2] = 0
    table = quantize_int8(weight)
    assert np.abs(table.q).max() == 127
    assert (np.abs(table.dequantize() - weight) <= table.scale[:, None] * 0.5001).all()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("group_size", 48, "group size 48: must be one of 128, 64, 32"),
        ("outliers", 3, "3 outlier channels: must be an even number"),
        ("outliers", -2, "-2 outlier channels"),
        ("act_bits", 7, "activation bits 7: must be 4, 8 or 16"),
    ],
)
def test_bad_options_are_refused(field: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizeOptions(**{field: value})


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"torch.int64 \[3\]; they must be int64 \[count, tokens\]"),
        (torch.zeros((0, 8), dtype=torch.int64), "must be int64"),
        (torch.zeros((1, 8)), "torch.float32"),
        (torch.full((1, 8), 512), "token id 512 .* outside of the vocabulary of 512"),
        (torch.full((1, 8), -1), "token id -1"),
    ],
)
def test_bad_windows_are_refused(stories, windows: torch.Tensor, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        dataclasses.replace(stories, windows=windows).quantize()


def test_a_weight_of_another_checkpoint_is_refused(stories) -> None:
    name = WeightName("model.layers.0.self_attn.q_proj.weight")
    other = {**stories.weights, name: stories.weights[name] + 1}
    with pytest.raises(CalibrationError, match=r"q_proj.weight differs .* not the same checkpoint"):
        dataclasses.replace(stories, weights=other).quantize()


def test_a_source_that_the_model_does_not_have_is_refused(stories) -> None:
    broken = dataclasses.replace(stories, source_of=lambda _name: LinearSource(module="model.layers.9.q_proj"))
    with pytest.raises(CalibrationError, match=r"'model.layers.9.q_proj', which the model does not have"):
        broken.quantize()


def test_the_model_is_left_as_it_was(quantized: Quantized, small_model) -> None:
    names = dict(small_model.torch_model.named_modules())
    assert not any("quantizer" in name for name in names)
    for name, weight in small_model.weights.items():
        source = small_model.source_of(name)
        tensor = names[source.module].get_parameter(name.rpartition(".")[2]).detach().numpy()
        np.testing.assert_array_equal(tensor if source.rows is None else tensor[source.rows], weight)

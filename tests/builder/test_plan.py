"""Placements: never more than a device holds, every layer once, and a refusal that shows the sum."""

import dataclasses
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgellm.builder.assignment import PlanError
from edgellm.builder.cluster import LOCAL_CLUSTER, Cluster, Device, parse_cluster
from edgellm.builder.costs import engine_costs
from edgellm.builder.models import build_graph, read_config
from edgellm.builder.plan import BuildPlan, PlanInputs, make_plan, precision_label
from edgellm.calib.recipe import QuantizeOptions, quantized_graph
from edgellm.engines.bundle import Placement
from edgellm.engines.kv import KvContract

MIB = 1 << 20

QWEN3_1_7B_SHAPE = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def inputs(cluster: Cluster, *, max_seq_len: int = 1024, **shape: int) -> PlanInputs:
    """A Llama, small unless `shape` says otherwise, quantised for decode."""
    small = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "vocab_size": 1024,
    }
    config = read_config(QWEN3_1_7B_SHAPE | small | shape)
    graph = build_graph(config)
    return PlanInputs(
        cluster=cluster,
        prefill_graph=graph,
        decode_graph=quantized_graph(graph, QuantizeOptions(outliers=16)),
        contract=KvContract(num_layers=config.num_layers, kv_heads=config.kv_heads, head_dim=config.head_dim),
        max_seq_len=max_seq_len,
        max_sequences={"prefill": 64, "decode": 64},
    )


def device(name: str, usable_bytes: int, *, bytes_per_s: float = 4e10) -> Device:
    return Device(
        name=name,
        device_class="cpu-local",
        usable_bytes=usable_bytes,
        reserved_bytes=0,
        flops_per_s=1e12,
        bytes_per_s=bytes_per_s,
        link_bytes_per_s=1e8,
        link_latency_s=1e-3,
    )


def used_bytes(given_inputs: PlanInputs, planned: BuildPlan, placement: Placement) -> int:
    """What a placement takes of its device, added up from the engine's graph alone."""
    engine = next(engine for engine in planned.engines if engine.name == placement.engine)
    costs = engine_costs(engine.graph, given_inputs.contract, engine.limits)
    assert placement.weight_bytes == costs.weight_bytes
    return costs.weight_bytes + costs.activation_bytes + placement.kv_blocks * costs.kv_block_bytes


memories = st.integers(1, 120).map(lambda mib: mib * MIB)


@settings(max_examples=60, deadline=None)
@given(prefill=st.lists(memories, min_size=1, max_size=3), decode=st.lists(memories, min_size=1, max_size=4))
def test_what_is_planned_fits_and_covers_every_layer_once(prefill: list[int], decode: list[int]) -> None:
    devices = [device(f"d{index}", memory) for index, memory in enumerate(decode)]
    prefill_devices = [device(f"p{index}", memory) for index, memory in enumerate(prefill[:-1])]
    shared = devices[0] if prefill[-1] % 2 else device("p", prefill[-1])
    given_inputs = inputs(Cluster(prefill=(*prefill_devices, shared), decode=tuple(devices)))
    try:
        planned = make_plan(given_inputs)
    except PlanError:
        assume(False)
        return
    placements, takeover = planned.plan.placements, planned.plan.takeover
    stages = [placement for placement in placements if placement.role == "decode"]
    assert [layer for stage in stages for layer in range(stage.first_layer, stage.first_layer + stage.num_layers)] == [
        *range(6)
    ]
    for each in {*devices, *prefill_devices, shared}:
        serving = [placement for placement in placements if placement.device == each.name]
        staying = [placement for placement in serving if placement.role == "prefill"]
        taken_over = [placement for placement in takeover if placement.device == each.name]
        for together in (serving, [*staying, *taken_over]):
            assert sum(used_bytes(given_inputs, planned, placement) for placement in together) <= each.usable_bytes
    assert all(placement.kv_tokens >= 1024 for placement in (*placements, *takeover))
    assert {placement.engine for placement in (*placements, *takeover)} == {engine.name for engine in planned.engines}


def test_the_local_machine_gets_both_phases() -> None:
    planned = make_plan(inputs(LOCAL_CLUSTER))
    assert [engine.name for engine in planned.engines] == ["prefill-tp0of1", "decode-pp0of1"]
    assert [placement.precision for placement in planned.plan.placements] == [
        "half",
        precision_label(inputs(LOCAL_CLUSTER).decode_graph),
    ]
    assert planned.notes == ()
    assert planned == make_plan(inputs(LOCAL_CLUSTER))


def test_a_refusal_shows_arithmetic_that_adds_up() -> None:
    small = Cluster(prefill=(device("big", 1 << 30),), decode=(device("tiny", 3 * MIB),))
    with pytest.raises(PlanError) as refused:
        make_plan(inputs(small))
    message = str(refused.value)
    assert message.startswith("device 'tiny' (cpu-local) is too small: decode-pp0of1 (weights 2 MiB")
    parts = [int(number) for number in re.findall(r"(?:weights|activations|tokens) (\d+) MiB", message)]
    needed = int(re.search(r"= (\d+) MiB needed", message)[1])  # type: ignore[index]
    assert abs(sum(parts) - needed) <= 2
    assert needed > 3
    assert "3 MiB usable (3 MiB less 0 MiB for the system)" in message
    assert "--max-seq-len" in message


def test_prefill_is_cut_into_ranks_only_where_one_device_is_too_small() -> None:
    decode = (device("d", 1 << 30),)
    roomy = tuple(device(f"p{index}", 1 << 30) for index in range(2))
    planned = make_plan(inputs(Cluster(prefill=roomy, decode=decode)))
    assert [placement.engine for placement in planned.plan.placements[:2]] == ["prefill-tp0of1", "prefill-tp0of1"]
    whole_bytes = planned.plan.placements[0].weight_bytes
    tight = tuple(device(f"p{index}", whole_bytes + 12 * MIB) for index in range(2))
    planned = make_plan(inputs(Cluster(prefill=tight, decode=decode), max_seq_len=4096))
    assert [placement.engine for placement in planned.plan.placements[:2]] == ["prefill-tp0of2", "prefill-tp1of2"]
    assert planned.plan.placements[0].weight_bytes < whole_bytes


def test_a_prefill_pool_of_two_classes_is_refused() -> None:
    odd = dataclasses.replace(device("q", 1 << 30), device_class="orin-nx-8gb")
    with pytest.raises(PlanError, match="mixes cpu-local and orin-nx-8gb"):
        make_plan(inputs(Cluster(prefill=(device("p", 1 << 30), odd), decode=(odd,))))


def test_more_decode_devices_than_layers_are_refused() -> None:
    pool = tuple(device(f"d{index}", 1 << 30) for index in range(7))
    with pytest.raises(PlanError, match="7 devices for 6 layers"):
        make_plan(inputs(Cluster(prefill=pool[:1], decode=pool)))


def test_a_faster_device_gets_more_layers() -> None:
    pool = (device("fast", 1 << 30, bytes_per_s=4e10), device("slow", 1 << 30, bytes_per_s=1e10))
    planned = make_plan(inputs(Cluster(prefill=pool[:1], decode=pool)))
    stages = {placement.device: placement for placement in planned.plan.placements if placement.role == "decode"}
    assert stages["fast"].num_layers > stages["slow"].num_layers


def test_stages_come_with_a_takeover_engine() -> None:
    pool = tuple(device(f"d{index}", 1 << 30) for index in range(3))
    planned = make_plan(inputs(Cluster(prefill=(device("p", 1 << 30),), decode=pool)))
    assert [engine.name for engine in planned.engines] == [
        "prefill-tp0of1",
        "decode-pp0of3",
        "decode-pp1of3",
        "decode-pp2of3",
        "decode-pp0of1",
    ]
    takeovers = planned.plan.takeover
    assert [placement.device for placement in takeovers] == ["d0", "d1", "d2", "p"]
    assert all(placement.num_layers == 6 for placement in takeovers)


def test_no_room_for_a_takeover_engine_is_said() -> None:
    whole = make_plan(inputs(LOCAL_CLUSTER, intermediate_size=4096)).plan.placements[1]
    pool = tuple(device(f"d{index}", whole.weight_bytes + 9 * MIB) for index in range(2))
    cluster = Cluster(prefill=(device("p", 66 * MIB),), decode=pool)
    planned = make_plan(inputs(cluster, max_seq_len=128, intermediate_size=4096))
    assert planned.plan.takeover == ()
    assert "no takeover engine" in planned.notes[0]


PUBLISHED = """
[devices.nx]
class = "orin-nx-16gb"
watts = 40
[devices.nano]
class = "orin-nano-8gb"
[pools]
prefill = ["nx"]
decode = ["{decode}"]
"""


@pytest.mark.parametrize(("decode", "tokens_per_s"), [("nx", 60.4), ("nano", 37.4)])
def test_predictions_are_near_published_measurements(decode: str, tokens_per_s: float) -> None:
    """TensorRT Edge-LLM, Qwen3-1.7B INT4-AWQ, batch 1."""
    text = PUBLISHED.format(decode=decode)
    text = text if decode == "nano" else text.replace('[devices.nano]\nclass = "orin-nano-8gb"\n', "")
    shape = {key: value for key, value in QWEN3_1_7B_SHAPE.items() if isinstance(value, int)}
    planned = make_plan(inputs(parse_cluster(text), **shape))
    assert 1e3 / planned.plan.predicted_tpot_ms == pytest.approx(tokens_per_s, rel=0.12)


def test_precision_labels() -> None:
    graph = build_graph(read_config(QWEN3_1_7B_SHAPE | {"hidden_size": 576, "head_dim": 36}))
    assert precision_label(graph) == "half"
    assert precision_label(quantized_graph(graph, QuantizeOptions(outliers=4))) == "int4-g64/128-a8-o4"

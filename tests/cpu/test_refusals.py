"""What the CPU backend cannot or must not run is refused with the value and the bound, before anything is computed."""

import json
from dataclasses import replace

import numpy as np
import pytest

from edgellm.engines.cpu.compiler import PLAN_FILE, WEIGHTS_FILE, compile_engine
from edgellm.engines.cpu.engine import CpuEngine
from edgellm.engines.graph import AllReduce, Half, Int4, Int8, TensorName
from edgellm.engines.kv import HostKvPool
from edgellm.engines.reference import reference_spec
from edgellm.engines.weights import Int8Weight


@pytest.fixture(scope="module")
def model(kit):
    return kit.model("llama", Half(), kit.sizes())


@pytest.fixture
def folder(kit, model, tmp_path):
    compile_engine(model.graph, model.weights, contract=kit.contract_of(model), limits=kit.limits, folder=tmp_path)
    return tmp_path


@pytest.fixture
def pool(loader, model):
    return loader.pool(model, model.graph)


def load(kit, model, folder, pool, **options):
    return CpuEngine(folder, reference_spec(model.graph, kit.limits), pool=pool, **options)


def chunk(kit, **changes):
    return kit.chunk(**{"tokens": np.arange(40), "first_position": 0, "blocks": [0, 1]} | changes)


WRONG_BATCHES = {
    "token 101": ({"tokens": np.array([3, 101])}, "token id 101 is outside of the vocabulary of 101"),
    "negative token": ({"tokens": np.array([-1])}, "token id -1"),
    "too many rows": ({"tokens": np.zeros(161, int), "blocks": [*range(6)]}, "161 rows .* at most 160"),
    "block 40": ({"blocks": [0, 40]}, "names block 40; the pool has 40"),
    "no block": ({"blocks": [0]}, "40 tokens but only 1 blocks"),
    "padding as block": ({"blocks": [0, -1]}, "block -1"),
    "too long": ({"first_position": 180, "blocks": [*range(7)]}, "220 tokens; this engine takes at most 192"),
    "negative position": ({"first_position": -1}, "first position -1"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG_BATCHES.values(), ids=WRONG_BATCHES)
def test_wrong_batches(kit, loader, model, pool, changes, message):
    engine = loader.cpu(model, isa="portable", pool=pool)
    before = pool.data.copy()
    with pytest.raises(ValueError, match=message):
        engine.forward(kit.batch_of([chunk(kit, **changes)]))
    np.testing.assert_array_equal(pool.data, before)


def test_hidden_states_for_a_first_stage(kit, loader, model):
    engine = loader.cpu(model, isa="portable")
    with pytest.raises(ValueError, match="takes tokens"):
        engine.forward(kit.batch_of([chunk(kit)], hidden=np.zeros((40, 64), np.float32)))


def test_hidden_states_of_another_width(kit, loader, model):
    engine = loader.cpu(model, model.stages(1)[1], isa="portable")
    with pytest.raises(ValueError, match=r"hidden has shape \(40, 63\), needs \[rows, 64\]"):
        engine.forward(kit.batch_of([chunk(kit)], hidden=np.zeros((40, 63), np.float32)))


def test_a_closed_engine(kit, loader, model):
    engine = loader.cpu(model, isa="portable")
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.forward(kit.batch_of([chunk(kit)]))


@pytest.mark.parametrize("change", [-1, 1], ids=["truncated", "longer"])
def test_weights_of_another_size(kit, model, folder, pool, change):
    weights = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(weights[:-64] if change < 0 else weights + bytes(64))
    with pytest.raises(ValueError, match=f"{len(weights) + 64 * change} bytes, its plan says {len(weights)}"):
        load(kit, model, folder, pool)


@pytest.mark.parametrize(
    "damage", [lambda text: text[:-20], lambda text: text.replace("NormOp", "Norm"), lambda _: "[]"]
)
def test_damaged_plans(kit, model, folder, pool, damage):
    plan = folder / PLAN_FILE
    plan.write_text(damage(plan.read_text()))
    with pytest.raises(ValueError, match=r"plan\.json is damaged .* rebuild it with edgellm-build"):
        load(kit, model, folder, pool)


def test_a_plan_of_another_version(kit, model, folder, pool):
    plan = json.loads((folder / PLAN_FILE).read_text())
    (folder / PLAN_FILE).write_text(json.dumps(plan | {"backend_version": "cpu-0"}))
    with pytest.raises(ValueError, match="is for cpu-0"):
        load(kit, model, folder, pool)


def test_a_segment_outside_of_the_weights(kit, model, folder, pool):
    plan = json.loads((folder / PLAN_FILE).read_text())
    plan["ops"][0]["table"]["offset"] = plan["weights_bytes"]
    (folder / PLAN_FILE).write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=r"plan\.json is damaged .*outside"):
        load(kit, model, folder, pool)


def test_a_pool_of_another_contract(kit, model, folder):
    other = HostKvPool(replace(kit.contract_of(model), dtype="int8"), range(2), 4)
    with pytest.raises(ValueError, match="int8"):
        load(kit, model, folder, other)


def test_longer_sequences_than_compiled_for(kit, model, folder, pool):
    limits = replace(kit.limits, max_seq_len=193)
    with pytest.raises(ValueError, match="max_seq_len 193"):
        CpuEngine(folder, reference_spec(model.graph, limits), pool=pool)


@pytest.mark.parametrize("options", [{"isa": "sse9"}, {"isa": "reference"}, {"threads": 0}])
def test_options(kit, model, folder, pool, options):
    with pytest.raises(ValueError, match=str(*options.values())):
        load(kit, model, folder, pool, **options)


def compile_changed(kit, model, tmp_path, *, graph=None, **weights):
    compile_engine(
        graph or model.graph,
        model.weights | weights,
        contract=kit.contract_of(model),
        limits=kit.limits,
        folder=tmp_path,
    )


def test_a_sum_over_ranks_of_what_others_read(kit, model, tmp_path):
    ops = (*model.graph.ops, AllReduce(out=TensorName("sum"), x=model.graph.output, size=101))
    with pytest.raises(ValueError, match=r"AllReduce 'sum': .* sums in place"):
        compile_changed(kit, model, tmp_path, graph=replace(model.graph, ops=ops))


def test_a_rank_alone(kit, model, loader, pool):
    ops = (*model.graph.ops, AllReduce(out=TensorName("sum"), x=model.graph.output, size=101))
    graph = replace(model.graph, ops=ops, output=TensorName("sum"))
    with pytest.raises(ValueError, match="reference is tensor-parallel rank 0 of 1: it runs in a group"):
        loader.cpu(model, graph, isa="portable", pool=pool)


def test_a_weight_of_another_form(kit, model, tmp_path):
    weight = Int8Weight(q=np.zeros((64, 64), np.int8), scale=np.ones(64, np.float32))
    with pytest.raises(ValueError, match=r"'layer0\.o\.weight' is a Int8Weight, its op asks for Half"):
        compile_changed(kit, model, tmp_path, **{"layer0.o.weight": weight})


def test_a_weight_of_another_shape(kit, model, tmp_path):
    with pytest.raises(ValueError, match=r"'layer0.o.weight' has shape \[64, 63\], its op needs \[64, 64\]"):
        compile_changed(kit, model, tmp_path, **{"layer0.o.weight": np.zeros((64, 63), np.float32)})


def test_a_missing_weight(kit, model, tmp_path):
    weights = {name: weight for name, weight in model.weights.items() if name != "final.weight"}
    with pytest.raises(ValueError, match=r"no weight 'final\.weight'"):
        compile_engine(model.graph, weights, contract=kit.contract_of(model), limits=kit.limits, folder=tmp_path)


def test_a_contract_of_another_model(kit, model, tmp_path):
    contract = replace(kit.contract_of(model), kv_heads=2)
    with pytest.raises(ValueError, match="layer 0 has 4 KV heads of 8, the KV contract has 2 of 8"):
        compile_engine(model.graph, model.weights, contract=contract, limits=kit.limits, folder=tmp_path)


def test_input_scales_that_differ(kit, tmp_path):
    model = kit.model("llama", Int4(group_size=32), kit.sizes(intermediate=160))
    changed = replace(model.weights["layer1.k.weight"], input_scale=None)
    with pytest.raises(ValueError, match=r"'layer1.k.weight' has another input_scale than 'layer1.q.weight'"):
        compile_changed(kit, model, tmp_path, **{"layer1.k.weight": changed})


def test_a_group_that_does_not_divide(kit, tmp_path):
    model = kit.model("llama", Int8(), kit.sizes())
    ops = tuple(
        replace(op, precision=Int4(group_size=24)) if getattr(op, "out", "") == "layer0.o" else op
        for op in model.graph.ops
    )
    int4 = kit.model("llama", Int4(group_size=32), kit.sizes(intermediate=160)).weights["layer0.o.weight"]
    with pytest.raises(ValueError, match="group size 24 must be a multiple of 8 that divides 64"):
        compile_changed(
            kit,
            model,
            tmp_path,
            graph=replace(model.graph, ops=ops),
            **{"layer0.o.weight": replace(int4, group_size=24)},
        )

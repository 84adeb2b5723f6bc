"""What does not fit is refused, with the value and what to do."""

import dataclasses

import numpy as np
import pytest

from edgellm.builder.partition import shard
from edgellm.engines.bundle import BundleError
from edgellm.engines.kv import HostKvPool
from edgellm.engines.load import create_engine
from edgellm.engines.reference import reference_spec
from edgellm.engines.spec import EngineLimits
from edgellm.engines.tensorrt.api import TensorRtError, find_api
from edgellm.engines.tensorrt.compiler import compile_engine
from edgellm.engines.tensorrt.device import open_cuda
from edgellm.engines.tensorrt.load import load_engine
from edgellm.engines.tensorrt.manifest import EngineManifest, read_manifest, write_manifest
from edgellm.engines.tensorrt.packing import pack_nibbles, to_half
from edgellm.engines.tensorrt.targets import build_capability, compute_capability, require_device

LIMITS = EngineLimits(max_rows=64, max_sequences=4, max_seq_len=128)


def compile_model(api, model, folder, **changes):
    options = {"contract": model.contract, "phase": "decode", "device_class": "sm86", "weights": model.weights}
    return compile_engine(model.graph, limits=LIMITS, world=1, folder=folder, api=api, **options | changes)


def test_kv_in_int8(kit, api, tmp_path):
    model = kit.model("llama, tied", "half")
    with pytest.raises(ValueError, match="--kv-dtype half"):
        compile_model(api, model, tmp_path, contract=dataclasses.replace(model.contract, dtype="int8"))


def test_another_contract(kit, api, tmp_path):
    model = kit.model("llama, tied", "half")
    with pytest.raises(ValueError, match="KV contract has 3"):
        compile_model(api, model, tmp_path, contract=dataclasses.replace(model.contract, kv_heads=3))


def test_int8_activations(kit, api, tmp_path):
    model = kit.model("llama, tied", "int4", act_bits=8)
    with pytest.raises(ValueError, match="--act-bits 16"):
        compile_model(api, model, tmp_path)


def test_weights_that_do_not_fit(kit, api, tmp_path):
    model = kit.model("llama, tied", "half")
    name = "model.layers.0.mlp.up_proj.weight"
    for weight, message in ((np.zeros((3, 64), np.float32), "needs"), (np.full((128, 64), 1e5, np.float32), "65504")):
        with pytest.raises(ValueError, match=message):
            compile_model(api, model, tmp_path, weights=model.weights | {name: weight})
    missing = {key: value for key, value in model.weights.items() if key != name}
    with pytest.raises(ValueError, match="no weight"):
        compile_model(api, model, tmp_path, weights=missing)


def test_device_classes(api):
    assert compute_capability("orin-nx-8gb") == (8, 7)
    assert compute_capability("sm120") == (12, 0)
    assert build_capability(api, "orin-nano-8gb") == (8, 6)
    with pytest.raises(TensorRtError, match="'cpu-local' has no GPU"):
        compute_capability("cpu-local")
    with pytest.raises(TensorRtError, match="cannot build for sm90; it builds for sm75"):
        build_capability(api, "sm90")


def test_code_runs_on_later_minor_versions_only():
    require_device("8.6", (8, 7))
    for device in ((8, 0), (9, 0), (7, 5)):
        with pytest.raises(TensorRtError, match=f"--target sm{device[0]}{device[1]}"):
            require_device("8.6", device)


def test_no_module():
    with pytest.raises(TensorRtError, match="pip install"):
        find_api([])


def test_an_engine_of_another_version(kit, api, tmp_path):
    model = kit.model("llama, tied", "half")
    spec = dataclasses.replace(
        reference_spec(model.graph, LIMITS), backend="tensorrt", backend_version="tensorrt-10.3.0", device_class="sm86"
    )
    with pytest.raises(BundleError, match=r"compiled by tensorrt backend tensorrt-10.3.0.*rebuild"):
        create_engine(tmp_path, spec, contract=model.contract, kv_blocks=8)


def test_a_machine_without_a_gpu_says_so(kit, api, tmp_path):
    if has_gpu():
        pytest.skip("this machine has a GPU")
    model = kit.model("llama, tied", "half")
    manifest = EngineManifest(
        version=api.version, compute_capability="8.6", form="fused", bounds=kit.decode, networks=()
    )
    write_manifest(tmp_path, manifest)
    spec = dataclasses.replace(
        reference_spec(model.graph, LIMITS), backend="tensorrt", backend_version=api.version, device_class="sm86"
    )
    with pytest.raises(BundleError, match=r"pycuda|no GPU"):
        create_engine(tmp_path, spec, contract=model.contract, kv_blocks=8)


def has_gpu():
    """Whether the driver answers, whatever it is."""
    try:
        open_cuda()
    except TensorRtError:
        return False
    return True


def test_a_damaged_manifest(tmp_path):
    (tmp_path / "network.json").write_text("{}")
    with pytest.raises(TensorRtError, match="rebuild the bundle"):
        read_manifest(tmp_path)


def test_a_pool_of_another_kind(kit, api):
    model = kit.model("llama, tied", "half")
    contract = dataclasses.replace(model.contract, dtype="int8")
    engine = kit.evaluated(api, model, kit.decode)
    with pytest.raises(ValueError, match="half precision"):
        type(engine)(engine.spec, None, pool=HostKvPool(contract, range(2), 4), executor=None)


def test_half_of_a_byte():
    with pytest.raises(ValueError, match="whole bytes"):
        pack_nibbles(np.zeros(3, np.int8))
    assert pack_nibbles(np.array([1, -8, -1, 7], np.int8)).tolist() == [0x81, 0x7F]
    assert to_half(np.array([65504.0], np.float32), "x").tolist() == [65504.0]


def test_ranks_that_sum_inside_of_a_network(kit, api, tmp_path):
    model = kit.model("llama with biases", "half")
    graph, weights = shard(model.graph, model.weights, 0, 2)
    contract = dataclasses.replace(model.contract, kv_heads=1)
    compile_engine(
        graph,
        weights,
        contract=contract,
        limits=LIMITS,
        folder=tmp_path,
        api=api,
        phase="prefill",
        device_class="sm86",
        world=2,
    )
    spec = dataclasses.replace(reference_spec(graph, LIMITS), name="prefill-tp0of2", world=2)
    pool = HostKvPool(contract, range(graph.num_layers), 4)
    with pytest.raises(TensorRtError, match="is rank 0 of 2 and sums over NCCL"):
        load_engine(tmp_path, spec, pool, None)

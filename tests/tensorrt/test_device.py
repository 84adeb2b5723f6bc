"""What runs on a GPU, over host memory: the driver's calls act on addresses in this process, and a network's execution
evaluates it. So addresses, pitches, shapes and the order of calls are real; kernels are not."""

import ctypes
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from edgellm.engines.kv import HostKvPool
from edgellm.engines.reference import reference_spec
from edgellm.engines.tensorrt import device
from edgellm.engines.tensorrt.engine import TensorRtEngine
from edgellm.engines.tensorrt.evaluate import NetworkEvaluator
from edgellm.engines.tensorrt.manifest import EngineManifest, describe


class Memory:
    """As pycuda's DeviceAllocation: an address, freed once."""

    def __init__(self, size):
        self._bytes = ctypes.create_string_buffer(b"\xff" * size, size)  # NaN, as far as half and float go

    def __int__(self):
        return ctypes.addressof(self._bytes)

    def free(self):
        del self._bytes


class Memcpy2D:
    def set_src_host(self, array):
        self._source, self._kept = array.ctypes.data, array

    def set_src_device(self, address):
        self._source = address

    def set_dst_device(self, address):
        self._target = address

    def __call__(self, stream=None, aligned=True):
        for row in range(self.height):
            source, target = self._source + row * self.src_pitch, self._target + row * self.dst_pitch
            ctypes.memmove(target, source, self.width_in_bytes)


class HostCuda:
    """The part of pycuda.driver that engines use."""

    mem_alloc = Memory
    Memcpy2D = Memcpy2D

    def Device(self, index):  # noqa: N802
        return SimpleNamespace(compute_capability=lambda: (8, 7))

    def Stream(self):  # noqa: N802
        return SimpleNamespace(handle=0, synchronize=lambda: None)

    def memset_d8(self, memory, value, size):
        ctypes.memset(int(memory), value, size)

    def memcpy_htod_async(self, target, array, stream):
        ctypes.memmove(int(target), array.ctypes.data, array.nbytes)

    def memcpy_dtoh_async(self, array, source, stream):
        ctypes.memmove(array.ctypes.data, int(source), array.nbytes)

    def pagelocked_empty(self, shape, dtype):
        return np.empty(shape, dtype)


class HostContext:
    """An execution context that evaluates the network it was made of, in place of the caches it is given."""

    def __init__(self, emitted):
        self._emitted = emitted
        self._evaluator = NetworkEvaluator(emitted.layers, rounds=True)
        self._shapes, self._addresses, self._known = {}, {}, {}
        self._recorded = None

    def set_input_shape(self, name, shape):
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name, address):
        self._addresses[name] = address

    def get_tensor_shape(self, name):
        case = tuple(sorted(self._shapes.items()))
        if case not in self._known:
            self._known[case] = {output: values.shape for output, values in self._run().items()}
        return self._known[case][name]

    def execute_async_v3(self, stream):
        bound = (dict(self._shapes), dict(self._addresses))
        if RecordedRun.is_recording:
            self._recorded = bound
            return True
        assert self._recorded in (None, bound), "a recorded run keeps its shapes and addresses"
        for name, values in self._run().items():
            self._view(name, values.shape)[...] = values
        return True

    def _run(self):
        network = self._emitted.network
        names = [network.get_input(index).name for index in range(network.num_inputs)]
        return self._evaluator.run({name: self._view(name, self._shapes[name]).copy() for name in names})

    def _view(self, name, shape):
        network = self._emitted.network
        tensors = [network.get_input(i) for i in range(network.num_inputs)]
        tensors += [network.get_output(i) for i in range(network.num_outputs)]
        kind = next(tensor.dtype.name for tensor in tensors if tensor.name == name)
        dtype = np.dtype({"HALF": np.float16, "FLOAT": np.float32, "INT32": np.int32}[kind])
        size = int(np.prod(shape)) * dtype.itemsize
        memory = (ctypes.c_char * size).from_address(self._addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)


def runtime_of(networks):
    """The part of TensorRT's runtime that engines use; a file's bytes are the number of its network."""

    class Runtime:
        def __init__(self, logger):
            pass

        def deserialize_cuda_engine(self, data):
            emitted = networks[int(data)]
            return SimpleNamespace(create_execution_context=lambda: HostContext(emitted))

    return Runtime


@pytest.fixture
def on_device(kit, form, monkeypatch, tmp_path):
    """on_device(model, bounds, num_slots): an engine over the real executor, with host memory below."""

    def make(model, bounds, num_slots, **features):
        api = kit.offering(form, **features)
        networks = kit.emit(api, model.graph, model.weights, bounds)
        for number in range(len(networks)):
            (tmp_path / f"{number}.engine").write_text(str(number))
        manifest = EngineManifest(
            version=api.version,
            compute_capability="8.6",
            form="fused" if api.features.attention else "primitive",
            bounds=bounds,
            networks=tuple(describe(network, f"{n}.engine", 0) for n, network in enumerate(networks)),
        )
        runtime = SimpleNamespace(Runtime=runtime_of(networks), Logger=api.trt.Logger)
        current = SimpleNamespace(push=lambda: None, pop=lambda: None)
        monkeypatch.setattr(device, "open_cuda", lambda: (HostCuda(), current))
        monkeypatch.setattr(device, "find_api", lambda _: dataclasses.replace(api, trt=runtime))
        monkeypatch.setattr("edgellm.engines.tensorrt.context.CapturedGraph", RecordedRun)
        executor = device.DeviceNetworks(tmp_path, manifest, num_slots=num_slots)
        pool = HostKvPool(model.contract, range(model.graph.num_layers), 24)
        spec = reference_spec(model.graph, kit.limits)
        return TensorRtEngine(spec, manifest, pool=pool, executor=executor)

    return make


class RecordedRun:
    """A CUDA graph: recording executes nothing, and launching needs what was recorded to be bound still."""

    is_recording = False

    def __init__(self, stream, enqueue):
        RecordedRun.is_recording = True
        assert enqueue()
        RecordedRun.is_recording = False
        RecordedRun.recorded += 1
        self.launch = enqueue

    recorded = 0


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_addresses_and_pitches(kit, on_device, form, phase):
    model = kit.model("llama with biases", "int4")
    engine = on_device(model, kit.prefill if phase == "prefill" else kit.decode, 3)
    steps = kit.conversation()
    recorded = RecordedRun.recorded
    assert kit.error(kit.logits(engine, steps), kit.logits(model.reference(), steps)) < 0.01
    assert RecordedRun.recorded - recorded == (phase == "decode" and form.features.lengths)
    engine.close()


def test_loading_kv_into_a_slot(kit, on_device):
    """Two sequences take turns in one slot, so that each is loaded from the pool again."""
    model = kit.model("gpt_neox", "half")
    engine = on_device(model, kit.decode, 1)
    tokens = np.random.default_rng(5).integers(0, 48, (2, 40)).astype(np.int32)
    steps = [
        kit.batch_of([kit.chunk(tokens=tokens[s, a:b], first_position=a, blocks=[s, s + 2])])
        for a, b in ((0, 34), (34, 35), (35, 36))
        for s in (0, 1)
    ]
    assert kit.error(kit.logits(engine, steps), kit.logits(model.reference(), steps)) < 0.01

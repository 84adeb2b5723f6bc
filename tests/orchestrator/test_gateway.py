"""The gateway over real gRPC, on the live core and nodes with toy engines."""

import asyncio
import contextlib
import os
import random
import threading

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from edgellm.engines.sampling import SamplingParams as SamplingValues
from edgellm.orchestrator.policies.dual_pool import DualPool
from edgellm.orchestrator.server import INFERENCE, ListenError, core_config, run_orchestrator
from edgellm.orchestrator.sim.device import DeviceModel
from edgellm.orchestrator.sim.toy import expected_answer, toy_contract
from edgellm.orchestrator.tokenizer import ModelTokenizer
from edgellm.runtime.config import NodeError
from edgellm.runtime.rpc import inference_pb2
from edgellm.runtime.rpc.inference_pb2 import (
    CancelRequest,
    GenerateRequest,
    GetClusterRequest,
    SamplingParams,
    TokenIds,
)
from edgellm.runtime.rpc.inference_pb2_grpc import InferenceStub

LAYERS = 4
SLOW = DeviceModel(read_token_s=2e-5, step_s=0.05, row_s=0.0, overhead_s=0.0)


def request(seed: int, prompt_tokens: int = 40, max_tokens: int = 10, **fields) -> GenerateRequest:
    ids = TokenIds(ids=[(seed + i) % 250 for i in range(prompt_tokens)])
    return GenerateRequest(
        token_ids=ids, max_tokens=max_tokens, sampling=SamplingParams(seed=seed), ignore_eos=True, **fields
    )


def expected(asked: GenerateRequest) -> list[int]:
    return expected_answer(
        asked.token_ids.ids,
        asked.max_tokens,
        num_layers=LAYERS,
        sampling=SamplingValues(seed=asked.sampling.seed),
        stop_token_ids=asked.stop_token_ids,
    )


async def collect(call):
    responses = [response async for response in call]
    assert [response.token.index for response in responses[1:-1]] == list(range(len(responses) - 2))
    return [response.token.token_id for response in responses[1:-1]], responses[-1].finished


async def read_all(call):
    responses = []
    while (response := await call.read()) != grpc.aio.EOF:
        responses.append(response)
    return responses


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, timeout=60))


async def code_of(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await collect(call)
    return failure.value


async def code_of_reading(call) -> grpc.aio.AioRpcError:
    """Of a call of which something was read already."""
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await read_all(call)
    return failure.value


def test_a_prompt_goes_through_prefill_and_decode(live_cluster):
    async def scenario():
        async with live_cluster() as cluster:
            result = await collect(cluster.stub.Generate(request(5)))
            await cluster.quiet()
            return result

    tokens, finished = run(scenario())
    assert tokens == expected(request(5))
    assert finished.reason == inference_pb2.FINISH_REASON_LENGTH
    assert finished.prefill_path == inference_pb2.PREFILL_PATH_REMOTE
    assert (finished.prompt_tokens, finished.generated_tokens, finished.takeovers) == (40, 10, 0)
    assert finished.timing.total_ms >= finished.timing.ttft_ms > 0


def test_without_a_prefill_node_the_decode_node_reads(live_cluster, make_node):
    async def scenario():
        async with live_cluster(make_node("d0", "decode")) as cluster:
            return await collect(cluster.stub.Generate(request(6)))

    tokens, finished = run(scenario())
    assert tokens == expected(request(6))
    assert finished.prefill_path == inference_pb2.PREFILL_PATH_LOCAL


def test_degraded_prefill_only_where_allowed(live_cluster, make_node):
    async def scenario():
        async with live_cluster(make_node("d0", "decode", half=False), placement_timeout_s=0.3) as cluster:
            _, allowed = await collect(cluster.stub.Generate(request(6, allow_degraded_prefill=True)))
            _, refused = await collect(cluster.stub.Generate(request(6)))
            return allowed, refused

    allowed, refused = run(scenario())
    assert allowed.prefill_path == inference_pb2.PREFILL_PATH_DEGRADED
    assert refused.reason == inference_pb2.FINISH_REASON_ERROR
    assert "no half-precision prefill engine is ready" in refused.message


def test_a_stop_string_cuts_the_answer_and_frees_the_node(live_cluster, bundle):
    asked = request(7, max_tokens=40)
    letters = [chr(token) for token in expected(asked)]

    async def scenario():
        async with live_cluster() as cluster:
            plain = [r async for r in cluster.stub.Generate(asked)]
            text = "".join(r.token.text for r in plain) + plain[-1].finished.text
            asked.stop.append(text[20:23])
            stopped = [r async for r in cluster.stub.Generate(asked)]
            await cluster.quiet()
            return text, stopped

    text, responses = run(scenario())
    finished = responses[-1].finished
    assert "".join(r.token.text for r in responses) + finished.text == text[: text.index(asked.stop[0])]
    assert finished.reason == inference_pb2.FINISH_REASON_STOP
    assert finished.generated_tokens == len(responses) - 2 < len(letters)


def test_a_stop_token_ends_the_answer(live_cluster):
    asked = request(8, max_tokens=40)
    asked.stop_token_ids.append(expected(asked)[5])

    async def scenario():
        async with live_cluster() as cluster:
            return await collect(cluster.stub.Generate(asked))

    tokens, finished = run(scenario())
    assert tokens == expected(asked)
    assert finished.reason == inference_pb2.FINISH_REASON_STOP


def test_a_disconnect_frees_everything(live_cluster, make_node):
    async def scenario():
        async with live_cluster(make_node("p0", "prefill"), make_node("d0", "decode", device=SLOW)) as cluster:
            call = cluster.stub.Generate(request(9, max_tokens=1000))
            await call.read()
            await call.read()
            call.cancel()
            await cluster.quiet()
            return cluster.orchestrator.driver.core.state.finished_count

    assert run(scenario()) == 1


def test_cancel_ends_the_stream(live_cluster, make_node):
    async def scenario():
        async with live_cluster(make_node("p0", "prefill"), make_node("d0", "decode", device=SLOW)) as cluster:
            call = cluster.stub.Generate(request(9, max_tokens=1000, request_id="mine"))
            await call.read()
            first = await cluster.stub.Cancel(CancelRequest(request_id="mine"))
            rest = await read_all(call)
            second = await cluster.stub.Cancel(CancelRequest(request_id="mine"))
            return first.cancelled, rest[-1].finished.reason, second.cancelled

    assert run(scenario()) == (True, inference_pb2.FINISH_REASON_CANCELLED, False)


def test_an_id_may_be_used_again_at_once(live_cluster):
    async def scenario():
        async with live_cluster() as cluster:
            asked = [request(number, max_tokens=3, request_id="same") for number in range(20)]
            return [await collect(cluster.stub.Generate(one)) for one in asked]

    for number, (tokens, finished) in enumerate(run(scenario())):
        assert tokens == expected(request(number, max_tokens=3))
        assert finished.reason == inference_pb2.FINISH_REASON_LENGTH


def test_a_deadline_ends_the_request(live_cluster, make_node):
    async def scenario():
        async with live_cluster(make_node("p0", "prefill"), make_node("d0", "decode", device=SLOW)) as cluster:
            result = await collect(cluster.stub.Generate(request(9, max_tokens=1000, deadline_ms=300)))
            await cluster.quiet()
            return result

    _, finished = run(scenario())
    assert finished.reason == inference_pb2.FINISH_REASON_DEADLINE
    assert "the deadline passed" in finished.message


def test_nobody_waits_for_the_tokens_of_a_long_prompt(live_cluster, monkeypatch):
    """Its tokenising ends only after another request was answered."""
    encode, answered = ModelTokenizer.encode_text, threading.Event()

    def encode_late(tokenizer: ModelTokenizer, text: str) -> list[int]:
        assert answered.wait(10), "the other request waits"
        return encode(tokenizer, text)

    monkeypatch.setattr(ModelTokenizer, "encode_text", encode_late)

    async def scenario():
        async with live_cluster() as cluster:
            long = asyncio.create_task(collect(cluster.stub.Generate(GenerateRequest(text="long", max_tokens=3))))
            other = await collect(cluster.stub.Generate(request(6)))
            answered.set()
            return await long, other

    (_, finished), (tokens, _) = run(scenario())
    assert tokens == expected(request(6))
    assert finished.prompt_tokens == 4


def test_refusals_carry_their_codes(live_cluster, make_node):
    async def scenario():
        nodes = (make_node("p0", "prefill"), make_node("d0", "decode", device=SLOW, blocks=32))
        async with live_cluster(*nodes, max_waiting=1) as cluster:
            generate = cluster.stub.Generate
            running = [generate(request(i, max_tokens=900, request_id=f"r{i}")) for i in range(2)]
            for call in running:
                await call.read()
            errors = {
                "empty": await code_of(generate(GenerateRequest())),
                "unknown": await code_of(generate(request(1, model="other"))),
                "duplicate": await code_of(generate(request(1, request_id="r0"))),
                "impossible": await code_of(generate(request(1, max_tokens=2000))),
                "overloaded": await code_of(generate(request(1))),
            }
            for call in running:
                call.cancel()
            await cluster.quiet()
            return errors

    errors = run(scenario())
    assert {name: error.code() for name, error in errors.items()} == {
        "empty": grpc.StatusCode.INVALID_ARGUMENT,
        "unknown": grpc.StatusCode.NOT_FOUND,
        "duplicate": grpc.StatusCode.ALREADY_EXISTS,
        "impossible": grpc.StatusCode.INVALID_ARGUMENT,
        "overloaded": grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
    assert "64 KV blocks of 32 tokens, the largest decode node has 32" in errors["impossible"].details()
    assert int(dict(errors["overloaded"].trailing_metadata())["retry-after-ms"]) >= 100


def test_text_that_is_not_utf8_is_the_clients_mistake(live_cluster):
    async def scenario():
        async with live_cluster() as cluster, grpc.aio.insecure_channel(cluster.orchestrator.address) as channel:
            generate = channel.unary_stream("/edgellm.v1.Inference/Generate")
            return await code_of(generate(b"\x1a\x02\xff\xfe"))

    error = run(scenario())
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "UTF-8" in error.details()


def test_a_decode_node_that_dies_costs_no_token(live_cluster, make_node):
    asked = request(11, max_tokens=60)

    async def scenario():
        nodes = (make_node("p0", "prefill"), make_node("d0", "decode"), make_node("d1", "decode"))
        async with live_cluster(*nodes) as cluster:
            call = cluster.stub.Generate(asked)
            for _ in range(20):
                response = await call.read()
            used = [name for name, node in cluster.nodes.items() if node.ledger.attempts() and name != "p0"]
            cluster.tasks[used[0]].cancel()
            del cluster.nodes[used[0]]
            rest = await read_all(call)
            await cluster.quiet()
            return response.token.index, rest

    last_index, rest = run(scenario())
    assert [r.token.index for r in rest[:-1]] == list(range(last_index + 1, 60))
    assert [r.token.token_id for r in rest[:-1]] == expected(asked)[last_index + 1 :]
    assert rest[-1].finished.takeovers == 1


def test_nodes_that_do_not_belong_are_told_why(live_cluster, make_node, monkeypatch):
    async def refusal(cluster, name, **changes) -> str:
        with pytest.raises(NodeError) as failure:
            await cluster.add_node(make_node(name, "decode"), **changes)
        return str(failure.value)

    async def scenario():
        async with live_cluster() as cluster:
            bundle = await refusal(cluster, "d1", bundle_sha256="0" * 64)
            contract = await refusal(cluster, "d2", contract=toy_contract(LAYERS + 1))
            monkeypatch.setattr(os, "getpid", lambda: 2)
            return bundle, contract, await refusal(cluster, "d0")

    pid = os.getpid()
    bundle, contract, name = run(scenario())
    assert "start it with the same --bundle" in bundle
    assert "stores KV under contract" in contract
    assert f"node id d0 is in use by process {pid}" in name


def test_status_health_and_reflection(live_cluster):
    async def scenario():
        async with live_cluster() as cluster, grpc.aio.insecure_channel(cluster.orchestrator.address) as channel:
            status = await cluster.stub.GetCluster(GetClusterRequest())
            health = health_pb2_grpc.HealthStub(channel)
            healthy = await health.Check(health_pb2.HealthCheckRequest(service=INFERENCE))
            ask = reflection_pb2.ServerReflectionRequest(list_services="")
            answers = [a async for a in reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo([ask])]
            for task in cluster.tasks.values():
                task.cancel()
            async for change in health.Watch(health_pb2.HealthCheckRequest(service=INFERENCE)):
                if change.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                    break
            return status, healthy, answers[0].list_services_response

    status, healthy, services = run(scenario())
    assert {(node.node_id, node.role, node.state) for node in status.nodes} == {
        ("p0", "prefill", "ready"),
        ("d0", "decode", "ready"),
    }
    assert healthy.status == health_pb2.HealthCheckResponse.SERVING
    assert "edgellm.v1.Inference" in {service.name for service in services.service}


def test_metrics_count_what_was_served(live_cluster):
    async def scenario():
        async with live_cluster() as cluster:
            for number in range(3):
                await collect(cluster.stub.Generate(request(number)))
            await code_of(cluster.stub.Generate(request(1, max_tokens=2000, prompt_tokens=9000)))
            registry = cluster.orchestrator.driver.metrics.registry
            outcome = {"outcome": "length", "prefill_path": "remote"}
            return [
                registry.get_sample_value("edgellm_requests_total", outcome),
                registry.get_sample_value("edgellm_ttft_seconds_count"),
                registry.get_sample_value("edgellm_tokens_total"),
                registry.get_sample_value("edgellm_nodes", {"role": "decode", "state": "ready"}),
            ]

    assert run(scenario()) == [3, 3, 30, 1]


def test_a_server_that_stops_says_so_on_every_stream(bundle, caplog):
    async def scenario():
        async with contextlib.AsyncExitStack() as stack:
            async with run_orchestrator(bundle, core_config(bundle), DualPool(), "127.0.0.1:0") as orchestrator:
                channel = await stack.enter_async_context(grpc.aio.insecure_channel(orchestrator.address))
                calls = [InferenceStub(channel).Generate(request(seed)) for seed in range(2)]
                for call in calls:
                    assert (await call.read()).WhichOneof("event") == "accepted"
            return [await code_of_reading(call) for call in calls]

    for error in run(scenario()):
        assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "edgellm-serve is stopping")
    assert caplog.text == ""


def test_a_port_in_use_is_said_to_be(bundle):
    async def scenario():
        async with run_orchestrator(bundle, core_config(bundle), DualPool(), "127.0.0.1:0") as first:
            with pytest.raises(ListenError, match="is the port in use"):
                async with run_orchestrator(bundle, core_config(bundle), DualPool(), first.address):
                    pass

    run(scenario())


def test_200_clients_some_of_whom_go_away(live_cluster, make_node):
    """Everyone who stays gets the right answer; afterwards nothing is held anywhere."""
    rng = random.Random(3)

    async def client(cluster, number: int) -> str:
        asked = request(
            number, prompt_tokens=rng.randint(1, 200), max_tokens=rng.randint(1, 60), request_id=f"r{number}"
        )
        behaviour = rng.choice(("stay", "stay", "disconnect", "cancel"))
        await asyncio.sleep(rng.uniform(0, 1))
        call = cluster.stub.Generate(asked)
        if behaviour == "stay":
            tokens, finished = await collect(call)
            assert tokens == expected(asked)
            assert finished.reason == inference_pb2.FINISH_REASON_LENGTH
            return behaviour
        await asyncio.sleep(rng.uniform(0, 0.5))
        if behaviour == "disconnect":
            call.cancel()
        else:
            await cluster.stub.Cancel(CancelRequest(request_id=f"r{number}"))
            tokens, _ = await collect(call)
            assert tokens == expected(asked)[: len(tokens)]
        return behaviour

    async def scenario():
        nodes = [make_node("p0", "prefill"), make_node("p1", "prefill")]
        nodes += [make_node(f"d{i}", "decode", blocks=100) for i in range(2)]
        async with live_cluster(*nodes, dead_after_s=30.0) as cluster:
            behaviours = await asyncio.gather(*(client(cluster, number) for number in range(200)))
            await cluster.quiet()
            return behaviours

    assert set(run(scenario())) == {"stay", "disconnect", "cancel"}

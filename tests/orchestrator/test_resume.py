"""Clients that lose their stream, or the whole orchestrator, and take their answers up again."""

import asyncio
import contextlib

import grpc
import grpc.aio
import pytest

from edgellm.orchestrator.journal import JournalFile
from edgellm.orchestrator.journal_writer import JournalWriter
from edgellm.orchestrator.policies.dual_pool import DualPool
from edgellm.orchestrator.server import core_config, run_orchestrator
from edgellm.orchestrator.sim.device import DeviceModel
from edgellm.runtime.rpc import inference_pb2, inference_pb2_grpc
from edgellm.runtime.rpc.inference_pb2 import GenerateRequest, ResumeRequest, SamplingParams, TokenIds

STEADY = DeviceModel(read_token_s=2e-5, step_s=0.01, row_s=0.0, overhead_s=0.0)


def request(seed=3, max_tokens=40, **fields):
    ids = TokenIds(ids=[(seed + i) % 250 for i in range(40)])
    return GenerateRequest(
        token_ids=ids, max_tokens=max_tokens, sampling=SamplingParams(seed=seed), ignore_eos=True, **fields
    )


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, timeout=60))


async def read(call, tokens=None):
    """All events of a stream, or its acceptance and so many tokens."""
    events = []
    while tokens is None or len(events) <= tokens:
        response = await call.read()
        if response == grpc.aio.EOF:
            break
        events.append(response)
    return events


def text_of(responses):
    return "".join(response.token.text for response in responses) + responses[-1].finished.text


def tokens_of(responses):
    return [(r.token.index, r.token.token_id, r.token.text) for r in responses if r.HasField("token")]


@pytest.mark.parametrize("from_index", [0, 5, 40])
def test_a_lost_stream_is_taken_up_again(live_cluster, make_node, from_index):
    nodes = make_node("p0", "prefill"), make_node("d0", "decode", device=STEADY)

    async def scenario():
        async with live_cluster(*nodes) as cluster:
            whole = await read(cluster.stub.Generate(request()))
            lost = cluster.stub.Generate(request(request_id="r", keep_ms=20_000))
            await read(lost, tokens=5)
            lost.cancel()
            rest = await read(cluster.stub.Resume(ResumeRequest(request_id="r", from_index=from_index)))
            again = await read(cluster.stub.Resume(ResumeRequest(request_id="r", from_index=from_index)))
            await cluster.quiet()
            return whole, rest, again

    whole, rest, again = run(scenario())
    assert rest[0].accepted.request_id == "r"
    assert tokens_of(rest) == tokens_of(whole)[from_index:]
    assert rest[-1].finished.generated_tokens == 40
    assert again == rest


def test_without_keep_ms_a_client_that_leaves_takes_its_request_along(live_cluster, make_node):
    nodes = make_node("p0", "prefill"), make_node("d0", "decode", device=STEADY)

    async def scenario():
        async with live_cluster(*nodes) as cluster:
            for keep_ms in (0, 200):
                call = cluster.stub.Generate(request(request_id=f"r{keep_ms}", max_tokens=2000, keep_ms=keep_ms))
                await read(call, tokens=2)
                call.cancel()
                await cluster.quiet()
            return await read(cluster.stub.Resume(ResumeRequest(request_id="r0")))

    assert run(scenario())[-1].finished.reason == inference_pb2.FINISH_REASON_CANCELLED


def test_only_one_stream_reads_an_answer(live_cluster, make_node):
    nodes = make_node("p0", "prefill"), make_node("d0", "decode", device=STEADY)

    async def scenario():
        async with live_cluster(*nodes) as cluster:
            first = cluster.stub.Generate(request(request_id="r"))
            await read(first, tokens=2)
            second = await read(cluster.stub.Resume(ResumeRequest(request_id="r")))
            with pytest.raises(grpc.aio.AioRpcError) as superseded:
                await read(first)
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await read(cluster.stub.Resume(ResumeRequest(request_id="other")))
            return second, superseded.value.code(), unknown.value

    second, superseded, unknown = run(scenario())
    assert len(tokens_of(second)) == 40
    assert superseded == grpc.StatusCode.ABORTED
    assert unknown.code() == grpc.StatusCode.NOT_FOUND
    assert "there is no request 'other'" in unknown.details()


@contextlib.asynccontextmanager
async def orchestrator(bundle, folder, listen="127.0.0.1:0"):
    """With a journal in `folder`, and a stub to talk to it."""
    file = JournalFile(folder / "journal", bundle.sha256)
    written = file.read()
    with JournalWriter(file, asyncio.get_running_loop()) as journal:
        serving = run_orchestrator(bundle, core_config(bundle), DualPool(), listen, journal=journal, written=written)
        async with serving as running, grpc.aio.insecure_channel(running.address) as channel:
            yield running, inference_pb2_grpc.InferenceStub(channel)


def test_answers_go_on_over_a_restart_of_the_orchestrator(bundle, make_node, cluster_of, tmp_path):
    """Nodes keep what they have; the gateway's part of an answer, such as its stop strings, is in the journal."""
    plans = make_node("p0", "prefill"), make_node("d0", "decode", device=STEADY)

    async def scenario():
        async with orchestrator(bundle, tmp_path) as (first, stub):
            cluster = cluster_of(first, stub)
            for plan in plans:
                cluster.add_node(plan)
            await cluster.joined(2)
            whole = await read(stub.Generate(request(max_tokens=200)))
            stop = text_of(whole)[190:193]
            ended = await read(stub.Generate(request(request_id="ended")))
            cut = stub.Generate(request(max_tokens=200, request_id="cut", keep_ms=20_000, stop=[stop]))
            await read(cut, tokens=10)
        async with orchestrator(bundle, tmp_path, first.address) as (second, stub):
            rest = await read(stub.Resume(ResumeRequest(request_id="cut", from_index=10)))
            ended_again = await read(stub.Resume(ResumeRequest(request_id="ended")))
            for task in cluster.tasks.values():
                task.cancel()
            await asyncio.gather(*cluster.tasks.values(), return_exceptions=True)
            assert not second.driver.core.state.requests
        return whole, stop, rest, ended, ended_again

    whole, stop, rest, ended, ended_again = run(scenario())
    text = text_of(whole)
    assert ended_again == ended
    head = "".join(text for _, _, text in tokens_of(whole)[:10])
    assert head + text_of(rest) == text[: text.index(stop)]
    assert rest[-1].finished.reason == inference_pb2.FINISH_REASON_STOP
    assert rest[-1].finished.takeovers == 1

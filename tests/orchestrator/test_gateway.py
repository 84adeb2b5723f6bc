"""The gateway over real gRPC, on the live core and simulated nodes."""

import asyncio

from edgellm.orchestrator.core.values import Generation, RequestId, RequestSpec, Sampling
from edgellm.orchestrator.sim.toy import expected_answer
from edgellm.runtime.rpc import inference_pb2
from edgellm.runtime.rpc.inference_pb2 import GenerateRequest, SamplingParams, TokenIds


def test_a_prompt_goes_through_prefill_and_decode(live_cluster):
    async def scenario():
        async with live_cluster() as cluster:
            request = GenerateRequest(
                token_ids=TokenIds(ids=range(40)), max_tokens=10, sampling=SamplingParams(seed=5), ignore_eos=True
            )
            responses = [response async for response in cluster.stub.Generate(request)]
            await cluster.quiet()
            return responses

    responses = asyncio.run(scenario())
    assert responses[0].accepted.prompt_tokens == 40
    assert [response.token.index for response in responses[1:-1]] == list(range(10))
    spec = RequestSpec(
        request_id=RequestId(""),
        prompt=tuple(range(40)),
        generation=Generation(max_tokens=10, sampling=Sampling(seed=5)),
    )
    assert [response.token.token_id for response in responses[1:-1]] == expected_answer(spec)
    finished = responses[-1].finished
    assert finished.reason == inference_pb2.FINISH_REASON_LENGTH
    assert finished.prefill_path == inference_pb2.PREFILL_PATH_REMOTE

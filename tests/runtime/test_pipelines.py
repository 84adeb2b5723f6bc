"""Pipelines of real nodes in one process: the same tokens as one node, whoever carries which stage."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from edgellm.runtime.generation import SampledToken
from edgellm.runtime.rpc import cluster_pb2
from edgellm.runtime.stages.messages import StageResult
from edgellm.runtime.stages.wire import result_from_proto, result_to_proto
from tests.runtime.conftest import (
    Running,
    attempt,
    decode,
    generation,
    node,
    orchestrating,
    prefill,
    random_prompt,
    staged_answer,
)


def stages(*parts: tuple[Running, int, int]) -> list[cluster_pb2.Stage]:
    """(node, first layer, layers) in order."""
    return [
        cluster_pb2.Stage(
            node_id=one.joined.hello.node_id, address=one.joined.hello.exchange_address,
            host_id=one.joined.hello.host_id, first_layer=first, num_layers=count,
        )
        for one, first, count in parts
    ]  # fmt: skip


def targets(*parts: tuple[Running, int, int], backup: bool = False) -> list[cluster_pb2.KvTarget]:
    return [
        cluster_pb2.KvTarget(
            node_id=stage.node_id, address=stage.address, host_id=stage.host_id, first_layer=stage.first_layer,
            num_layers=stage.num_layers, backup=backup,
        )
        for stage in stages(*parts)
    ]  # fmt: skip


async def ask(reader: Running, parts, request_id: str, prompt, wish, *, backups=()) -> list[int]:
    """One request, as an orchestrator would."""
    reader.joined.send(prefill=prefill(request_id, prompt, wish, targets=[*targets(*parts), *backups]))
    [done] = await reader.joined.wait_for("PrefillDone", request_id)
    tokens = [done.first_token.token_id]
    command = decode(request_id, prompt, wish, tokens)
    command.stages.extend(stages(*parts))
    carriers = list({one.joined.hello.node_id: one for one, _, _ in parts}.values())
    for one in carriers:
        one.joined.send(decode=command)
    rest = await parts[-1][0].joined.wait_for("AttemptToken", request_id, wish.max_tokens - 1)
    assert [one.token.index for one in rest] == list(range(1, wish.max_tokens))
    for one in carriers:
        one.joined.send(release=cluster_pb2.Release(attempt=attempt(request_id)))
        await one.joined.wait_for("Released", request_id)
    return tokens + [one.token.token_id for one in rest]


def pipeline(test, *, names: str, counts=(1, 1, 1)):
    """Run `test(reader, decode nodes by name)`."""

    async def run() -> None:
        async with AsyncExitStack() as stack:
            orchestrator = await stack.enter_async_context(orchestrating())
            reader = await stack.enter_async_context(node(orchestrator, "reader", "prefill"))
            writers = {
                name: await stack.enter_async_context(node(orchestrator, name, "decode", stage_layers=counts))
                for name in names
            }
            await test(reader, writers)

    asyncio.run(run())


@pytest.mark.parametrize("carriers", ["aaa", "abc", "aab", "abb", "aba"])
def test_who_carries_a_stage_does_not_change_a_token(carriers):
    prompts = [random_prompt(tokens, seed=tokens) for tokens in (40, 33, 5, 70, 1)]
    expected = [staged_answer((1, 1, 1), prompt, 12) for prompt in prompts]

    async def test(reader, writers):
        parts = [(writers[name], layer, 1) for layer, name in enumerate(carriers)]
        answers = await asyncio.gather(
            *(ask(reader, parts, f"r{i}", prompt, generation(12)) for i, prompt in enumerate(prompts))
        )
        assert answers == expected

    pipeline(test, names="".join(sorted(set(carriers))))


RESULT = StageResult(
    step_id=2**40,
    samples=(SampledToken(index=3, token_id=70_000, logprob=-0.5, finish="length"), None),
)


def test_a_result_arrives_as_it_was_sent():
    assert result_from_proto(result_to_proto(RESULT)) == RESULT


@pytest.mark.parametrize(
    ("field", "value"), [("token_id", 70_001), ("index", 4), ("logprob", -0.25), ("finish_reason", -1)]
)
def test_a_damaged_token_is_refused(field, value):
    message = result_to_proto(RESULT)
    setattr(message.samples[0].token, field, value)
    with pytest.raises(ValueError, match="checksum of the samples of step 1099511627776"):
        result_from_proto(message)


def test_a_damaged_step_id_or_a_token_that_was_lost_is_refused():
    for damage in (lambda message: setattr(message, "step_id", 7), lambda m: setattr(m.samples[1], "lost", False)):
        message = result_to_proto(RESULT)
        damage(message)
        with pytest.raises(ValueError, match="checksum"):
            result_from_proto(message)

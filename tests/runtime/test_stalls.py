"""What stands in the way of an answer without ending it: later stages that let go, lost backups, no orchestrator."""

import time
from contextlib import AsyncExitStack

from edgellm.runtime.attempts import Attempts
from edgellm.runtime.kv.types import Attempt, RequestId
from edgellm.runtime.rpc import cluster_pb2
from tests.runtime.conftest import attempt, decode, eventually, generation, orchestrating, random_prompt, staged_answer
from tests.runtime.takeover import Nodes, Part, Request, on_nodes

CUT, MAX_TOKENS, PROMPT = (2, 1), 60, random_prompt(70)
FRONT, BACK = range(2), range(2, 3)
WRITER = {"phase": "decode", "stage_layers": CUT}
ROLES = {"reader": {"phase": "prefill"}, "first": WRITER, "last": WRITER}


def copies_lost(nodes: Nodes, name: str) -> list[cluster_pb2.CopyLost]:
    events = nodes.running[name].joined.events
    return [event.copy_lost for event in events if event.WhichOneof("message") == "copy_lost"]


def test_a_node_knows_the_highest_epoch_it_has_heard_of():
    attempts = Attempts()
    attempts.enter(Attempt(request_id=RequestId("a"), epoch=5))
    attempts.release(Attempt(request_id=RequestId("b"), epoch=9))
    attempts.enter(Attempt(request_id=RequestId("c"), epoch=7))
    attempts.forget_stale()
    assert attempts.highest_epoch == 9


def test_a_later_stage_that_let_go_stalls_the_answer_for_a_lease():
    async def test(nodes):
        request = Request(nodes, "r", PROMPT, MAX_TOKENS * 4)
        await request.begin("reader", [Part(FRONT, "first"), Part(BACK, "last")])
        await request.read_tokens(3)
        nodes.running["last"].joined.send(release=cluster_pb2.Release(attempt=attempt("r")))
        await eventually(request.failures)
        assert "nobody resumed it" in request.failures()[0].message
        pool = nodes.running["first"].server.ledger.pool
        assert pool.free_blocks == pool.num_blocks

    on_nodes(test, ROLES, lease_s=0.3)


def test_a_stalled_answer_is_resumed_where_it_stalled():
    expected = staged_answer(CUT, PROMPT, MAX_TOKENS)

    async def test(nodes):
        parts = [Part(FRONT, "first"), Part(BACK, "last")]
        request = Request(nodes, "r", PROMPT, MAX_TOKENS)
        await request.begin("reader", parts)
        await request.read_tokens(5)
        first = nodes.running["first"]

        def has_broken() -> bool:
            """Once a step was on its way."""
            if not any(event.WhichOneof("message") == "pipeline_broken" for event in first.joined.events):
                first.server.node.stage_broken("last", time.monotonic())
                return False
            return True

        await eventually(has_broken)
        await request.read_tokens(5)
        request.resume(parts, tokens=len(PROMPT) + 2)
        await request.read_tokens(MAX_TOKENS)
        assert (request.tokens, request.failures()) == (expected, [])
        await request.release()

    on_nodes(test, ROLES)


def test_a_backup_that_cannot_be_reached_costs_protection_only():
    expected = staged_answer(CUT, PROMPT, MAX_TOKENS)

    async def test(nodes):
        nodes.addresses["spare"] = "127.0.0.1:1"
        request = Request(nodes, "r", PROMPT, MAX_TOKENS)
        await request.begin("reader", [Part(FRONT, "first", "spare"), Part(BACK, "last")])
        await nodes.running["reader"].joined.wait_for("KvSent", "r")
        await request.read_tokens(MAX_TOKENS)
        assert (request.tokens, request.failures()) == (expected, [])
        for name in ("reader", "first"):
            await eventually(lambda name=name: copies_lost(nodes, name))
            [lost] = copies_lost(nodes, name)
            assert (lost.holder_node_id, lost.first_layer, lost.num_layers) == ("spare", 0, 2)
        await request.release()

    on_nodes(test, ROLES | {"spare": WRITER})


def test_a_prompt_may_stay_where_it_was_read():
    """The node that reads carries a stage itself, and holds the copy of the other."""
    expected = staged_answer(CUT, PROMPT, MAX_TOKENS)

    async def test(nodes):
        request = Request(nodes, "r", PROMPT, MAX_TOKENS)
        await request.begin("first", [Part(FRONT, "first", "last"), Part(BACK, "last", "first")])
        await request.protected(tokens=len(PROMPT) + 8)
        await request.read_tokens(MAX_TOKENS)
        assert (request.tokens, request.failures()) == (expected, [])
        [sent] = await nodes.running["first"].joined.wait_for("KvSent", "r")
        assert sent.transfer.chunks
        await request.release()

    on_nodes(test, ROLES)


def test_a_prompt_of_which_only_backups_leave_is_sent_at_once():
    async def test(nodes):
        request = Request(nodes, "r", PROMPT, MAX_TOKENS)
        await request.begin("first", [Part(FRONT, "first", "last"), Part(BACK, "first", "last")])
        [sent] = await nodes.running["first"].joined.wait_for("KvSent", "r")
        assert (sent.transfer.transport, sent.transfer.bytes) == ("local", 0)
        await request.read_tokens(MAX_TOKENS)
        assert request.tokens == staged_answer(CUT, PROMPT, MAX_TOKENS)
        await request.release()

    on_nodes(test, ROLES)


def test_an_answer_outlives_its_orchestrator():
    expected = staged_answer(CUT, PROMPT, MAX_TOKENS)

    async def test(nodes):
        parts = [Part(FRONT, "first"), Part(BACK, "last")]
        request = Request(nodes, "r", PROMPT, MAX_TOKENS)
        await request.begin("reader", parts)
        await request.read_tokens(5)
        await nodes.orchestrator.server.stop(grace=None)
        async with AsyncExitStack() as stack:
            new = await stack.enter_async_context(orchestrating(nodes.orchestrator.address))
            for name in ("first", "last"):
                old, nodes.running[name].joined = nodes.running[name].joined, await new.node(name)
                if name == "last":
                    request._take(old.events)
            held = {name: list(nodes.running[name].joined.hello.held) for name in ("first", "last")}
            ranges = {name: [(one.attempt, one.first_layer, one.num_layers) for one in held[name]] for name in held}
            assert ranges == {"first": [(attempt("r"), 0, 2)], "last": [(attempt("r"), 2, 1)]}
            tokens = min(one.tokens for ones in held.values() for one in ones)
            assert tokens >= len(PROMPT) + len(request.tokens) - 1
            request.resume(parts, tokens=tokens)
            await request.read_tokens(MAX_TOKENS)
            assert (request.tokens, request.failures()) == (expected, [])
            del nodes.running["reader"]
            await request.release()

    on_nodes(test, ROLES)


def test_copies_that_are_asked_for_before_an_answer_starts_are_kept():
    async def test(nodes):
        request = Request(nodes, "r", PROMPT, MAX_TOKENS)
        parts = [Part(FRONT, "first"), Part(BACK, "last")]
        early = decode("r", PROMPT, generation(MAX_TOKENS), [staged_answer(CUT, PROMPT, 1)[0]])
        early.stages.extend(nodes.stage(part) for part in parts)
        for part in parts:
            nodes.running[part.carrier].joined.send(decode=early)
        request.protect([Part(FRONT, "first", "last"), Part(BACK, "last", "first")])
        await request.begin("reader", request.parts)
        await request.protected(tokens=len(PROMPT) + 4)
        await request.read_tokens(MAX_TOKENS)
        assert (request.tokens, request.failures()) == (staged_answer(CUT, PROMPT, MAX_TOKENS), [])
        await request.release()

    on_nodes(test, ROLES)


def test_a_copy_of_what_does_not_run_here_is_refused_aloud():
    async def test(nodes):
        request = Request(nodes, "r", PROMPT, MAX_TOKENS)
        request.protect([Part(FRONT, "first", "last")])
        await eventually(lambda: copies_lost(nodes, "first"))
        [lost] = copies_lost(nodes, "first")
        assert (lost.holder_node_id, lost.message) == ("last", "no answer runs here")

    on_nodes(test, ROLES)

"""What stands in the way of an answer without ending it: later stages that let go, lost backups, no orchestrator."""

import time
from contextlib import AsyncExitStack

from edgellm.runtime.attempts import Attempts
from edgellm.runtime.kv.inbox import PromptPart
from edgellm.runtime.kv.types import Attempt, RequestId
from edgellm.runtime.rpc import cluster_pb2
from edgellm.runtime.stages import pipelines
from tests.runtime.conftest import attempt, decode, eventually, generation, orchestrating, random_prompt, staged_answer
from tests.runtime.takeover import Nodes, Part, Request, on_nodes

CUT, MAX_TOKENS, PROMPT = (2, 1), 60, random_prompt(70)
FRONT, BACK = range(2), range(2, 3)
WRITER = {"phase": "decode", "stage_layers": CUT}
ROLES = {"reader": {"phase": "prefill"}, "first": WRITER, "last": WRITER}


def copies_lost(nodes: Nodes, name: str) -> list[cluster_pb2.CopyLost]:
    events = nodes.running[name].joined.events
    return [event.copy_lost for event in events if event.WhichOneof("message") == "copy_lost"]


def breaks(nodes: Nodes, name: str) -> list[cluster_pb2.PipelineBroken]:
    events = nodes.running[name].joined.events
    return [event.pipeline_broken for event in events if event.WhichOneof("message") == "pipeline_broken"]


def test_a_node_knows_the_highest_epoch_it_has_heard_of():
    attempts = Attempts()
    attempts.enter(Attempt(request_id=RequestId("a"), epoch=5))
    attempts.release(Attempt(request_id=RequestId("b"), epoch=9))
    attempts.enter(Attempt(request_id=RequestId("c"), epoch=7))
    assert attempts.highest_epoch == 9


def test_what_is_stale_stays_so_when_the_orchestrator_is_gone():
    """A copy that hung in the network may arrive after another orchestrator has begun, which counts on free blocks."""
    attempts, released = Attempts(), Attempt(request_id=RequestId("b"), epoch=9)
    attempts.release(released)
    attempts.orchestrator_lost()
    attempts.welcome(first_epoch=0)
    assert not attempts.admits(released)
    assert attempts.answered(list) == []


def test_what_an_orchestrator_began_does_not_begin_once_it_is_gone():
    """The next one counts what the hello named, and its own."""
    live, never_heard_of = Attempt(request_id=RequestId("a"), epoch=5), Attempt(request_id=RequestId("b"), epoch=6)
    own = Attempt(request_id=RequestId("b"), epoch=100)
    attempts = Attempts()
    assert not attempts.admits(live)
    attempts.welcome(first_epoch=1)
    attempts.enter(live)
    attempts.orchestrator_lost()
    assert [attempts.admits(one) for one in (live, never_heard_of, own)] == [True, False, False]
    attempts.welcome(first_epoch=100)
    assert [attempts.admits(one) for one in (live, never_heard_of, own)] == [True, False, True]


def test_a_later_stage_that_let_go_stalls_the_answer_for_a_lease():
    async def test(nodes):
        request = Request(nodes, "r", PROMPT, MAX_TOKENS * 4)
        await request.begin("reader", [Part(FRONT, "first"), Part(BACK, "last")])
        await request.read_tokens(3)
        assert breaks(nodes, "first") == []
        nodes.running["last"].joined.send(release=cluster_pb2.Release(attempt=attempt("r")))
        await eventually(lambda: breaks(nodes, "first"))
        [broken] = breaks(nodes, "first")
        assert (broken.peer_node_id, list(broken.attempts)) == ("last", [attempt("r")])
        await eventually(request.failures)
        assert "nobody resumed it" in request.failures()[0].message
        pool = nodes.running["first"].server.ledger.pool
        assert pool.free_blocks == pool.num_blocks

    on_nodes(test, ROLES, lease_s=0.3)


def test_a_step_whose_command_never_comes_is_given_up_with_nothing_else_to_do(monkeypatch):
    monkeypatch.setattr(pipelines, "STEP_PATIENCE_S", 0.2)

    async def test(nodes):
        request = Request(nodes, "r", PROMPT, MAX_TOKENS)
        command = nodes.running["last"].joined
        with monkeypatch.context() as withheld:
            withheld.setattr(command, "send", lambda **_: None)
            await request.begin("reader", [Part(FRONT, "first"), Part(BACK, "last")])
        await eventually(lambda: breaks(nodes, "first"))
        await request.release()

    on_nodes(test, ROLES)


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
            if not breaks(nodes, "first"):
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


def test_a_holder_says_that_what_the_sender_left_unfinished_will_never_be_complete():
    async def test(nodes):
        last = nodes.running["last"]
        last.joined.send(release=cluster_pb2.Release(attempt=attempt("before")))
        await last.joined.wait_for("Released", "before")
        part = PromptPart(layers=FRONT, tokens=len(PROMPT), backup=True)
        one = Attempt(request_id=RequestId("r"), epoch=0)
        last.server._inbox.open(one, part, capacity_tokens=len(PROMPT) + 1)
        last.server._inbox.close(one, part)
        [lost] = await last.joined.wait_for("CopyLost", "r")
        assert (lost.attempt, lost.holder_node_id, lost.first_layer, lost.num_layers) == (attempt("r"), "last", 0, 2)
        last.joined.send(release=cluster_pb2.Release(attempt=attempt("r")))
        await last.joined.wait_for("Released", "r")

    on_nodes(test, ROLES)


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

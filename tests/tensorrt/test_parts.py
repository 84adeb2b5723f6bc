"""Networks of a part of the model: pipeline stages and tensor-parallel ranks compute what the whole does."""

import threading

import numpy as np
import pytest

from edgellm.builder.partition import cut_stages, shard


@pytest.mark.parametrize("precision", ["half", "int4"])
def test_stages_composed_are_the_whole(kit, form, precision):
    model = kit.model("llama with biases", precision)
    first, last = (kit.evaluated(form, model, kit.decode, graph=g) for g in cut_stages(model.graph, [1, 1]))
    whole = kit.evaluated(form, model, kit.decode)
    for step in kit.conversation():
        hidden = first.forward(step).hidden
        later = type(step)(**vars(step) | {"tokens": None, "hidden": hidden})
        np.testing.assert_array_equal(last.forward(later).logits, whole.forward(step).logits)


class Ranks:
    """Threads that meet to add up what they have, in rank order."""

    def __init__(self, world):
        self.barrier = threading.Barrier(world, timeout=60)
        self.parts = [None] * world

    def total(self, rank, x):
        self.parts[rank] = x.copy()
        self.barrier.wait()
        total = np.sum(self.parts, axis=0)
        self.barrier.wait()
        return total

    def add_up(self, rank):
        def in_place(x):
            x[:] = self.total(rank, x)

        return in_place


@pytest.mark.parametrize("collective", [True, False], ids=["in the network", "between networks"])
def test_ranks_together_are_the_whole(kit, form, collective):
    model, world, steps = kit.model("llama with biases", "half"), 2, kit.conversation()
    api, ranks, found = kit.offering(form, collective=collective), Ranks(2), [None, None]

    def run(rank):
        graph, weights = shard(model.graph, model.weights, rank, world)
        engine = kit.evaluated(
            api,
            type(model)(graph=graph, weights=weights),
            kit.prefill,
            all_reduce=lambda x: ranks.total(rank, x),
            sum_over_ranks=ranks.add_up(rank),
        )
        found[rank] = kit.logits(engine, steps)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = kit.logits(model.reference(), steps)
    assert max(kit.error(logits, expected) for logits in found) < 2e-5


def test_a_rank_alone_is_refused(kit, api):
    model = kit.model("llama with biases", "half")
    graph, weights = shard(model.graph, model.weights, 0, 2)
    engine = kit.evaluated(kit.offering(api, collective=False), type(model)(graph=graph, weights=weights), kit.prefill)
    with pytest.raises(ValueError, match="runs in a group"):
        engine.forward(kit.conversation()[0])

"""Slots hold copies of what the pool has: more sequences than slots, freed blocks and other writers change nothing."""

import numpy as np
import pytest

from edgellm.engines.tensorrt.slots import SlotTable


def test_the_copy_of_a_running_sequence_is_kept():
    table = SlotTable(num_slots=2, block_tokens=32)
    (loading,) = table.arrange([((7, 0), (3, 0))])
    assert loading.first_token == 0
    table.commit(loading.slot, ((7, 1), (3, 1)))
    (again,) = table.arrange([((7, 1), (3, 1))])
    assert (again.slot, again.first_token) == (loading.slot, 64)


def test_only_what_changed_is_loaded_again():
    table = SlotTable(num_slots=2, block_tokens=32)
    table.commit(table.arrange([((7, 0),)])[0].slot, ((7, 1), (3, 1), (4, 1)))
    assert table.arrange([((7, 1), (3, 2), (4, 1))])[0].first_token == 32


def test_a_step_that_failed_left_nothing_to_rely_on():
    table = SlotTable(num_slots=1, block_tokens=32)
    table.commit(table.arrange([((7, 0),)])[0].slot, ((7, 1),))
    table.arrange([((7, 1),)])
    assert table.arrange([((7, 1),)])[0].first_token == 0


def test_the_sequence_that_ran_longest_ago_gives_way():
    table = SlotTable(num_slots=2, block_tokens=32)
    slots = {}
    for block in (1, 2, 1, 3):
        slots[block] = table.arrange([((block, 0),)])[0].slot
        table.commit(slots[block], ((block, 0),))
    assert slots[3] == slots[2] != slots[1]


@pytest.mark.parametrize("sequences", [[((1, 0),), ((2, 0),), ((3, 0),)], [((1, 0), (2, 0)), ((2, 0),)]])
def test_what_cannot_run_is_refused(sequences):
    with pytest.raises(ValueError, match=r"2 slots|named twice"):
        SlotTable(num_slots=2, block_tokens=32).arrange(sequences)


def six_sequences(kit, tokens):
    """More than the four slots, each in a block of its own, in turn: a prompt each, then single tokens."""
    chunk, batch = kit.chunk, kit.batch_of
    prompts = [batch([chunk(tokens=tokens[s, :9], first_position=0, blocks=[s])]) for s in range(6)]
    return prompts + [
        batch([chunk(tokens=tokens[s, [position]], first_position=position, blocks=[s]) for s in group])
        for position in range(9, 13)
        for group in ((0, 1, 2), (3, 4, 5))
    ]


def test_more_sequences_than_slots(kit, form):
    model = kit.model("llama, tied", "half")
    steps = six_sequences(kit, np.random.default_rng(1).integers(0, 48, (6, 20)).astype(np.int32))
    found = kit.logits(kit.evaluated(form, model, kit.decode, rounds=True), steps)
    assert kit.error(found, kit.logits(model.reference(), steps)) < 0.01


def test_kv_from_elsewhere_is_seen(kit, form):
    """A block that another engine wrote, after this one ran on the same block at the same positions."""
    model = kit.model("gpt_neox", "half")
    decode = kit.evaluated(form, model, kit.decode, rounds=True)
    prefill = kit.evaluated(form, model, kit.prefill, rounds=True)
    tokens = np.random.default_rng(2).integers(0, 48, (2, 20)).astype(np.int32)
    prompts = [kit.batch_of([kit.chunk(tokens=row[:19], first_position=0, blocks=[5])]) for row in tokens]
    last = kit.batch_of([kit.chunk(tokens=tokens[1, 19:], first_position=19, blocks=[5])])
    kit.logits(decode, prompts[:1])
    kit.logits(prefill, prompts[1:])
    for layer in model_layers(model):
        decode.kv.write([5], layer, prefill.kv.read([5], layer))
    reference = model.reference()
    kit.logits(reference, prompts[1:])
    assert kit.error(kit.logits(decode, [last]), kit.logits(reference, [last])) < 0.01


def model_layers(model):
    return range(model.graph.num_layers)


def test_stored_keys_and_values_are_those_of_the_contract(kit, form):
    """What any engine of the bundle reads: compared with the interpreter's pool, up to half's rounding."""
    model = kit.model("qwen2", "half")
    engine = kit.evaluated(form, model, kit.prefill)
    steps = kit.conversation()
    kit.logits(engine, steps)
    reference = model.reference(float32_kv=False)
    kit.logits(reference, steps)
    for layer in model_layers(model):
        found, expected = (each.kv.read([3, 9, 4, 7], layer).view(np.float16) for each in (engine, reference))
        np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), atol=5e-3)

"""A row's bits depend on nothing but its own sequence: not on its company, on chunks, threads or stages."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.engines.base import Batch
from edgellm.engines.graph import Half, Int4

BLOCK = 32
SEQUENCES = 3
TOKENS = 70

lengths = st.lists(st.integers(1, TOKENS), min_size=1, max_size=SEQUENCES)
schedules = st.lists(st.lists(st.integers(0, 40), min_size=SEQUENCES, max_size=SEQUENCES), max_size=4)
seeds = st.integers(0, 2**16)


@pytest.fixture(scope="module", params=["half", "int4"])
def model(request, kit):
    if request.param == "half":
        return kit.model("llama", Half(), kit.sizes(hidden=72))
    precision = Int4(group_size=16, outliers=3)
    return kit.model("neox", precision, kit.sizes(hidden=80, intermediate=176, head_dim=12, rotary_dim=4))


@pytest.fixture(scope="module", params=["fp16", "int8"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def engine(model, loader, isa, dtype):
    return loader.cpu(model, isa=isa, dtype=dtype, threads=1)


def sequences_of(prompt_lengths, seed):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 101, length).astype(np.int32) for length in prompt_lengths]


def scattered_blocks(rng, count):
    """Blocks of `count` sequences, anywhere in the pool."""
    return rng.permutation(3 * count).reshape(count, 3).tolist()


def alone(kit, engine, tokens):
    """Logits of a sequence that runs by itself, token by token."""
    steps = [
        kit.batch_of([kit.chunk(tokens=tokens[at : at + 1], first_position=at, blocks=[0, 1, 2])])
        for at in range(len(tokens))
    ]
    return np.concatenate([kit.logits(engine, step) for step in steps])


def in_company(kit, engine, sequences, schedule, seed):
    """Logits of sequences that share steps; `schedule` says how many tokens of each a step takes."""
    blocks = scattered_blocks(np.random.default_rng(seed), len(sequences))
    done = [0] * len(sequences)
    parts = [[] for _ in sequences]
    for step in [*schedule, [TOKENS] * SEQUENCES]:
        taken = [min(count, len(tokens) - at) for count, tokens, at in zip(step, sequences, done, strict=False)]
        active = [index for index, count in enumerate(taken) if count]
        chunks = [
            kit.chunk(tokens=sequences[i][done[i] : done[i] + taken[i]], first_position=done[i], blocks=blocks[i])
            for i in active
        ]
        # A step takes at most `max_rows` rows: the sequences go one by one where they would be more.
        groups = [chunks] if sum(taken) <= kit.limits.max_rows else [[chunk] for chunk in chunks]
        found = [kit.logits(engine, kit.batch_of(group)) for group in groups if group]
        rows = iter(np.concatenate(found)) if found else iter(())
        for i in active:
            parts[i].append(np.stack([next(rows) for _ in range(taken[i])]))
            done[i] += taken[i]
    return [np.concatenate(part) for part in parts]


@settings(max_examples=25, deadline=None)
@given(prompt_lengths=lengths, schedule=schedules, seed=seeds)
def test_company_and_chunks_do_not_matter(kit, engine, prompt_lengths, schedule, seed):
    sequences = sequences_of(prompt_lengths, seed)
    found = in_company(kit, engine, sequences, schedule, seed)
    for tokens, rows in zip(sequences, found, strict=True):
        expected = alone(kit, engine, tokens)
        assert rows.tobytes() == expected.tobytes()


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_do_not_matter(kit, loader, model, isa, threads):
    sequences = sequences_of([70, 33, 1], 5)
    schedule = [[40, 20, 1], [1, 1, 0]]
    one = in_company(kit, loader.cpu(model, isa=isa, threads=1), sequences, schedule, 5)
    many = in_company(kit, loader.cpu(model, isa=isa, threads=threads), sequences, schedule, 5)
    assert [rows.tobytes() for rows in one] == [rows.tobytes() for rows in many]


def test_stage_cuts_do_not_matter(kit, loader, model, engine, isa, dtype):
    graphs = model.stages(1)
    first, second = (loader.cpu(model, graph, isa=isa, dtype=dtype, threads=2) for graph in graphs)
    tokens = np.arange(50) % 101
    for at, end in ((0, 37), (37, 49), (49, 50)):
        chunk = kit.chunk(tokens=tokens[at:end], first_position=at, blocks=[2, 7])
        batch = kit.batch_of([chunk])
        hidden = first.forward(batch).hidden
        later = Batch(**vars(batch) | {"tokens": None, "hidden": hidden})
        assert kit.logits(second, later).tobytes() == kit.logits(engine, batch).tobytes()

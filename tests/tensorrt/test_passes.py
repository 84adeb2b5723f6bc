"""Ragged batches as padded passes: whatever the batch, every row runs once, in order, within the network's bounds."""

from hypothesis import given
from hypothesis import strategies as st

from edgellm.engines.tensorrt.interface import Bounds
from edgellm.engines.tensorrt.passes import Rows, plan_passes


@st.composite
def batches(draw):
    """Sequences in different slots, and bounds."""
    slots = draw(st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True))
    sequences, start = [], 0
    for slot in slots:
        count = draw(st.integers(1, 40))
        wanted = tuple(start + row for row in sorted(draw(st.sets(st.integers(0, count - 1)))))
        position = draw(st.integers(0, 30))
        sequences.append(Rows(slot=slot, first_position=position, first_row=start, count=count, wanted=wanted))
        start += count
    bounds = Bounds(
        max_batch=draw(st.integers(1, 6)),
        max_chunk=draw(st.sampled_from([1, 2, 16])),
        max_seq_len=96,
        max_selected=draw(st.integers(1, 8)),
    )
    return sequences, bounds


@given(batches())
def test_every_row_runs_once_and_in_order(batch):
    sequences, bounds = batch
    runs = {sequence.slot: [] for sequence in sequences}
    for planned in plan_passes(sequences, num_slots=6, bounds=bounds):
        for piece in planned.pieces:
            assert piece.count > 0
            runs[piece.slot].append(piece)
    for sequence in sequences:
        rows = [(p.first_row + i, p.first_position + i) for p in runs[sequence.slot] for i in range(p.count)]
        begin, position = sequence.first_row, sequence.first_position
        assert rows == [(begin + i, position + i) for i in range(sequence.count)]
        assert tuple(row for piece in runs[sequence.slot] for row in piece.wanted) == sequence.wanted


@given(batches())
def test_passes_keep_the_bounds(batch):
    sequences, bounds = batch
    for planned in plan_passes(sequences, num_slots=6, bounds=bounds):
        slots = [piece.slot for piece in planned.pieces]
        assert len(set(slots)) == len(slots)
        assert all(planned.first_slot <= slot < planned.first_slot + planned.batch for slot in slots)
        assert all(piece.count <= planned.chunk <= bounds.max_chunk for piece in planned.pieces)
        if bounds.is_decode:
            assert (planned.first_slot, planned.batch) == (0, 6)
        else:
            assert planned.batch <= bounds.max_batch
            assert sum(len(piece.wanted) for piece in planned.pieces) <= bounds.max_selected
            assert planned.batch * planned.chunk <= 2 * sum(piece.count for piece in planned.pieces)

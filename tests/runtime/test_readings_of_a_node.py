"""What a node tells about itself: its speed over steps of all sizes, and which of its memory is shared."""

import numpy as np
import pytest

from edgellm.engines.kv import HostKvPool, KvContract
from edgellm.runtime.batching.prefill import PrefillBatcher
from edgellm.runtime.batching.steps import Segment, build_step
from edgellm.runtime.engine_loop import Progress
from edgellm.runtime.host import memory
from edgellm.runtime.kv.types import Attempt, RequestId
from edgellm.runtime.lanes import PlannedStep, PrefillLane
from tests.runtime.conftest import tiny_engine, tiny_pool


def step_of(lane: PrefillLane, rows: int) -> PlannedStep:
    segment = Segment(
        attempt=Attempt(request_id=RequestId("r"), epoch=0),
        rows=rows,
        tokens=np.zeros(rows, np.int32),
        first_position=0,
        blocks=np.zeros(4, np.int32),
        sample=None,
    )
    return PlannedStep(lane=lane, engine=lane.engine, step=build_step([segment]))


def test_the_speed_of_reading_is_rows_over_seconds():
    """Prompts of 133 tokens: 128 rows in 0.1 s, then 5 that take 0.05 s; their mean speed is far from the true one."""
    engine = tiny_engine("prefill", tiny_pool())
    lane = PrefillLane(engine=engine, batcher=PrefillBatcher(engine.spec.limits, max_batch_tokens=512, chunk_rows=128))
    progress = Progress()
    assert progress.prefill_tokens_per_s == 0
    for _ in range(50):
        progress.observe(step_of(lane, 128), 0.1)
        progress.observe(step_of(lane, 5), 0.05)
    assert progress.prefill_tokens_per_s == pytest.approx(133 / 0.15, rel=0.1)
    for _ in range(100):
        progress.observe(step_of(lane, 128), 0.4)
    assert progress.prefill_tokens_per_s == pytest.approx(128 / 0.4, rel=0.01)


def test_the_memory_of_a_pool_is_not_counted_as_shared():
    contract = KvContract(num_layers=4, kv_heads=4, head_dim=64)
    before = memory()
    pool = HostKvPool(contract, range(4), 512)
    pool.data[...] = 1
    taken = memory()
    assert taken.rss_bytes - before.rss_bytes > 0.9 * pool.data.nbytes
    assert taken.shared_bytes - before.shared_bytes < 0.1 * pool.data.nbytes

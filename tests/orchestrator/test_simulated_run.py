"""Modelled devices: figures without noise, from whole processes in simulated time."""

from dataclasses import replace

from edgellm.orchestrator.sim.run import RunConfig, simulate

SATURATED = RunConfig(
    rate=1000.0, count=48, prompt_tokens=32, max_tokens=96, decode_nodes=1, kv_blocks=32, hot_copies=False
)
"""Eight answers fit a device that holds all layers."""


def test_two_stages_on_two_devices_are_at_least_1_6_times_as_fast_as_one():
    """Each device holds the KV of twice as many answers, and works on one half while the other has the other half."""
    one = simulate(SATURATED)
    two = simulate(replace(SATURATED, decode_nodes=2, decode_stages=2))
    assert one.failed == two.failed == 0
    assert two.tokens_per_s >= 1.6 * one.tokens_per_s


def test_a_run_is_the_same_every_time():
    few = replace(SATURATED, count=4, max_tokens=8)
    assert simulate(few) == simulate(few)

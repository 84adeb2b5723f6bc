"""Finished networks, evaluated layer by layer, compute what the graph says: held to the NumPy interpreter."""

import pytest


@pytest.mark.parametrize("precision", ["half", "int4"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_network_equals_the_interpreter(kit, form, kind, precision, phase):
    """In float32 only the order of sums differs."""
    model = kit.model(kind, precision)
    engine = kit.evaluated(form, model, kit.prefill if phase == "prefill" else kit.decode)
    steps = kit.conversation()
    assert kit.error(kit.logits(engine, steps), kit.logits(model.reference(), steps)) < 2e-5


def test_rounding_to_half_costs_little(kit, form, kind):
    """Every half tensor rounded, caches too: what a device may lose, not counting sums kept in half."""
    model = kit.model(kind, "int4")
    engine = kit.evaluated(form, model, kit.prefill, rounds=True)
    steps = kit.conversation()
    assert 1e-5 < kit.error(kit.logits(engine, steps), kit.logits(model.reference(), steps)) < 0.01

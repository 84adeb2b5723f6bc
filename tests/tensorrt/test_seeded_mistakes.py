"""Mistakes put into the emitter on purpose: the comparison that passes without them must fail with each."""

import numpy as np
import pytest

from edgellm.engines.tensorrt import attention, layers, linear
from edgellm.engines.tensorrt.step import Step


def wrong_axis(monkeypatch):
    """Norms take their mean over rows instead of channels."""
    right = layers.Layers.mean
    monkeypatch.setattr(layers.Layers, "mean", lambda self, x, axis: right(self, x, 1 - axis))


def wrong_scale_axis(monkeypatch):
    """Group scales are laid out by output channel instead of by group."""
    right = linear.to_half

    def reshaped(values, what):
        half = right(values, what)
        return half.T.reshape(half.shape) if what.startswith("the scale of") and half.ndim == 2 else half

    monkeypatch.setattr(linear, "to_half", reshaped)


def wrong_nibble_order(monkeypatch):
    """The earlier value of a pair goes into the high nibble."""
    right = layers.pack_nibbles
    monkeypatch.setattr(layers, "pack_nibbles", lambda q: right(q.reshape(-1, 2)[:, ::-1]))


def wrong_mask(monkeypatch):
    """Rows do not see themselves, or in a decode network the token before."""
    one_less = property(lambda self: self.positions)
    monkeypatch.setattr(Step, "after", one_less)
    monkeypatch.setattr(
        attention.FusedAttention,
        "_one_row",
        lambda self, op, *qkv: self._softmax(op, *qkv, "UPPER_LEFT").get_output(0),
    )


def wrong_position(monkeypatch):
    """Rotation is one position ahead. Logits do not tell, since only distances count; the stored keys do."""

    def ahead(writer, op, positions):
        angles = np.arange(1, positions + 1, dtype=np.float32)[:, None] * np.asarray(op.inv_freq, np.float32)
        return writer.constant("cos", np.cos(angles)), writer.constant("sin", np.sin(angles))

    monkeypatch.setattr(attention, "rotation_tables", ahead)


def wrong_attention_scale(monkeypatch):
    """Queries are divided by the head size instead of its root."""
    right = layers.Layers.constant

    def squared(self, name, values):
        return right(self, name, values * values if name.startswith("scale ") else values)

    monkeypatch.setattr(layers.Layers, "constant", squared)


MISTAKES = [wrong_axis, wrong_scale_axis, wrong_nibble_order, wrong_mask, wrong_position, wrong_attention_scale]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_mistake_is_caught(kit, form, mistake, phase, monkeypatch):
    if mistake is not None:
        mistake(monkeypatch)
    model = kit.model("llama with biases", "int4")
    engine = kit.evaluated(form, model, kit.prefill if phase == "prefill" else kit.decode)
    steps = kit.conversation()
    reference = model.reference(float32_kv=False)
    with np.errstate(invalid="ignore"):
        error = kit.error(kit.logits(engine, steps), kit.logits(reference, steps))
    keys_error = kit.error(stored_keys(engine), stored_keys(reference))
    assert (max(error, keys_error) < 5e-3) if mistake is None else (max(error, keys_error) > 5e-2)


def stored_keys(engine):
    """Of the second conversation, all of it but the last block's unwritten end."""
    blocks = [engine.kv.read([4, 7], layer).view(np.float16).reshape(2, 2, 32, -1) for layer in engine.kv.layers]
    keys = np.stack(blocks)[:, :, 0].reshape(len(blocks), 64, -1)
    return keys[:, :35].astype(np.float32)

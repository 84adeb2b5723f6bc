"""A model of hashes: its next token depends on every token and every bit of KV before it.

An engine of it keeps the contract of all engines, on the pool that all engines in host memory use. Layer l turns the
state h of a row at position p into

    K[l, p] = mix(h + key),  V[l, p] = K[l, p] xor value,  h' = mix(h + sum of a[q] K[l, q] + b[q] V[l, q], q <= p)

over 64-bit integers, with weights a, b by position and a key by layer and phase. So lost, stale, doubled, shifted or
swapped KV changes the text, and so does KV of a token that the wrong engine computed.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import pairwise
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from edgellm.engines.base import Batch, Output
from edgellm.engines.kv import HostKvPool, KvContract
from edgellm.engines.sampling import SamplingParams, sample
from edgellm.engines.spec import EngineLimits, EngineSpec, Phase
from edgellm.orchestrator.sim.device import DeviceModel

VOCAB: Final = 89
"""Tokens that are ever generated; prompts may have all of VOCAB_SIZE."""
VOCAB_SIZE: Final = 257
HIDDEN_SIZE: Final = 6
MAX_SEQ_LEN: Final = 2048
LIMITS: Final = EngineLimits(max_rows=512, max_sequences=64, max_seq_len=MAX_SEQ_LEN)

Words: TypeAlias = npt.NDArray[np.uint64]
Spend: TypeAlias = Callable[[float, Callable[[], None]], None]
"""Lets seconds pass, then calls what it was given. Raises ValueError on a device without memory."""

_WORDS_PER_BLOCK: Final = 32


def toy_contract(num_layers: int) -> KvContract:
    """One 64-bit word of K and one of V per token and layer."""
    return KvContract(num_layers=num_layers, kv_heads=1, head_dim=4)


def toy_spec(phase: Phase, layers: range, num_layers: int) -> EngineSpec:
    """An engine of some layers of a model of `num_layers`, as a bundle cut into equal stages names it."""
    world = num_layers // len(layers)
    rank = layers.start // len(layers)
    return EngineSpec(
        name=f"prefill-tp{rank}of{world}" if phase == "prefill" else f"decode-pp{rank}of{world}",
        phase=phase,
        backend="reference",
        backend_version="toy",
        device_class="cpu-local",
        first_layer=layers.start,
        num_layers=len(layers),
        rank=rank,
        world=world,
        precision="toy",
        hidden_size=HIDDEN_SIZE,
        vocab_size=VOCAB_SIZE,
        limits=LIMITS,
        files=(),
    )


class ToyEngine:
    """KV is read when a step starts, and written when it ends."""

    def __init__(self, spec: EngineSpec, pool: HostKvPool, device: DeviceModel, spend: Spend) -> None:
        self.spec = spec
        self.kv = pool
        self._share = spec.num_layers / pool.contract.num_layers
        self._device = device
        self._spend = spend
        self._words = pool.data.view(np.uint64).reshape(len(pool.layers), -1)

    def forward(self, batch: Batch) -> Output:
        starts = batch.row_starts.tolist()
        states = _embed(batch) if batch.hidden is None else _from_hidden(batch.hidden)
        writes: list[Callable[[], None]] = []
        for sequence, (start, end) in enumerate(pairwise(starts)):
            first, table = int(batch.first_positions[sequence]), batch.block_tables[sequence]
            states[start:end] = self._sequence(states[start:end], first, table, writes)

        def write() -> None:
            for one in writes:
                one()

        self._spend(self._device.seconds(self.spec.phase, len(states), self._share), write)
        if self.spec.first_layer + self.spec.num_layers < self.kv.contract.num_layers:
            return Output(logits=None, hidden=_to_hidden(states))
        return Output(logits=_logits(states[batch.logit_rows]), hidden=None)

    def close(self) -> None:
        """Nothing is held."""

    def _sequence(
        self, states: Words, first: int, table: npt.NDArray[np.int32], writes: list[Callable[[], None]]
    ) -> Words:
        """states [rows] of one sequence through all layers."""
        end = first + len(states)
        at_k = table[_BLOCKS[:end]] * (2 * _WORDS_PER_BLOCK) + _SLOTS[:end]
        at_v = at_k + _WORDS_PER_BLOCK
        for layer in range(self.spec.first_layer, self.spec.first_layer + self.spec.num_layers):
            words = self._words[layer - self.kv.layers.start]
            k, v = words[at_k], words[at_v]
            k[first:] = _mix(states + _KEYS[2 * layer + (self.spec.phase == "prefill")])
            v[first:] = k[first:] ^ _VALUE
            writes.append(partial(_write, words, at_k[first:], k[first:], at_v[first:], v[first:]))
            read = np.add.accumulate(k * _K_WEIGHTS[:end] + v * _V_WEIGHTS[:end])
            states = _mix(states + read[first:])
        return states


class Oracle:
    """One answer without a cluster: the prompt through one engine, each token through the decode engine."""

    def __init__(self, prompt: Sequence[int], num_layers: int, *, read_by: Phase = "prefill") -> None:
        contract, layers = toy_contract(num_layers), range(num_layers)
        pool = HostKvPool(contract, layers, contract.blocks_for(MAX_SEQ_LEN))
        self._decode = ToyEngine(toy_spec("decode", layers, num_layers), pool, _INSTANT, _at_once)
        reader = ToyEngine(toy_spec(read_by, layers, num_layers), pool, _INSTANT, _at_once)
        self._history = list(prompt)
        self._num_prompt = len(prompt)
        self._logits = reader.forward(_batch(prompt, 0)).logits

    def next(self, sampling: SamplingParams) -> int:
        """The next token of the answer."""
        assert self._logits is not None
        history, index = np.array(self._history, np.int32), len(self._history) - self._num_prompt
        return int(sample(self._logits, [sampling], [history], [index])[0][0])

    def feed(self, token: int) -> None:
        """Go on after this token."""
        self._logits = self._decode.forward(_batch([token], len(self._history))).logits
        self._history.append(token)


def expected_answer(
    prompt: Sequence[int],
    max_tokens: int,
    *,
    num_layers: int,
    sampling: SamplingParams,
    stop_token_ids: Collection[int] = (),
) -> list[int]:
    """What a request must get, whatever happens to the cluster, where half precision reads its prompt."""
    oracle = Oracle(prompt, num_layers)
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        tokens.append(oracle.next(sampling))
        if tokens[-1] in stop_token_ids:
            break
        oracle.feed(tokens[-1])
    return tokens


_INSTANT: Final = DeviceModel(read_token_s=0.0, step_s=0.0, row_s=0.0, overhead_s=0.0)


def _at_once(seconds: float, effect: Callable[[], None]) -> None:
    effect()


def _batch(tokens: Sequence[int], first_position: int) -> Batch:
    """The only sequence, in the first blocks of the pool."""
    return Batch(
        tokens=np.array(tokens, np.int32),
        hidden=None,
        row_starts=np.array([0, len(tokens)], np.int32),
        first_positions=np.array([first_position], np.int32),
        block_tables=np.arange(MAX_SEQ_LEN // _WORDS_PER_BLOCK, dtype=np.int32)[None],
        logit_rows=np.array([len(tokens) - 1], np.int32),
    )


def _embed(batch: Batch) -> Words:
    assert batch.tokens is not None
    lengths = batch.row_starts[1:] - batch.row_starts[:-1]
    positions = np.arange(len(batch.tokens)) + np.repeat(batch.first_positions - batch.row_starts[:-1], lengths)
    return _mix(batch.tokens.astype(np.uint64) * _K_WEIGHTS[0] + positions.astype(np.uint64))


def _to_hidden(states: Words) -> npt.NDArray[np.float32]:
    """[rows] -> [rows, HIDDEN_SIZE], digits that half precision does not round."""
    digits = (states[:, None] >> _SHIFTS) & np.uint64((1 << 11) - 1)
    return digits.astype(np.float32)


def _from_hidden(hidden: npt.NDArray[np.float32]) -> Words:
    words: Words = (hidden.astype(np.uint64) << _SHIFTS).sum(axis=1, dtype=np.uint64)
    return words


def _logits(states: Words) -> npt.NDArray[np.float32]:
    """[rows] -> [rows, VOCAB_SIZE], of which the first VOCAB can be chosen."""
    logits = np.full((len(states), VOCAB_SIZE), -1e4, np.float32)
    logits[:, :VOCAB] = (_mix(states[:, None] + _VOCAB_KEYS) >> np.uint64(40)).astype(np.float32) / (1 << 22)
    return logits


def _write(words: Words, at_k: npt.NDArray[np.int64], k: Words, at_v: npt.NDArray[np.int64], v: Words) -> None:
    words[at_k] = k
    words[at_v] = v


def _mix(words: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    words = (words ^ (words >> _MIX_SHIFTS[0])) * _MIX_FACTORS[0]
    words = (words ^ (words >> _MIX_SHIFTS[1])) * _MIX_FACTORS[1]
    mixed: Words = words ^ (words >> _MIX_SHIFTS[2])
    return mixed


def _odd(first: int, count: int) -> Words:
    """Words to multiply with, that lose nothing."""
    return _mix(np.arange(first, first + count, dtype=np.uint64)) | np.uint64(1)


_MIX_SHIFTS: Final[Words] = np.array([[30], [27], [31]], np.uint64)
_MIX_FACTORS: Final[Words] = np.array([[0xBF58476D1CE4E5B9], [0x94D049BB133111EB]], np.uint64)
_BLOCKS: Final = np.arange(MAX_SEQ_LEN) // _WORDS_PER_BLOCK
_SLOTS: Final = np.arange(MAX_SEQ_LEN) % _WORDS_PER_BLOCK
_SHIFTS: Final = np.arange(HIDDEN_SIZE, dtype=np.uint64) * np.uint64(11)
_K_WEIGHTS: Final = _odd(1 << 20, MAX_SEQ_LEN)
_V_WEIGHTS: Final = _odd(2 << 20, MAX_SEQ_LEN)
_KEYS: Final = _odd(3 << 20, 256)[:, None]
_VALUE: Final = _odd(4 << 20, 1)
_VOCAB_KEYS: Final = _odd(5 << 20, VOCAB)

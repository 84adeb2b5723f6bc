"""KV is cut completely, travels through every codec within its bounds, and lands where it belongs."""

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from edgellm.engines.kv import HostKvPool, KvContract
from edgellm.runtime.kv.chunks import KvRange, cut, sendable_tokens
from edgellm.runtime.kv.codecs import FIRST_TOKENS_IN_HALF, CodecError, codec_names, decode, encode
from edgellm.runtime.kv.planes import gather, plane_widths, scatter

contracts = st.builds(
    KvContract,
    num_layers=st.integers(1, 5),
    kv_heads=st.integers(1, 4),
    head_dim=st.sampled_from([4, 8]),
    dtype=st.sampled_from(["fp16", "int8"]),
)


def filled_pool(contract: KvContract, blocks: int, seed: int = 0) -> HostKvPool:
    pool = HostKvPool(contract, range(contract.num_layers), blocks)
    rng = np.random.default_rng(seed)
    if contract.dtype == "fp16":
        values = rng.normal(0, 3, pool.data.size // 2).astype(np.float16)
        pool.data[...] = values.view(np.uint8).reshape(pool.data.shape)
    else:
        pool.data[...] = rng.integers(0, 256, pool.data.shape, np.uint8)
    return pool


@given(contracts, st.integers(1, 300), st.integers(1, 60_000), st.data())
def test_cut_covers_each_layer_and_token_once(contract, prompt_tokens, max_bytes, data):
    computed = data.draw(st.integers(0, prompt_tokens))
    first = sendable_tokens(contract, computed=computed, prompt_tokens=prompt_tokens)
    assert first % contract.block_tokens == 0 or first == prompt_tokens
    seen = np.zeros((contract.num_layers, prompt_tokens), int)
    for tokens in (range(first), range(first, prompt_tokens)):
        for where in cut(contract, tokens, range(contract.num_layers), range(contract.kv_heads), max_bytes=max_bytes):
            seen[where.layers.start : where.layers.stop, where.tokens.start : where.tokens.stop] += 1
            assert where.tokens.start % contract.block_tokens == 0
            stored = len(where.layers) * len(where.blocks(contract)) * contract.block_bytes
            assert stored <= max_bytes or stored == contract.block_bytes
    assert (seen == 1).all()


@given(contracts, st.integers(1, 150), st.data())
def test_ranges_arrive_in_other_blocks_bit_for_bit(contract, tokens, data):
    source, target = filled_pool(contract, 8), filled_pool(contract, 8, seed=1)
    source_blocks, target_blocks = source.allocate(5), list(reversed(target.allocate(5)))
    head_cut = data.draw(st.integers(0, contract.kv_heads))
    before_other = target.data.copy()
    for heads in (range(head_cut), range(head_cut, contract.kv_heads)):
        if heads:
            for where in cut(contract, range(tokens), range(contract.num_layers), heads, max_bytes=1 << 12):
                encoded = encode("raw", contract, where, gather(source, source_blocks, where))
                assert len(encoded) == np.prod(where.shape) * sum(plane_widths(contract))
                scatter(target, target_blocks, where, decode("raw", contract, where, encoded))
    everything = KvRange(layers=range(contract.num_layers), heads=range(contract.kv_heads), tokens=range(tokens))
    for sent, arrived in zip(
        gather(source, source_blocks, everything), gather(target, target_blocks, everything), strict=True
    ):
        assert np.array_equal(sent, arrived)
    unused = [block for block in range(8) if block not in target_blocks[: contract.blocks_for(tokens)]]
    assert np.array_equal(target.data[:, unused], before_other[:, unused])


@given(st.integers(0, 3), st.integers(1, 100), st.sampled_from(["int8", "int8+zstd"]), st.integers(0, 100))
def test_int8_error_is_half_a_step_and_first_tokens_are_exact(first_block, tokens, codec, seed):
    contract = KvContract(num_layers=2, kv_heads=2, head_dim=8)
    pool = filled_pool(contract, 8, seed)
    where = KvRange(layers=range(2), heads=range(2), tokens=range(first_block * 32, first_block * 32 + tokens))
    planes = gather(pool, pool.allocate(8), where)
    encoded = encode(codec, contract, where, planes)
    for name, sent, arrived in zip("kv", planes, decode(codec, contract, where, encoded), strict=True):
        exact, got = (plane.view(np.float16).astype(np.float32) for plane in (sent, arrived))
        # K: one scale per channel over a block of 32 tokens; V: one per token over channels.
        starts = range(0, tokens, 32)
        largest = (
            np.concatenate([np.abs(exact[:, s : s + 32]).max(1, keepdims=True).repeat(
                min(32, tokens - s), axis=1) for s in starts], axis=1)
            if name == "k"
            else np.abs(exact).max(3, keepdims=True)
        )  # fmt: skip
        step = largest / 127 * (1 + 2**-10)
        assert (np.abs(got - exact) <= step / 2 + np.abs(exact) * 2**-11 + 1e-7).all()
        kept = max(0, FIRST_TOKENS_IN_HALF - where.tokens.start)
        assert np.array_equal(got[:, :kept], exact[:, :kept])


def test_int8_halves_the_bytes():
    contract = KvContract(num_layers=2, kv_heads=2, head_dim=64)
    pool = filled_pool(contract, 8)
    where = KvRange(layers=range(2), heads=range(2), tokens=range(256))
    planes = gather(pool, pool.allocate(8), where)
    sizes = {codec: len(encode(codec, contract, where, planes)) for codec in codec_names(contract)}
    assert sizes["int8"] < 0.56 * sizes["raw"]


@pytest.mark.parametrize("codec", codec_names(KvContract(num_layers=1, kv_heads=1, head_dim=4)))
def test_wrong_sizes_are_refused(codec):
    contract = KvContract(num_layers=1, kv_heads=1, head_dim=4)
    pool = filled_pool(contract, 2)
    where = KvRange(layers=range(1), heads=range(1), tokens=range(40))
    encoded = encode(codec, contract, where, gather(pool, pool.allocate(2), where))
    for damaged in (encoded[:-1], b"", encoded * 2 if "zstd" not in codec else b"\x00" + encoded):
        with pytest.raises(CodecError):
            decode(codec, contract, where, damaged)


def test_the_size_a_zstd_frame_declares_is_checked_before_memory_is_taken():
    """A frame header of 13 bytes: magic number, 8 bytes of size follow, one segment, the size; then an empty block."""
    contract = KvContract(num_layers=1, kv_heads=1, head_dim=4)
    where = KvRange(layers=range(1), heads=range(1), tokens=range(32))
    huge = bytes.fromhex("28b52ffd e0") + (1 << 46).to_bytes(8, "little") + b"\x01\x00\x00"
    undeclared = zstandard.ZstdCompressor(write_content_size=False).compress(b"x" * 512)
    for forged in (huge, undeclared):
        with pytest.raises(CodecError, match="declares"):
            decode("raw+zstd", contract, where, forged)


def test_codecs_that_cannot_carry_a_contract_are_refused():
    contract = KvContract(num_layers=1, kv_heads=1, head_dim=4, dtype="int8")
    where = KvRange(layers=range(1), heads=range(1), tokens=range(1))
    with pytest.raises(CodecError, match="int8 KV"):
        encode("int8", contract, where, [])
    with pytest.raises(CodecError, match="'int3'"):
        decode("int3", contract, where, b"")

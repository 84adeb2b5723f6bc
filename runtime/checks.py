"""Whether a node can carry out a command at all."""

from edgellm.engines.sampling import SamplingError
from edgellm.engines.spec import EngineSpec
from edgellm.runtime.kv.ledger import BlockLedger
from edgellm.runtime.messages import Decode, FailureKind, Prefill


class RefusedError(Exception):
    """A command that this node cannot carry out."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind: FailureKind = kind


def check_request(spec: EngineSpec, command: Prefill | Decode) -> None:
    """Raise RefusedError for tokens, lengths or sampling values that the engine cannot take."""
    num_prompt, max_tokens = len(command.prompt), command.generation.max_tokens
    if not num_prompt or max_tokens < 1:
        raise RefusedError("request", f"{num_prompt} prompt tokens, at most {max_tokens} to generate")
    if num_prompt + max_tokens > spec.limits.max_seq_len:
        raise RefusedError("request", f"{num_prompt} + {max_tokens} tokens exceed {spec.limits.max_seq_len}")
    for tokens in (command.prompt, command.generated):
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < spec.vocab_size:
            raise RefusedError("request", f"a token id is outside of the vocabulary of {spec.vocab_size}")
    try:
        command.generation.sampling.validate(spec.vocab_size)
    except SamplingError as error:
        raise RefusedError("request", str(error)) from error


def check_known_tokens(decode: Decode) -> None:
    """Raise RefusedError unless there is a token to go on from, and one left to generate."""
    if not 0 < len(decode.generated) < decode.generation.max_tokens:
        raise RefusedError("request", f"{len(decode.generated)} of {decode.generation.max_tokens} tokens are known")


def check_capacity(ledger: BlockLedger, tokens: int) -> None:
    """Raise RefusedError if not even an empty pool could hold the tokens."""
    if not ledger.ever_fits(tokens):
        pool = ledger.pool
        block_tokens = pool.contract.block_tokens
        raise RefusedError("capacity", f"{tokens} tokens do not fit {pool.num_blocks} blocks of {block_tokens}")

"""The tokenizer in a GGUF file's metadata, as a tokenizer.json."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers, processors

from edgellm.builder.checkpoint.errors import CheckpointError
from edgellm.builder.checkpoint.gguf_config import Field
from edgellm.builder.checkpoint.tokenizer import TokenizerFiles
from edgellm.engines.generation import Generation

_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r"})
"""Values of `tokenizer.ggml.pre` that cut numbers into digits before anything else."""


def read_gguf_tokenizer(path: Path, field: Field) -> TokenizerFiles:
    """Raises CheckpointError for a vocabulary kind that `transformers` cannot convert."""
    generation = _read_generation(field)
    tokenizer = _convert(path)
    if field("tokenizer.ggml.pre") in _SINGLE_DIGITS:
        _split_digits(tokenizer)
    if _starts_with_bos(field) and generation.bos_token_id is not None:
        _prepend_bos(tokenizer, generation)
    return TokenizerFiles(
        tokenizer_json=tokenizer.to_str(), chat_template=field("tokenizer.chat_template"), generation=generation
    )


def _convert(path: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        converted: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            path, f"its tokenizer does not convert ({error})", "pass the folder of the original model instead"
        ) from error
    tokenizer: Tokenizer = converted.backend_tokenizer
    return tokenizer


def _read_generation(field: Field) -> Generation:
    """A GGUF file recommends no sampling. `eot` ends a chat turn where that is another token than `eos`."""
    tokens = field("tokenizer.ggml.tokens")
    bos, eos = field("tokenizer.ggml.bos_token_id"), field("tokenizer.ggml.eos_token_id")
    ends = [token for token in (eos, field("tokenizer.ggml.eot_token_id")) if token is not None]
    return Generation(
        bos_token_id=bos,
        eos_token_ids=tuple(dict.fromkeys(ends)),
        bos_token="" if bos is None else tokens[bos],
        eos_token="" if eos is None else tokens[eos],
    )


def _starts_with_bos(field: Field) -> bool:
    """llama.cpp's default: SentencePiece vocabularies do, byte-level ones do not."""
    stated = field("tokenizer.ggml.add_bos_token")
    return bool(field("tokenizer.ggml.model") == "llama" if stated is None else stated)


def _split_digits(tokenizer: Tokenizer) -> None:
    """`transformers` builds GPT-2's splitting only, which cuts the spaces before a number differently."""
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _prepend_bos(tokenizer: Tokenizer, generation: Generation) -> None:
    bos = generation.bos_token
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, generation.bos_token_id)]
    )

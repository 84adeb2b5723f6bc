"""The tokenizer in a GGUF file's metadata, as a tokenizer.json.

Byte-level vocabularies whose way of splitting text is known here are put together directly; others are left to
`transformers`, which takes longer.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from edgellm.builder.checkpoint.errors import CheckpointError
from edgellm.builder.checkpoint.gguf_config import Metadata
from edgellm.builder.checkpoint.tokenizer import TokenizerFiles
from edgellm.engines.generation import Generation

_WORDS = frozenset({"default", "gpt-2"})
"""Values of `tokenizer.ggml.pre` that split text as GPT-2 does."""
_DIGITS_THEN_WORDS = frozenset({"smollm", "starcoder", "refact", "command-r"})
"""Those that cut numbers into digits before that."""
_CONTROL, _USER_DEFINED = 3, 4


def read_gguf_tokenizer(path: Path, metadata: Metadata) -> TokenizerFiles:
    """Raises CheckpointError for a kind of vocabulary that cannot be converted."""
    generation = _read_generation(metadata)
    splitting = metadata.get("tokenizer.ggml.pre", "default")
    if metadata.get("tokenizer.ggml.model") == "gpt2" and splitting in _WORDS | _DIGITS_THEN_WORDS:
        tokenizer = _byte_level(metadata, cut_digits=splitting in _DIGITS_THEN_WORDS)
    else:
        tokenizer = _convert(path)
    if _starts_with_bos(metadata) and generation.bos_token_id is not None:
        _prepend_bos(tokenizer, generation)
    template = metadata.get("tokenizer.chat_template")
    return TokenizerFiles(tokenizer_json=tokenizer.to_str(), chat_template=template, generation=generation)


def _byte_level(metadata: Metadata, *, cut_digits: bool) -> Tokenizer:
    """Byte-level BPE (GPT-2). Control tokens are special; user-defined ones are only matched whole."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words]) if cut_digits else words
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    for token, kind in zip(tokens, kinds, strict=False):
        if kind in (_CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == _CONTROL)])
    return tokenizer


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


def _read_generation(metadata: Metadata) -> Generation:
    """A GGUF file recommends no sampling. `eot` ends a chat turn where that is another token than `eos`."""
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    bos, eos = metadata.get("tokenizer.ggml.bos_token_id"), metadata.get("tokenizer.ggml.eos_token_id")
    ends = [token for token in (eos, metadata.get("tokenizer.ggml.eot_token_id")) if token is not None]
    return Generation(
        bos_token_id=bos,
        eos_token_ids=tuple(dict.fromkeys(ends)),
        bos_token="" if bos is None else tokens[bos],
        eos_token="" if eos is None else tokens[eos],
    )


def _starts_with_bos(metadata: Metadata) -> bool:
    """llama.cpp's default: SentencePiece vocabularies do, byte-level ones do not."""
    is_sentencepiece = metadata.get("tokenizer.ggml.model") == "llama"
    return bool(metadata.get("tokenizer.ggml.add_bos_token", is_sentencepiece))


def _prepend_bos(tokenizer: Tokenizer, generation: Generation) -> None:
    bos = generation.bos_token
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, generation.bos_token_id)]
    )

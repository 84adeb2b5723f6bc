"""A model as a Hugging Face folder in bf16: what every converter starts from."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from edgellm.builder.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from bench.peers.models import Model

MAX_POSITIONS = 8192
WEIGHT_SPREAD = 0.02


def write(model: "Model", gguf: Path | None, folder: Path) -> None:
    """Random weights and a tokenizer of bytes, or the weights and the tokenizer of a GGUF file."""
    if gguf is None:
        _write_random(model, folder)
    else:
        _write_real(gguf, folder)


def _write_random(model: "Model", folder: Path) -> None:
    config = LlamaConfig(
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.kv_heads,
        vocab_size=model.vocab_size,
        tie_word_embeddings=model.tied_embeddings,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=WEIGHT_SPREAD,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        LlamaForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    _byte_tokenizer().save_pretrained(folder)


def _write_real(gguf: Path, folder: Path) -> None:
    checkpoint = open_checkpoint(str(gguf))
    checkpoint.load_torch().to(torch.bfloat16).save_pretrained(folder)
    checkpoint.write_tokenizer(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    tokenizer.save_pretrained(folder)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, after two special ones: enough for programs that insist on a tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")

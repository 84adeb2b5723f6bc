"""What a checkpoint gives a node besides weights: tokenizer, chat template, special tokens, sampling defaults."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgellm.builder.checkpoint import open_checkpoint
from edgellm.builder.checkpoint.tokenizer import read_generation
from edgellm.engines.generation import Generation


def generation_of(fields: dict[str, Any]) -> Generation:
    return read_generation(fields, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(("eos", "expected"), [(2, (2,)), ([2, 7, 2], (2, 7)), (None, ())])
def test_eos_may_be_one_or_several(eos: object, expected: tuple[int, ...]) -> None:
    assert generation_of({"bos_token_id": 1, "eos_token_id": eos}).eos_token_ids == expected


def test_sampling_defaults_hold_only_where_sampling_is_on() -> None:
    fields = {"temperature": 0.6, "top_k": 0, "top_p": 0.9, "repetition_penalty": 1.1}
    greedy, sampled = generation_of(fields), generation_of(fields | {"do_sample": True})
    assert (greedy.temperature, greedy.top_k, greedy.top_p, greedy.repetition_penalty) == (0.0, 0, 1.0, 1.1)
    assert (sampled.temperature, sampled.top_k, sampled.top_p, sampled.min_p) == (0.6, 0, 0.9, 0.0)
    unstated = generation_of({"do_sample": True})
    assert (unstated.temperature, unstated.top_k) == (1.0, 50)


def test_written_files_read_back(shared_models: Path, tmp_path: Path) -> None:
    source = shared_models / "stories260K"
    open_checkpoint(str(source)).write_tokenizer(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    generation = msgspec.json.decode((tmp_path / "generation.json").read_bytes(), type=Generation)
    assert generation == Generation(bos_token_id=1, eos_token_ids=(1, 2), bos_token="<s>", eos_token="</s>")
    assert not (tmp_path / "chat_template.jinja").exists()


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("{{ one }}", "{{ one }}"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        (None, None),
    ],
)
def test_chat_template_in_the_tokenizer_config(
    stated: object, expected: str | None, shared_models: Path, tmp_path: Path
) -> None:
    for path in (shared_models / "stories260K").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = {"chat_template": stated, "bos_token": {"content": "<bos>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = open_checkpoint(str(tmp_path)).tokenizer
    assert tokenizer.chat_template == expected
    assert (tokenizer.generation.bos_token, tokenizer.generation.eos_token) == ("<bos>", "")
    (tmp_path / "chat_template.jinja").write_text("{{ file }}")
    assert open_checkpoint(str(tmp_path)).tokenizer.chat_template == "{{ file }}"

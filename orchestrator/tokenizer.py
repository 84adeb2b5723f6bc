"""The served model's tokenizer folder: text and chats to tokens, tokens to text."""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jinja2
import jinja2.sandbox
import msgspec
from tokenizers import Tokenizer

from edgellm.orchestrator.bundle import BundleError

CHAT_ROLES = ("system", "user", "assistant", "tool")


class PromptError(ValueError):
    """The prompt cannot be turned into tokens; the message says why."""


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """tokenizer/generation.json, as far as the control plane uses it."""

    bos_token: str = ""
    eos_token: str = ""
    eos_token_ids: tuple[int, ...] = ()


class ModelTokenizer:
    """Stateless after loading; any thread may use it."""

    def __init__(self, tokenizer: Tokenizer, chat_template: str | None, defaults: GenerationDefaults) -> None:
        self._tokenizer = tokenizer
        self._template = _environment().from_string(chat_template) if chat_template is not None else None
        self.defaults = defaults
        self.longest_token = max(map(len, tokenizer.get_vocab()), default=0)
        """In the vocabulary's own spelling, which has at least as many characters as the text that it stands for."""
        added = tokenizer.get_added_tokens_decoder()
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    def encode_text(self, text: str) -> list[int]:
        """Raw text, with the model's own beginning-of-text token where its tokenizer adds one."""
        return self._tokenizer.encode(text).ids

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """(role, content) pairs through the chat template, up to where the answer begins.

        Raises PromptError for an unknown role, a model without a template, or a chat the template refuses.
        """
        for role, _ in messages:
            if role not in CHAT_ROLES:
                raise PromptError(f"unknown role {role!r} in the chat: it must be one of {', '.join(CHAT_ROLES)}")
        return self._tokenizer.encode(self._render(messages), add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def _render(self, messages: Sequence[tuple[str, str]]) -> str:
        if self._template is None:
            raise PromptError("this model has no chat template: send the prompt as text (generate --raw)")
        try:
            return self._template.render(
                messages=[{"role": role, "content": content} for role, content in messages],
                add_generation_prompt=True,
                bos_token=self.defaults.bos_token,
                eos_token=self.defaults.eos_token,
            )
        except jinja2.TemplateError as error:
            raise PromptError(f"the model's chat template refuses this chat: {error}") from error


def load_tokenizer(folder: Path) -> ModelTokenizer:
    """Read a bundle's tokenizer folder. Raises BundleError if a file is missing or broken."""
    try:
        tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
        defaults = msgspec.json.decode((folder / "generation.json").read_bytes(), type=GenerationDefaults)
        template_path = folder / "chat_template.jinja"
        template = template_path.read_text(encoding="utf-8") if template_path.is_file() else None
        return ModelTokenizer(tokenizer, template, defaults)
    except (OSError, UnicodeDecodeError, msgspec.DecodeError, jinja2.TemplateError) as error:
        raise BundleError(f"the tokenizer in {folder} cannot be read ({error}): build the bundle again") from error
    except Exception as error:
        if type(error) is not Exception:  # `tokenizers` raises bare Exception for a broken file, and nothing else does
            raise
        raise BundleError(f"{folder / 'tokenizer.json'} is broken ({error}): build the bundle again") from error


def _environment() -> jinja2.Environment:
    """As chat templates expect it: loop controls, trimmed blocks, `raise_exception`; sandboxed."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)

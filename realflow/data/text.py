"""Text to tokens: prompts for generation, and prompt-completion pairs for supervised training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from realflow.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, chat: bool) -> list[int]:
    """Token ids of a prompt, which is text or a list of messages (`{"role": ..., "content": ...}`).

    With `chat`, and a tokenizer that has a chat template, text becomes one message of the user, and
    the template ends where the assistant begins to write. Without a template text is encoded as it
    is, with the special tokens that the tokenizer puts around a text.

    Raises InputError for a prompt of another type, messages that no template can render, or a prompt
    without tokens.
    """
    if not isinstance(prompt, str) and not _are_messages(prompt):
        raise InputError(
            f"prompt: found {type(prompt).__name__} {_short(prompt)}; expected text or a list of messages, "
            'such as [{"role": "user", "content": "..."}]'
        )
    if chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        tokens = _encode(tokenizer, _render(tokenizer, messages))
    elif isinstance(prompt, str):
        tokens = list(tokenizer(prompt)["input_ids"])
    else:
        reason = "the tokenizer has no chat template" if chat else "the call says chat: false"
        raise InputError(f"prompt: messages need a chat template, but {reason}; use prompts of plain text")
    if not tokens:
        raise InputError(f"prompt: {_short(prompt)} has no tokens; leave such rows out of the data")
    return tokens


def encode_pair(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Messages,
    completion: str | Messages,
    chat: bool,
    max_length: int | None = None,
) -> tuple[list[int], list[bool]]:
    """Tokens and loss mask of a prompt with its completion.

    The prompt is encoded as for generation, so that training sees what generation will; then come
    the completion's own tokens and the end-of-sequence token, and these are what the mask marks.
    What goes beyond `max_length` tokens is cut off at the end, with it the end-of-sequence token.

    Raises InputError where `max_length` leaves nothing of the completion, for a tokenizer without an
    end-of-sequence token, and for whatever `encode_prompt` refuses.
    """
    before = encode_prompt(tokenizer, prompt, chat)
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-sequence token, which every completion must end with")
    after = [*_encode(tokenizer, _completion_text(completion)), int(tokenizer.eos_token_id)]
    tokens = (before + after)[:max_length]
    if len(tokens) <= len(before):
        raise InputError(
            f"a prompt of {len(before)} tokens leaves nothing of its completion within max_length "
            f"{max_length}: {_short(prompt)}; raise max_length, or leave such rows out of the data"
        )
    return tokens, [False] * len(before) + [True] * (len(tokens) - len(before))


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    # The class that templates raise is jinja2's, which transformers needs for any template.
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise InputError(f"the chat template refuses the messages {_short(messages)}: {error}") from error
    assert isinstance(text, str)
    return text


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of the text alone: a template writes its special tokens itself."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _completion_text(completion: str | Messages) -> str:
    if isinstance(completion, str):
        return completion
    if _are_messages(completion) and len(completion) == 1 and isinstance(completion[0]["content"], str):
        return completion[0]["content"]
    raise InputError(
        f"completion: found {type(completion).__name__} {_short(completion)}; expected text or one message"
    )


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(entry, Mapping) and "role" in entry and "content" in entry for entry in value)
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]}..."

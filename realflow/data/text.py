"""Text to tokens: prompts for generation, and prompt-completion pairs for supervised training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from realflow.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]
Segment = tuple[list[int], bool]
"""Tokens, and whether they are the policy's own."""


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, chat: bool, system: str | None = None
) -> list[int]:
    """Token ids of a prompt, which is text or a list of messages (`{"role": ..., "content": ...}`).

    With `chat`, and a tokenizer that has a chat template, text becomes one message of the user, and
    the template ends where the assistant begins to write. Without a template text is encoded as it
    is, with the special tokens that the tokenizer puts around a text. `system` is put before the prompt
    as a message, unless its own first message is one of the system.

    Raises InputError for a prompt of another type, messages that no template can render, or a prompt
    without tokens.
    """
    _check_prompt(prompt)
    if _has_template(tokenizer, chat):
        tokens = _encode(tokenizer, _render(tokenizer, _messages(prompt, system), answer=True))
    elif isinstance(prompt, str) and system is None:
        tokens = list(tokenizer(prompt)["input_ids"])
    else:
        reason = "the tokenizer has no chat template" if chat else "the call says chat: false"
        what = "messages need" if system is None else "a system message needs"
        raise InputError(f"prompt: {what} a chat template, but {reason}; use prompts of plain text")
    if not tokens:
        raise InputError(f"prompt: {_short(prompt)} has no tokens; leave such rows out of the data")
    return tokens


def encode_pair(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Messages,
    completion: str | Messages,
    chat: bool,
    max_length: int | None = None,
    *,
    system: str | None = None,
    cut: bool = True,
) -> tuple[list[int], list[bool]]:
    """Tokens and loss mask of a prompt with its completion.

    The prompt is encoded as for generation, so that training sees what generation will. A completion of
    text (or of one message of the assistant with text) follows as its own tokens and the
    end-of-sequence token, and these are what the mask marks. Of a completion of several messages, or with
    calls of tools, the mask marks what the assistant writes, up to the end-of-sequence token of each
    message; what tools and users say is in between, unmarked. What goes beyond `max_length` tokens is cut
    off at the end, with it the end-of-sequence token.

    Raises InputError where `max_length` leaves nothing of the completion, or `cut` is false and it is
    too short, for a tokenizer without an end-of-sequence token, for a template in which later messages
    change earlier ones, and for whatever `encode_prompt` refuses.
    """
    before = encode_prompt(tokenizer, prompt, chat, system)
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-sequence token, which every completion must end with")
    tokens, mask = list(before), [False] * len(before)
    for part, own in _completion(tokenizer, prompt, completion, chat, system):
        tokens += part
        mask += [own] * len(part)
    if max_length is None or len(tokens) <= max_length:
        return tokens, mask
    if not cut:
        raise InputError(
            f"prompt and completion have {len(tokens)} tokens, more than max_length {max_length}: "
            f"{_short(prompt)}; raise max_length, or say with 'over' whether such rows are dropped or "
            "truncated"
        )
    if not any(mask[:max_length]):
        raise InputError(
            f"a prompt of {len(before)} tokens leaves nothing of its completion within max_length "
            f"{max_length}: {_short(prompt)}; raise max_length, or drop such rows with 'over: drop'"
        )
    return tokens[:max_length], mask[:max_length]


def _completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Messages,
    completion: str | Messages,
    chat: bool,
    system: str | None,
) -> list[Segment]:
    """What follows the prompt."""
    text = completion if isinstance(completion, str) else _single(completion)
    if text is not None:
        return [([*_encode(tokenizer, text), _end(tokenizer)], True)]
    if isinstance(completion, str) or not _begins_with_assistant(completion):
        raise InputError(
            f"completion: found {type(completion).__name__} {_short(completion)}; expected text, or messages "
            "of which the first is the assistant's"
        )
    if not _has_template(tokenizer, chat):
        raise InputError("completion: several messages need a chat template, which is not used here")
    turns = _messages(prompt, system)
    shown = _render(tokenizer, turns, answer=True)
    found: list[Segment] = []
    for place, message in enumerate(completion):
        if place and message["role"] == "assistant":
            found.append((_encode(tokenizer, _added(tokenizer, shown, turns, answer=True)), False))
            shown = _render(tokenizer, turns, answer=True)
        turns = [*turns, message]
        added = _added(tokenizer, shown, turns, answer=False)
        shown += added
        if message["role"] == "assistant":
            found += _answer(tokenizer, added, last=place == len(completion) - 1)
        else:
            found.append((_encode(tokenizer, added), False))
    return found


def _answer(tokenizer: PreTrainedTokenizerBase, added: str, *, last: bool) -> list[Segment]:
    """A message of the assistant as the template writes it: its own part ends with the end-of-sequence
    token, which the last message always has; behind it the template may go on."""
    end = str(tokenizer.eos_token)
    own, found, rest = added.rpartition(end)
    if not found:
        own, rest = added, ""
    if last:
        return [([*_encode(tokenizer, own), _end(tokenizer)], True)]
    return [(_encode(tokenizer, own + found), True), *([(_encode(tokenizer, rest), False)] if rest else [])]


def _added(tokenizer: PreTrainedTokenizerBase, shown: str, turns: Messages, *, answer: bool) -> str:
    """What the template writes behind `shown`, the text of the messages before."""
    text = _render(tokenizer, turns, answer=answer)
    if not text.startswith(shown):
        raise InputError(
            f"completion: with the message {_short(turns[-1])} the chat template writes those before it "
            "otherwise, so what the model saw is not clear; give each turn as a prompt with one completion"
        )
    return text[len(shown) :]


def _has_template(tokenizer: PreTrainedTokenizerBase, chat: bool) -> bool:
    return chat and bool(tokenizer.chat_template)


def _messages(prompt: str | Messages, system: str | None) -> list[Mapping[str, Any]]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system is None or messages[0]["role"] == "system":
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, answer: bool) -> str:
    """The text of the messages; with `answer` it ends where the assistant begins to write."""
    # The class that templates raise is jinja2's, which transformers needs for any template.
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)
    except (TemplateError, TypeError) as error:  # such as content that is None where text is added to it
        raise InputError(f"the chat template refuses the messages {_short(messages)}: {error}") from error
    assert isinstance(text, str)
    return text


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of the text alone: a template writes its special tokens itself."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _end(tokenizer: PreTrainedTokenizerBase) -> int:
    assert isinstance(tokenizer.eos_token_id, int)
    return tokenizer.eos_token_id


def _single(completion: Messages) -> str | None:
    """The text of a completion that is one message with nothing but text."""
    if not _are_messages(completion) or len(completion) != 1:
        return None
    message = completion[0]
    plain = message["role"] == "assistant" and not message.get("tool_calls")
    return message["content"] if plain and isinstance(message["content"], str) else None


def _begins_with_assistant(completion: Any) -> bool:
    return _are_messages(completion) and completion[0]["role"] == "assistant"


def _check_prompt(prompt: Any) -> None:
    if not isinstance(prompt, str) and not _are_messages(prompt):
        raise InputError(
            f"prompt: found {type(prompt).__name__} {_short(prompt)}; expected text or a list of messages, "
            'such as [{"role": "user", "content": "..."}]'
        )


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(
            isinstance(entry, Mapping) and "role" in entry and ("content" in entry or entry.get("tool_calls"))
            for entry in value
        )
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]}..."

"""When a response ends, and its text: end tokens and stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from realflow.errors import InputError

_CONTEXT = 8  # tokens before the window, so that a tokenizer which strips a leading space does no harm


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that generation uses."""

    all_special_tokens: list[str]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> Any:
        """The text of token ids."""

    def convert_tokens_to_ids(self, tokens: str) -> Any:
        """The id of a token."""


class Stops:
    """Decides from a response's token ids whether it ends here.

    A stop string that is a special token of the tokenizer counts as an end token (special tokens
    have no text); all others are looked for in the decoded text, across token boundaries.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str], eos_ids: Sequence[int]) -> None:
        if stop and tokenizer is None:
            raise InputError(f"generation: stop strings {list(stop)} need a tokenizer, but none is given")
        if "" in stop:
            raise InputError("generation: an empty stop string would end every response; remove it")
        self._tokenizer = tokenizer
        special = {text for text in stop if tokenizer and text in tokenizer.all_special_tokens}
        self._strings = tuple(text for text in stop if text not in special)
        self.end_ids = frozenset(eos_ids) | {
            int(tokenizer.convert_tokens_to_ids(text)) for text in special if tokenizer
        }
        # Every token of a match but the special ones carries at least one byte of it.
        self._window = max((len(text.encode()) for text in self._strings), default=0) + _CONTEXT

    def ends(self, response: list[int]) -> bool:
        """Whether the newest token is an end token or completes a stop string."""
        if response[-1] in self.end_ids:
            return True
        if not self._strings:
            return False
        tail = self._decode(response[-self._window :])
        if not any(text in tail for text in self._strings):
            return False
        return self._cut(self._decode(response)) is not None

    def text(self, response: list[int]) -> str:
        """The response's text without special tokens, cut before the first stop string."""
        if self._tokenizer is None:
            return ""
        whole = self._decode(response)
        cut = self._cut(whole)
        return whole if cut is None else whole[:cut]

    def _cut(self, text: str) -> int | None:
        places = [place for place in (text.find(stop) for stop in self._strings) if place >= 0]
        return min(places, default=None)

    def _decode(self, tokens: list[int]) -> str:
        assert self._tokenizer is not None
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

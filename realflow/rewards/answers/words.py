"""Answers in words: names, yes and no, days, "no solution", numbers that are spelled out."""

from __future__ import annotations

import re

from realflow.rewards.answers.tokens import FUNCTIONS, GREEK, SEVERAL

_ALIKE = [
    {"no solution", "no solutions", "none", "no real solution", "no real solutions", "empty set", "emptyset",
     "no roots", "there is no solution", "there are no solutions", "no such", "no solution exists",
     "null set", "no real roots", "no integer solutions", "no such number exists",
     "no such integers exist"},
    {"does not exist", "dne", "undefined", "doesnt exist", "not defined", "limit does not exist", "diverges",
     "divergent"},
    {"infinitely many", "infinitely many solutions", "infinite", "infinite solutions", "infty",
     "infinite number"},
    {"z", "integers", "all integers", "set of integers", "set of all integers"},
    {"yes", "true", "correct"},
    {"no", "false", "incorrect"},
]  # fmt: skip
_SPELLED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
            "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
            "twenty")  # fmt: skip
_NUMBERS = {word: str(number) for number, word in enumerate(_SPELLED)}
_SHORT = {"odd", "yes", "no", "dne", "red", "am", "pm", "boy", "sun", "one", "two", "six", "ten"}
"""Words of few letters, which are no product of variables."""
_LEFT_OUT = {"the", "a", "an", "its", "it", "is", "are"}
_KNOWN = FUNCTIONS | SEVERAL | GREEK


def _words(text: str) -> str:
    text = re.sub(r'["{}()*_.,;!?]|\\(?![A-Za-z{}])', " ", text.replace("\\{\\}", "empty set"))
    text = re.sub(r"(?<=[A-Za-z])-(?=[A-Za-z])", " ", text)
    found = text.replace("\\", " ").replace("'", "").casefold().split()
    return " ".join(word for word in found if word not in _LEFT_OUT)


def _wordy(text: str) -> bool:
    """Whether a text is words and no formula."""
    if re.search(r"[\d=<>+^/]", text):
        return False
    runs = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{3,}", text)
    plain = [run for run in runs if run not in _KNOWN]
    if _words(text) in _SHORT:
        return True
    return bool(plain) and (
        text.strip()[:1] == '"' or max(map(len, plain)) >= 4 or len(plain) > 1 or plain[0].istitle()
    )


def _alike(a: str, t: str) -> bool:
    return any(a in group and t in group for group in _ALIKE)


def equal_words(a: str, t: str) -> bool | None:
    """Two texts as words; None where the truth is none, or the answer may mean a number that it spells."""
    found, expected = _words(a), _words(t)
    wordy = bool(found) and (_wordy(a) or _wordy(t))
    if (wordy and found == expected) or _alike(found, expected):
        return True
    if found in _NUMBERS or expected in _NUMBERS:
        left, right = _NUMBERS.get(found, found), _NUMBERS.get(expected, expected)
        return left == right
    if not _wordy(t) or "," in t:
        return False if _wordy(a) and re.fullmatch(r"-?[\d.,]+", t.strip()) else None
    first = found.split(" ", 1)[0]
    if expected in ("yes", "no", "true", "false") and first != found:
        return first == expected or _alike(first, expected)
    return False if _wordy(a) or not re.search(r"[<>=\\]", a) else None

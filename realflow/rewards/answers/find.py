r"""Where in a completion its answer is.

In turn: the last `\boxed{..}` (braces nest; boxes joined by "and" or a comma are one answer), what stands in
`<answer>` tags, what follows the last "the answer is", "Answer:", "####" and their kin, a text that is short
and no sentence, the last formula, the last number. All patterns cost time linear in the text.
"""

from __future__ import annotations

import re

SHORT = 120
"""Characters of the longest text that is taken as an answer in itself."""

_BOX = re.compile(r"\\f?boxed\s*\{|\\fbox\s*\{|\\.|[{}]", re.DOTALL)
_JOINED = re.compile(
    r"[\s$,;.\\()\[\]]*(?:\\text\s*\{\s*)?(?:and|or|,|;)?\s*\}?[\s$,;\\()\[\]]*(?:\\q?quad)?[\s$\\(]*"
)
_MARKS = re.compile(
    r"""(?:final\s{1,9}answer|answers?|solution|result|value)\s{0,9}(?:\*\*|__)?\s{0,9}
          (?:to\s{1,9}(?:the|this)\s{1,9}(?:problem|question)\s{1,9})?
          (?:(?:is|are|be|was)(?:\s{1,9}(?:therefore|thus|then|simply|just|given\s{1,9}by|equal\s{1,9}to))?\s{0,9}:?|:|=)
      | (?:correct\s{1,9})?(?:option|choice|answer)\s{1,9}(?:is|:)
      | final\s{1,9}answer\s{0,9}(?:\*\*|__)?[^\S\n]{0,9}\n
      | \#{4}
      | (?:答案|最终答案)\s{0,9}(?:是|为|：|:)""",
    re.VERBOSE | re.IGNORECASE,
)
_STRONG = re.compile(r"answer|option|choice|####|答案", re.IGNORECASE)
_FORMULA = re.compile(
    r"\$\$([^$]{1,2000})\$\$|(?<![\\$\d])\$([^$\n]{1,2000})\$|\\\[((?:[^\\]|\\(?!\])){1,2000}?)\\\]|\\\(([^\n]{1,2000}?)\\\)"
)
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.])[-+\u2212]?\s?[$€£]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+]?\d{1,3}(?!\d)|\s?[×x*]\s?10\^\{?-?\d{1,3}\}?)?(?:\s?/\s?\d+(?:\.\d+)?)?(?:\s?\\?%)?"
)
_CUT = re.compile(
    r",?\s(?:because|since|which|where|as\s+(?:the|it|we|required)|so\s|for\s+(?:the|all)\s|when\s|hence|but\s|thus)|\n|(?<=[^A-Z.][.!?])\s+(?=[A-Z])|[.!?]\s*$"
)
_SENTENCE = re.compile(
    r"\b(?:is|are|was|were|be|so|thus|hence|therefore|then|we|I|get|gives|equals?|because)\b"
)
_AND = re.compile(r",?\s{1,9}(?:and|or)\s{1,9}")
_EMPHASIS = re.compile(r"\*\*([^*\n]{1,200})\*\*")
_LATEX_WORDS = re.compile(r"\\[A-Za-z]+(?:\s*\{[A-Za-z]*matrix\})?")


def extract(text: str) -> str | None:
    """The answer in a completion, as it is written there; None where there is none.

    What a model thinks before `</think>` counts only where nothing comes after it.
    """
    _, thought, after = text.rpartition("</think>")
    if thought and after.strip():
        found = _extract(after)
        if found is not None:
            return found
    return _extract(text)


def _extract(text: str) -> str | None:
    boxed = last_box(text)
    if boxed is not None:
        return boxed
    tagged = re.findall(r"<answer>([^<]{0,2000})</answer>", text, re.IGNORECASE)
    if tagged and tagged[-1].strip():
        return str(tagged[-1]).strip()
    marked = _marked(text)
    if marked is not None:
        return marked
    opened = text.rfind("boxed{")
    if opened >= 0 and "}" not in text[opened:]:
        return None  # the text was cut within its answer
    whole = text.strip()
    if whole and _is_answer(whole):
        return whole
    return _bold(text[-4000:]) or _last(text[-4000:])


def last_box(text: str) -> str | None:
    r"""What the last closed `\boxed{}` holds; with those that "and" or a comma joins to it."""
    boxes = _boxes(text)
    while boxes and not boxes[-1][2].strip():
        boxes.pop()
    if not boxes:
        return None
    joined = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        between = text[box[1] : joined[0][0]]
        if len(between) > 30 or not re.search(r"and|or|,|;", between) or not _JOINED.fullmatch(between):
            break
        joined.insert(0, box)
    contents = list(dict.fromkeys(content.strip() for _, _, content in joined))
    return ", ".join(contents)


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of the boxes that are not within another, in one pass over the braces."""
    found: list[tuple[int, int, str]] = []
    starts: list[tuple[int, int] | None] = []  # of open braces: where box and content start; None: no box
    for token in _BOX.finditer(text):
        mark = token.group()
        if mark == "}":
            opened = starts.pop() if starts else None
            if opened is not None:
                while found and found[-1][0] > opened[0]:
                    found.pop()
                found.append((opened[0], token.end(), text[opened[1] : token.start()]))
        elif mark.endswith("{") and len(mark) > 2:
            starts.append((token.start(), token.end()))
        elif mark == "{":
            starts.append(None)
    return found + [box for opened in starts if opened for box in _unclosed(text, *opened)][-1:] * (not found)


def _unclosed(text: str, start: int, inner: int) -> list[tuple[int, int, str]]:
    """A box whose last brace is missing, where the formula around it ends: a text that was cut has none."""
    match = re.match(r"[^$\n]{1,300}?(?=\$|\\\)|\\\]|\n)", text[inner : inner + 320])
    if match is None or not match[0].strip():
        return []
    return [(start, inner + match.end(), match[0].strip().removesuffix("."))]


def _marked(text: str) -> str | None:
    """What follows the last "answer is" and its kin ("the value is" counts where no answer is named)."""
    marks = list(_MARKS.finditer(text))[::-1]
    strong = [mark for mark in marks if _STRONG.search(mark.group())]
    weak = [mark for mark in marks if not _STRONG.search(mark.group())]
    for mark in [*strong, *weak][:8]:
        found = _after(text[mark.end() : mark.end() + 2500])
        if found:
            return found
    return None


def _after(text: str) -> str | None:
    """The answer that a text begins with: its formulas, or its words up to the end of the sentence."""
    text = text.lstrip(" \t*_:=\n")
    line = text.split("\n", 1)[0] if not text.startswith(("$$", "\\[")) else text
    formula = _FORMULA.search(line)
    if formula is not None and len(re.findall(r"[A-Za-z]{3,}", line[: formula.start()])) <= 8:
        first, end = formula.start(), formula.end()
        while True:
            following = _FORMULA.match(line, end)
            gap = re.match(r"\s*(?:,|,?\s*and|,?\s*or)\s*(?=\$|\\\()", line[end:])
            if gap is not None:
                following = _FORMULA.match(line, end + gap.end())
            if following is None:
                break
            end = following.end()
        head = line[:first].strip()
        if re.fullmatch(r"[-\d.,\s{}/()]*", head) and head:
            first = 0
        tail = re.match(r"\s*(?:\\?%|°|[a-z]{1,12}(?:\^?\d)?)(?=[\s.,;!?]|$)", line[end:])
        units = tail.group() if tail and not _CUT.match(" " + tail.group().strip() + " ") else ""
        return _bare(line[first:end]) + (units if units.strip() not in _GLUE else "")
    cut = _CUT.search(line)
    found = (line[: cut.start()] if cut else line).strip(" *_`")
    if not found:
        return None
    if len(re.findall(r"[A-Za-z]{2,}", found)) > 4 and re.search(r"\d", found):
        return _last(found)
    return found[: SHORT * 4]


_GLUE = {"is", "and", "or", "so", "as", "for", "if", "when", "where", "because", "since", "which", "by", "to",
         "are", "with", "but", "the", "has", "have", "was", "units"}  # fmt: skip


def _bare(text: str) -> str:
    """Formulas without their delimiters."""
    return (
        re.sub(r"\$+|(?<!\\)\\[()\[\]]", " ", text).strip() if not re.search(r"\\\$", text) else text.strip()
    )


def _bold(text: str) -> str | None:
    """What is bold in the last line, where that is a number or a formula."""
    lines = text.strip().rsplit("\n", 1)
    found = [match[1].strip() for match in _EMPHASIS.finditer(lines[-1])]
    found = [
        part for part in found if re.search(r"\d|\\[a-z]", part) and not re.search("[A-Za-z]{3}.*[:.]", part)
    ]
    return _bare(found[-1]) if found else None


def _is_answer(text: str) -> bool:
    """Whether a text is an answer in itself: a short line with few words."""
    if len(text) > SHORT * 2 or "\n" in text:
        return False
    plain = re.sub(r"\\(?:text|mathrm|textbf|mbox)\s*\{[^{}]*\}", " ", text)
    words = re.findall(r"[A-Za-z]{2,}", _LATEX_WORDS.sub(" ", plain))
    if re.match(r"(?i)(?:yes|no|true|false)\b", text.strip()):
        return True
    return len(words) <= 6 and not re.search(r"[?!:]\s", text) and not _SENTENCE.search(plain)


def _last(text: str) -> str | None:
    """The last formula or number, whichever ends later; of an equation its last side."""
    formulas = [match for match in _FORMULA.finditer(text) if re.search(r"[\dA-Za-z]", match.group())]
    numbers = [match for match in _NUMBER.finditer(text) if match.group().strip()]
    if formulas and (not numbers or formulas[-1].end() >= numbers[-1].end()):
        first = len(formulas) - 1
        while first and _AND.fullmatch(text[formulas[first - 1].end() : formulas[first].start()]):
            first -= 1
        return _bare(text[formulas[first].start() : formulas[-1].end()])
    if not numbers:
        return None
    line_start = text.rfind("\n", 0, numbers[-1].start()) + 1
    line_end = text.find("\n", numbers[-1].start())
    line = text[line_start : line_end if line_end >= 0 else len(text)].strip()
    _, equals, side = line.rpartition("=" if "=" in line else ": ")
    side = side.strip().removesuffix(".")
    if (
        equals
        and 0 < len(side) <= SHORT
        and len(re.findall(r"[A-Za-z]{3,}", _LATEX_WORDS.sub(" ", side))) == 0
    ):
        return side
    return numbers[-1].group().strip()

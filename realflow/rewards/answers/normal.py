r"""One spelling for what LaTeX, plain text and Unicode write in many ways.

`normal` gives text in which fractions are `\frac`, words of `\text{..}` stand in double quotes, relations
are `\le \ge \ne < > =`, multiplication is `*`, degrees are `"degrees"`, a currency sign is `\cur`, and which
has no math delimiters, no spacing commands and no full stop at its end.
"""

from __future__ import annotations

import re

from realflow.rewards.answers.tokens import FUNCTIONS, SEVERAL

LONGEST = 2000
"""Characters of the longest text that is read as mathematics; longer ones are compared as text."""

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5",
           "⅘": "4/5", "⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8"}  # fmt: skip
_SIGNS = {
    "−": "-", "–": "-", "—": "-", "×": "*", "·": "*", "⋅": "*", "∙": "*", "∗": "*", "÷": "/", "⁄": "/",
    "∕": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ",
    "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ",
    "∈": r"\in ", "∅": r"\emptyset ",
    "ℝ": r"\R ", "°": '"degrees"', "º": '"degrees"', "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
    "γ": r"\gamma ", "λ": r"\lambda ", "φ": r"\phi ", "ω": r"\omega ", "σ": r"\sigma ", "μ": r"\mu ",
    "∖": r"\setminus ", "⟨": r"\langle ", "⟩": r"\rangle ", "，": ",", "（": "(", "）": ")",
    "：": ":", "；": ";",
    "。": ".", "‘": "'", "’": "'", "′": "'", "“": "", "”": "", '"': "", "\u00a0": " ", "\u202f": r"\,",
    "\u2009": r"\,", "％": "%", "＝": "=", "€": r"\cur ", "£": r"\cur ", "¥": r"\cur ", "₹": r"\cur ",
    "¢": ' "cents"',
}  # fmt: skip
_SIGN = re.compile("|".join(map(re.escape, _SIGNS)))

_WORDS = (
    r"(?:text|textbf|textit|textrm|textsf|texttt|textnormal|mbox|hbox|mathrm|operatorname\*?|rm|bf|mathsf)"
)
_QUOTED = re.compile(rf"\\{_WORDS}\s*\{{([^{{}}]*)\}}")
_FONT = re.compile(
    r"\\(?:mathbf|mathit|mathcal|boldsymbol|bm|mathbb)(?:\s*\{\s*([^{}]{0,40})\s*\}|\s+([A-Za-z])(?![A-Za-z]))"
)
_KEPT_LETTERS = {"e", "i", "d", "x", "y", "z", "n", "k"}  # \mathrm{e} is a letter, \mathrm{m} a unit

_RULES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<=\d)(?:\\[,!:; ]|\{,\}|\{\\,\}|,\\!|\\,\\!)(?=\d{3}(?!\d))", ","),  # between thousands
        (r"(?<!\\)\\(?:[,:;> ]|quad(?![a-z])|qquad(?![a-z])|hspace\{[^{}]*\}|enspace|thinspace)|~", " "),
        (r"\\!", ""),
        (r"\s+", " "),  # before the rules that look for space: they are then linear
        (r"\{\s*([,:])\s*\}", r"\1"),
        (r"\(?\s*(?:\\[pb]?mod|\"\s*mod\s*\"|\bmod\b)\s*\{?\s*(\w+)\s*\}?\s*\)?\s*$", r" \\pmod \1"),
        (r"\\m?(?:left|right|middle)(?![A-Za-z])\.?", ""),
        (r"\\[bB]igg?[lrm]?(?![A-Za-z])", ""),
        (r"\\(?:displaystyle|textstyle|limits|nolimits|mathstrut|nonumber|rm|bf)(?![A-Za-z])", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\d?t?binom(?![A-Za-z])", r"\\binom"),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z])|\{\s*o\s*\}|\{?\s*\"degrees\"\s*\}?)", '"degrees"'),
        (r"\\(?:degree|deg)(?![A-Za-z])", '"degrees"'),
        (r"\\?%|(?<=[\d}])\s*\b[Pp]er\s?cent(?:age)?\b|\"\s*percent\s*\"", r"\\%"),
        (r"\\(?:leq|leqslant|le)(?![A-Za-z])|<=|=<", r"\\le "),
        (r"\\(?:geq|geqslant|ge)(?![A-Za-z])|>=", r"\\ge "),
        (r"\\(?:neq|ne)(?![A-Za-z])|!=|\\not\s*=", r"\\ne "),
        (r"\\lt(?![A-Za-z])|&lt;", "<"),
        (r"\\gt(?![A-Za-z])|&gt;", ">"),
        (r"\\(?:approx|approxeq|simeq|sim|thickapprox)(?![A-Za-z])|~=", r"\\approx "),
        (r"\*\*", "^"),
        (r"\\(?:cdot|times|ast)(?![A-Za-z])", "*"),
        (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", "*"),
        (r"\\div(?![A-Za-z])", "/"),
        (r"\\(?:varnothing|O)(?![A-Za-z])", r"\\emptyset "),
        (r"\\(?:lbrace)(?![A-Za-z])", r"\\{"),
        (r"\\(?:rbrace)(?![A-Za-z])", r"\\}"),
        (r"\\(?:lbrack)(?![A-Za-z])", "["),
        (r"\\(?:rbrack)(?![A-Za-z])", "]"),
        (r"\\(?:lvert|rvert|vert)(?![A-Za-z])", "|"),
        (r"\\[dt]?mid(?![A-Za-z])", "|"),
        (r"\\(?:Reals|reals|RR)(?![A-Za-z])", r"\\R "),
        (r"\\(?:backslash|smallsetminus)(?![A-Za-z])", r"\\setminus "),
        (r"\{([^{}]{1,60})\\choose(?![A-Za-z])([^{}]{1,60})\}", r"\\binom{\1}{\2}"),
        (r"^\s*\\?\{\s*\\?\}\s*$", r"\\emptyset "),
        (r"(?<![A-Za-z\\])(?:[Ii]nfinity|inf|oo)(?![A-Za-z])|\\inf(?![A-Za-z])", r"\\infty "),
        (r"(?<![A-Za-z\\])[pP]i(?![A-Za-z])", r"\\pi "),
        (r"(?<![A-Za-z\\])sqrt(?![A-Za-z])", r"\\sqrt "),
        (r"(?<=[)\]}])\s*U\s*(?=[(\[\\{])", r"\\cup "),
        (r"\"\s*,?\s*(?:and|or)\s*\"|(?<![A-Za-z\\]),?\s*\b(?:and|or)\b(?![A-Za-z])", " , "),
        (r"\\(?:lor|vee)(?![A-Za-z])", " , "),
        (r"(?<![\d.,^_{])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),
        (r"(\d{0,9}\.\d{0,20}?)(\d{3,20}?)\2+\s*(?:\.\.\.+|\\[lc]?dots|…)", r"\1\\overline{\2}"),
        (r"(\d{0,9}\.\d{0,20}?)(\d{1,2}?)\2{2,40}\s*(?:\.\.\.+|\\[lc]?dots|…)", r"\1\\overline{\2}"),
        (r"(?<=\d)\s*\"?\s*thousand\b\s*\"?", "*10^{3}"),
        (r"(?<=\d)\s*\"?\s*million\b\s*\"?", "*10^{6}"),
        (r"(?<=\d)\s*\"?\s*billion\b\s*\"?", "*10^{9}"),
        (r"(?<=\d)\s*(?:\^\s*\{?)?\s*\"?\s*(?:st|nd|rd|th)\b\s*\"?\s*\}?", ""),
        (r"(?<=\d)\s*\"?\s*[Aa]\.?\s?[Mm]\b\.?\s*\"?\s*$", "am"),
        (r"(?<=\d)\s*\"?\s*[Pp]\.?\s?[Mm]\b\.?\s*\"?\s*$", "pm"),
        (r"(?<=\d)\s*\"?\s*\bto\b\s*\"?\s*(?=\d)", ":"),
        (r"(?<=\d)\s*\"?\s*\bout of\b\s*\"?\s*(?=\d)", "/"),
        (r"^\s*(?:\"\s*)?(?:about|approximately|approx\.?|roughly)(?:\s*\"|\s)", ""),
        (r"^\s*\"[^\"]*(?:\bis|\bare|=|:)\s*\"", ""),
        (r",?\s*(?:\"?\s*(?:where|for|with)\s*\"?\s*)?(?<![A-Za-z\\])[a-z]\s*\\in\s*\\[ZN][\s^+]*$", ""),
        (r"\s+", " "),
    )
]  # fmt: skip
_OUTER = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"), ("__", "__"))
_BOX = re.compile(r"^\\f?box(?:ed)?\s*\{(.*)\}$|^\\boxed\s*\{(.*)\}$", re.DOTALL)


def normal(text: str) -> str:
    """The one spelling of an answer; see the module. Text that is no mathematics keeps its words."""
    text = _unwrapped(text.strip())
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m[0].translate(_SUBSCRIPTS) + "}", text)
    text = re.sub("[" + "".join(_VULGAR) + "]", _vulgar, text)
    text = re.sub(r"√\s*(\d+(?:\.\d+)?|[A-Za-z])", r"\\sqrt{\1}", text)
    text = text.replace("∛", r"\sqrt[3]").replace("√", r"\sqrt ")
    text = _SIGN.sub(lambda m: _SIGNS[m[0]], text)
    text = _dollars(text)
    text = _FONT.sub(_letter, text)
    for _ in range(3):  # a word within a word: \textbf{\text{(C)}}
        text = _QUOTED.sub(_quoted, text)
    text = re.sub(r"(?<!\\)\\(?:\(|\)|\[|\])", " ", text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return _trimmed(text)


def squeezed(text: str) -> str:
    """Normal text without spaces, but for one between two digits or letters."""
    text = re.sub(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])", "", text)
    return re.sub(r"(\\[A-Za-z]+) (?![A-Za-z])", r"\1", text)


def _unwrapped(text: str) -> str:
    """Without delimiters, boxes, emphasis and punctuation around all of it."""
    for _ in range(6):
        before = text
        text = text.strip().removeprefix(":").removeprefix("=").strip()
        for left, right in _OUTER:
            inner = text[len(left) : -len(right)]
            if len(text) > len(left + right) and text.startswith(left) and text.endswith(right):
                if left not in inner or left not in ("$", "**", "$$"):
                    text = inner
                break
        text = _unboxed(text)
        if text.endswith((".", ",", ";", ":")) and not text.endswith((r"\;", r"\,", r"\:", "...")):
            text = text[:-1]
        if text == before:
            break
    return text.strip()


def _unboxed(text: str) -> str:
    """The content of a box that is all of the text."""
    match = _BOX.match(text)
    if match is None:
        return text
    inner = match[1] if match[1] is not None else match[2]
    return inner if balanced(inner) else text


def balanced(text: str) -> bool:
    """Whether braces close what they open, never more."""
    depth = 0
    for mark in re.findall(r"\\.|[{}]", text):
        depth += {"{": 1, "}": -1}.get(mark, 0)
        if depth < 0:
            return False
    return depth == 0


def _trimmed(text: str) -> str:
    text = re.sub(r"^[\s:=,]+|[\s,;:]+$", "", text)
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    while text.startswith("{") and text.endswith("}") and balanced(text[1:-1]) and "," not in text:
        text = text[1:-1].strip()
    return text


def _vulgar(match: re.Match[str]) -> str:
    above, _, below = _VULGAR[match[0]].partition("/")
    return rf"\frac{{{above}}}{{{below}}}"


def _dollars(text: str) -> str:
    r"""A dollar sign is a currency where it is escaped or has no partner, else a delimiter of mathematics."""
    text = re.sub(r"\\+\$", r"\\cur ", text)
    if text.count("$") % 2:
        text = re.sub(r"\$(?=\s*[\d.])", r"\\cur ", text, count=1)
    return text.replace("$", " ")


def _letter(match: re.Match[str]) -> str:
    inner = (match[1] or match[2] or "").strip()
    if match[0].startswith(r"\mathbb"):
        return rf"\{inner} " if inner in ("R", "Z", "N", "Q", "C") else inner
    return inner if len(inner) == 1 else f'"{inner}"'


def _quoted(match: re.Match[str]) -> str:
    inner = match[1].replace('"', "").strip()
    if match[0].startswith((r"\mathrm", r"\rm", r"\operatorname", r"\mathsf")):
        if inner in _KEPT_LETTERS:
            return inner
        if inner in COMMANDS:
            return rf"\{inner} "
    return f'"{inner}"' if inner else " "


COMMANDS = FUNCTIONS | SEVERAL
"""Functions that `\\operatorname` and plain words may name."""

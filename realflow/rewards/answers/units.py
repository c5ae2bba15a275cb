r"""Units at the end of an answer: what they are, and how two that differ compare.

`quantity` takes the unit, the currency and the per cent sign off normal text. Known units have a dimension
and a factor, so that 1 m is 100 cm and not 100 s; words that are no known unit ("42 apples") are left out
of the comparison, and so is a unit that only one of two answers has.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType

Dimension = tuple[tuple[str, int], ...]

_TABLE: dict[str, dict[str, int | str]] = {
    "length": {"m meter metre meters metres": 1, "cm centimeter centimetre centimeters centimetres": "1/100",
               "mm millimeter millimetre millimeters millimetres": "1/1000",
               "km kilometer kilometre kilometers kilometres": 1000,
               "in inch inches": "127/5000", "ft foot feet": "381/1250", "yd yard yards": "1143/1250",
               "mi mile miles": "201168/125", "nm nanometer nanometers": "1/1000000000"},
    "mass": {"g gram grams gm": 1, "kg kilogram kilograms kgs": 1000, "mg milligram milligrams": "1/1000",
             "lb lbs pound pounds": "45359237/100000", "oz ounce ounces": "45359237/1600000"},
    "time": {"s sec secs second seconds": 1, "min mins minute minutes": 60, "h hr hrs hour hours": 3600,
             "day days": 86400, "week weeks": 604800, "ms millisecond milliseconds": "1/1000"},
    "years": {"year years yr yrs": 12, "month months": 1},
    "money": {"dollar dollars usd bucks": 1, "cent cents": "1/100"},
    "angle": {"degrees degree deg": 1, "arcminutes": "1/60"},
    "temperature": {"k kelvin kelvins": 1},
    "current": {"a amp amps ampere amperes": 1},
    "volume": {"l liter litre liters litres": 1, "ml milliliter millilitre milliliters millilitres": "1/1000",
               "gallon gallons gal": "473176473/125000000"},
    "energy": {"j joule joules": 1, "kj kilojoule kilojoules": 1000,
               "ev": "801088317/5000000000000000000000000000"},
    "force": {"n newton newtons": 1},
    "power": {"w watt watts": 1, "kw kilowatt kilowatts": 1000},
    "charge": {"c coulomb coulombs": 1},
    "voltage": {"v volt volts": 1},
    "frequency": {"hz hertz": 1, "khz": 1000, "mhz": 1000000},
    "amount": {"mol mole moles mols": 1},
    "pressure": {"pa pascal pascals": 1, "kpa": 1000},
    "area": {"acre acres": 1},
}  # fmt: skip
_UNITS: MappingProxyType[str, tuple[str, Fraction]] = MappingProxyType(
    {
        alias: (dimension, Fraction(factor))
        for dimension, aliases in _TABLE.items()
        for names, factor in aliases.items()
        for alias in names.split()
    }
)
_SPEEDS = {"mph": "mile/hour", "kmh": "km/hour", "kph": "km/hour", "kmph": "km/hour", "fps": "foot/second"}
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_UNIT_WORDS = {"unit", "units"}
_LETTERS = {"m", "s", "g", "h", "L", "N", "J", "W", "V", "A", "K", "C", "F", "l"}

_TRIGONOMETRY = re.compile(r"(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_PIECE = re.compile(r'"[^"]*"|\\[A-Za-z]+|[A-Za-z]+|\^\s*\{-?\d\}|\^\s*-?\d|[-/*.\s]+|.', re.DOTALL)


@dataclass(frozen=True)
class Unit:
    """A dimension and the factor to its base unit; a dimension of None is unknown words."""

    dimension: Dimension | None
    factor: Fraction = Fraction(1)


@dataclass(frozen=True)
class Quantity:
    """An answer without its unit: the text of its value, the unit if it has one, whether it is per cent; and
    whether that is sure: single letters without quotes may be variables."""

    value: str
    unit: Unit | None = None
    percent: bool = False
    sure: bool = True


def quantity(text: str) -> Quantity:
    """Split normal text into value and unit."""
    money = False
    if text.startswith(("\\cur", "-\\cur")):
        text, money = re.sub(r"^(-?)\s*\\cur\s*", r"\1", text), True
    else:
        text, count = re.subn(r"\s*\\cur\s*$", "", text)
        money = count > 0
    unit = Unit((("money", 1),)) if money else None
    sure = True
    for start in _tails(text):
        angle = text[start:].strip() == '"degrees"' and _TRIGONOMETRY.search(text[:start])
        found = unit_of(text[start:]) if _is_value(text[:start]) and not angle else None
        if found is not None:
            sure = '"' in text[start:] or re.search("[A-Za-z]{2}", text[start:]) is not None
            text, unit = text[:start].strip(), unit if money else found
            break
    percent = text.endswith("\\%")
    return Quantity(text.removesuffix("\\%").strip(), unit, percent, sure)


_PART = r'\s*(\d+(?:\.\d+)?)\s*(?:"\s*([A-Za-z]+)\s*"|([A-Za-z]{1,12}))\s*,?'
_PARTS = re.compile(rf"{_PART}{_PART}(?:{_PART})?")


def combined(text: str) -> str | None:
    """`1 hour 20 minutes` in its last unit: `80 "minutes"`. None for what has no such parts."""
    match = _PARTS.fullmatch(text)
    if match is None:
        return None
    found = [group for group in match.groups() if group is not None]
    units = [unit_of(f'"{word}"') for word in found[1::2]]
    last = units[-1]
    if (
        last is None
        or last.dimension is None
        or any(u is None or u.dimension != last.dimension for u in units)
    ):
        return None
    sizes = [unit.factor for unit in units if unit]
    if sizes != sorted(set(sizes), reverse=True):
        return None
    total = sum(Fraction(n) * u.factor for n, u in zip(found[::2], units, strict=True) if u) / last.factor
    return f'{total} "{found[-1]}"'


def _tails(text: str) -> list[int]:
    """Where words at the end of a text may begin, the longest tail first."""
    starts: list[int] = []
    for piece in reversed(list(_PIECE.finditer(text))):
        token = piece.group()
        if token[0] == '"' or (token.isascii() and token.isalpha()):
            starts.append(piece.start())
        elif not re.fullmatch(r"\^\s*\{?-?\d\}?|[-/*.\s]+", token):
            break
    return [start - (text[start - 1 : start] == " ") for start in starts[::-1] if start > 0][-8:]


def _is_value(text: str) -> bool:
    """Whether what stands before a unit can be a value: it holds a digit or pi, or is one letter."""
    if re.search(r"[-+*/^=(]\s*$", text):
        return False
    return bool(re.search(r"\d|\\pi", text)) or bool(re.fullmatch(r"\s*[a-z]\s*", text))


def unit_of(tail: str) -> Unit | None:
    """The unit that words name; None where they may be variables."""
    quoted = '"' in tail
    words = re.findall(r"[A-Za-z]+|\^\s*\{?-?\d\}?|/", tail.replace(".", ""))
    if not quoted and not _are_words(tail, words):
        return None
    dimension: dict[str, int] = {}
    factor, sign, next_power, last = Fraction(1), 1, 1, ""
    expanded = [
        part for word in words for part in re.findall(r"[A-Za-z]+|/|\^.*", _SPEEDS.get(word.lower(), word))
    ]
    for word in expanded:
        low = word.lower()
        if low in ("/", "per"):
            sign = -1
        elif low.startswith("^"):
            power = int(re.sub(r"[^-\d]", "", low)) - 1
            if last:
                kind, size = _UNITS[last]
                dimension[kind] = dimension.get(kind, 0) + sign * power
                factor *= size ** (sign * power)
        elif low in ("squared", "cubed") and last:
            kind, size = _UNITS[last]
            power = _POWERS[low] - 1
            dimension[kind] = dimension.get(kind, 0) + sign * power
            factor *= size ** (sign * power)
        elif low in _POWERS:
            next_power = _POWERS[low]
        elif low in _UNITS:
            kind, size = _UNITS[low]
            dimension[kind] = dimension.get(kind, 0) + sign * next_power
            factor *= size ** (sign * next_power)
            last, next_power = low, 1
        elif low not in ("a", "an", "the", "of", "radians", "radian", "rad"):
            return Unit(None)
    if not dimension:
        return Unit(None)
    return Unit(tuple(sorted((k, v) for k, v in dimension.items() if v)), factor)


def _are_words(tail: str, words: list[str]) -> bool:
    """Whether unquoted letters are words, not variables: known units, or words of three letters or more."""
    letters = [word for word in words if word[0].isalpha()]
    if not letters:
        return False
    if len(letters[0]) == 1:
        joined = len(letters) == 1 or re.fullmatch(
            r"\s*[A-Za-z]+\s*/\s*[A-Za-z]+\s*(?:\^\s*\{?\d\}?)?\s*", tail
        )
        return tail[0] == " " and letters[0] in _LETTERS and bool(joined)
    known = [word.lower() in _UNITS or word.lower() in _SPEEDS or len(word) >= 3 for word in letters]
    return known[0] and letters[0] not in ("sin", "cos", "tan", "log", "ln", "mod", "exp", "sqrt")

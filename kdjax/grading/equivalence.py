r"""When two short answers are the same: exact rationals, lists of them, or else the same tokens.

Text is read, never evaluated: `6*7` and `\frac{6\cdot7}{1}` are not 42. Nothing is rounded: no
float occurs. All is bounded: 512 characters, 64 digits in a row, 64 entries, 4 levels of brackets.
docs/verifier.md has the whole list of what equals what.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction
from typing import NamedTuple

MAX_ANSWER_CHARACTERS = 512
MAX_LEVELS, MAX_ENTRIES = 4, 64


class Number(NamedTuple):
    """An exact rational; whether a percent sign stood behind it, and the unit, if any."""

    value: Fraction | int
    percent: bool = False
    unit: str = ""


class Entries(NamedTuple):
    """Values between brackets, or between commas without any; a set's order is no matter."""

    brackets: str
    values: tuple[Value, ...]


MINUS_SIGN = "\u2212"
"""The sign that is set for minus."""
Tokens = tuple[str, ...]
"""Any other text: its LaTeX commands, numerals and characters, without the spaces."""
Value = Number | Entries | Tokens


def is_equivalent(answer: str | None, gold: str) -> bool:
    r"""True if both state the same number, the same entries, or else the same tokens.

    Reflexive and symmetric. None is equal to nothing; texts over 512 characters only to themselves.

    >>> is_equivalent("07", "7"), is_equivalent(r"\frac12", "0.5"), is_equivalent("6*7", "42")
    (True, True, False)
    """
    if answer is None:
        return False
    if answer == gold or max(len(answer), len(gold)) > MAX_ANSWER_CHARACTERS:
        return answer == gold
    return _same(read(answer), read(gold))


@functools.lru_cache(maxsize=4096)
def read(text: str) -> Value:
    r"""What an answer says.

    >>> read(r"$1{,}000 \text{ cm}$")
    Number(value=1000, percent=False, unit='cm')
    """
    text = text.strip().replace(MINUS_SIGN, "-")
    if _INTEGER.fullmatch(text):
        return Number(int(text))
    plain = _number(text)  # most answers are, and need no other spelling
    if plain is not None:
        return plain
    choice = _CHOICE.fullmatch(text)
    if choice:
        return (choice[choice.lastindex or 1].upper(),)
    spelled = _spelled(text)
    few = spelled.count(",") + spelled.count(r"\cup") < MAX_ENTRIES
    return _value(spelled, MAX_LEVELS if few else 0)


_INTEGER = re.compile(r"[+-]?[0-9]{1,64}")
_CHOICE = re.compile(
    r"\$?(?:\(([A-Ja-j])\)|([A-J])|\\(?:text|mathrm|textbf|mathbf)\{ ?\(?([A-Ja-j])\)? ?\})\$?\.?"
)


def _same(left: Value, right: Value) -> bool:
    if isinstance(left, Number) and isinstance(right, Number):
        return _same_number(left, right)
    if isinstance(left, Entries) and isinstance(right, Entries):
        return (
            left.brackets == right.brackets
            and len(left.values) == len(right.values)
            and all(map(_same, left.values, right.values))
        )
    return type(left) is type(right) and left == right


def _same_number(left: Number, right: Number) -> bool:
    """50% is 50 where the other side leaves the sign out, and 1/2 where it is a plain number. Units
    that both sides state must agree."""
    if left.unit and right.unit and left.unit != right.unit:
        return False
    if left.percent == right.percent:
        return left.value == right.value
    percent, plain = (left, right) if left.percent else (right, left)
    return not plain.unit and plain.value in (percent.value, Fraction(percent.value, 100))


# --- one spelling ---------------------------------------------------------------------------------

_SPELLINGS = {
    **dict.fromkeys((r"\dfrac", r"\tfrac", r"\cfrac"), r"\frac"),
    **dict.fromkeys((r"\left", r"\right", r"\displaystyle", r"\!", r"\big", r"\Big"), ""),
    **dict.fromkeys((r"\,", r"\;", r"\:", "\\ ", r"\>", "~", r"\quad", r"\qquad"), " "),
    **dict.fromkeys((r"^\circ", r"^{\circ}", r"\degree", r"^\degree"), "°"),
    r"\%": "%", r"\$": "$", r"\textdollar": "$", r"\lbrace": r"\{", r"\rbrace": r"\}",
    r"\le": r"\leq", r"\ge": r"\geq", r"\ne": r"\neq", r"\to": r"\rightarrow",
}  # fmt: skip
_SPECIAL = re.compile(r"[\\{~]")
_COMMAND = re.compile(r"\^\{?\\(?:circ|degree)\b\}?|\\[A-Za-z]+|\\.|~")
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|\\,|\\!,|,\\!)(?=[0-9]{3}(?![0-9]))")
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathsf|mbox|operatorname) ?\{([^{}\\]*)\}"
)
_IN_TEXT = "\x1f"  # stands before what was in \text{}; white space to every later step
_SHORT_ARGUMENT = re.compile(r"\\frac ?([0-9])(?: ?([0-9])|(?=\{))|\\sqrt ?([0-9])")
_SHORT_BOTTOM = re.compile(r"(\\frac ?\{[^{}]*\}) ?([0-9])")
_LONE_BRACES = re.compile(r"([\^_])\{([A-Za-z0-9])\}")


def _spelled(text: str) -> str:
    """One spelling of what LaTeX can write in several ways, where the meaning is the same."""
    text = _undelimited(" ".join(text.split()))
    if not _SPECIAL.search(text):
        return text
    text = _THOUSANDS.sub("", text)
    text = _TEXT.sub(rf" {_IN_TEXT}\1 ", text)
    text = _COMMAND.sub(lambda m: _SPELLINGS.get(m[0], m[0]), text)
    text = _SHORT_ARGUMENT.sub(_braced, text)
    text = _SHORT_BOTTOM.sub(r"\1{\2}", text)
    return _undelimited(_LONE_BRACES.sub(r"\1\2", text))


def _undelimited(text: str) -> str:
    """Without a final period, and without the signs of mathematics around all of it."""
    for _ in range(2):
        text = text.strip(" ")
        if not text.endswith(_ENDINGS):
            break
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1].rstrip(" ")
        for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
            inner = text[len(opening) : -len(closing)]
            if text.startswith(opening) and text.endswith(closing) and opening not in inner:
                text = inner if len(text) > len(opening) else text
    return text.strip(" ")


_ENDINGS = (".", "$", r"\)", r"\]")


def _braced(found: re.Match) -> str:
    top, bottom, root = found.groups()
    if root:
        return rf"\sqrt{{{root}}}"
    return rf"\frac{{{top}}}" + (f"{{{bottom}}}" if bottom else "")


# --- numbers, entries, tokens ---------------------------------------------------------------------

_DIGITS = "[0-9]{1,64}"
_NUMBER = re.compile(
    rf"""(?P<sign>[+-]?)\ ?(?P<currency>[$€£]?)\ ?(?P<inner>[+-]?)\ ?
    (?:
      (?:(?P<whole>{_DIGITS})(?:\ ?(?=\\[dt]?frac)|\ (?=[0-9])))?
      (?: \\[dt]?frac\ ?\{{\ ?(?P<top>[+-]?{_DIGITS})\ ?\}}\ ?\{{\ ?(?P<bottom>[+-]?{_DIGITS})\ ?\}}
        | (?P<over>{_DIGITS})\ ?/\ ?(?P<under>{_DIGITS})(?![0-9]) )
    | (?P<decimal>[0-9]{{1,3}}(?:,[0-9]{{3}}){{1,20}}(?![0-9])(?:\.{_DIGITS})?
        | {_DIGITS}(?:\.[0-9]{{0,64}})? | \.{_DIGITS})(?![0-9])
    )""",
    re.VERBOSE,
)
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[0-9]+(?:\.[0-9]+)?|\S")
_BRACKET = re.compile(r"\\[{}]|\\cup(?![A-Za-z])|\\.|[()\[\]{},]")
_OPENING, _CLOSING = {"(", "[", "{", r"\{"}, {")", "]", "}", r"\}"}


def _value(text: str, levels: int) -> Value:
    text = text.strip(f" {_IN_TEXT}")
    number = _number(text)
    if number is not None:
        return number
    made = _entries(text, levels) if levels else None
    return tuple(_TOKEN.findall(text)) if made is None else made


def _number(text: str) -> Number | None:
    found = _NUMBER.match(text)
    if not found or (found["sign"] and found["inner"]):
        return None
    value = _magnitude(found)
    if value is None:
        return None
    if "-" in (found["sign"], found["inner"]):
        value = -value
    rest = text[found.end() :]
    percent = rest.strip(f" {_IN_TEXT}") in ("%", "percent")
    unit = "" if percent or not rest.strip(" ") else _unit(rest)
    if found["currency"]:
        if percent or unit not in ("", _CURRENCIES[found["currency"]]):
            return None
        unit = _CURRENCIES[found["currency"]]
    return None if unit is None else Number(value, percent, unit)


def _magnitude(found: re.Match) -> Fraction | int | None:
    """The number itself, or None for a division by zero or what is no mixed number."""
    if found["decimal"] is not None:
        whole, _, part = found["decimal"].replace(",", "").partition(".")
        return Fraction(int(whole + part), 10 ** len(part)) if part else int(whole)
    top = int(found["top"] or found["over"])
    bottom = int(found["bottom"] or found["under"])
    if bottom == 0:
        return None
    if found["whole"] is None:
        return Fraction(top, bottom)
    return int(found["whole"]) + Fraction(top, bottom) if 0 < top < bottom else None


def _entries(text: str, levels: int) -> Value | None:
    r"""The values between the outer brackets, commas or \cup; None where there are none."""
    pieces, separator, brackets = _split(text)
    if separator is not None:
        values = tuple(_value(piece, levels - 1) for piece in pieces)
        return _unordered(values) if separator == "," else Entries(separator, values)
    if not brackets:
        return None
    opening, closing = brackets
    inner = text[len(opening) : -len(closing)]
    if opening == "{":
        return _value(inner, levels - 1)
    values = tuple(_value(piece, levels - 1) for piece in _split(inner)[0])
    if opening == "(" and closing == ")" and len(values) == 1:
        return values[0] if isinstance(values[0], Number) else None
    return _unordered(values) if opening == r"\{" else Entries(opening + closing, values)


def _split(text: str) -> tuple[list[str], str | None, tuple[str, str] | None]:
    r"""(pieces, what separates them at the outermost level, brackets that enclose all of it).

    A comma separates before \cup does; brackets count only where nothing separates.
    """
    cuts: dict[str, list[int]] = {",": [], r"\cup": []}
    level, first, enclosed = 0, "", True
    for found in _BRACKET.finditer(text):
        mark = found[0]
        if mark in _OPENING:
            if level == 0:
                first = first or mark
                enclosed = enclosed and found.start() == 0
            level += 1
        elif mark in _CLOSING:
            level -= 1
            if level < 0:
                return [text], None, None
            if level == 0 and enclosed and found.end() == len(text):
                return [text], None, _matching(first, mark)
        elif level == 0 and mark in cuts:
            cuts[mark].append(found.start())
    if level:
        return [text], None, None
    for mark, places in cuts.items():
        if places:
            starts = [0, *(place + len(mark) for place in places)]
            ends = [*places, len(text)]
            return [text[a:b] for a, b in zip(starts, ends, strict=True)], mark, None
    return [text], None, None


def _matching(opening: str, closing: str) -> tuple[str, str] | None:
    """The pair, where it is one: braces match alone, round and square ones mix in intervals."""
    braces = {"{": "}", r"\{": r"\}"}
    fits = closing == braces.get(opening, closing) and (opening in braces or closing in (")", "]"))
    return (opening, closing) if fits else None


def _unordered(values: tuple[Value, ...]) -> Entries:
    return Entries("{}", tuple(sorted(values, key=_place)))


def _place(value: Value) -> tuple:
    """A total order of values; equal ones that are spelled apart (5 and 5 cm) stay together."""
    if isinstance(value, Number):
        return 0, value.value, value.unit
    return 1, 0, repr(value)


# --- units ----------------------------------------------------------------------------------------

_CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound", "": ""}
_UNITS = {
    "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m", "kilometer": "km",
    "kilometre": "km", "millimeter": "mm", "millimetre": "mm", "inch": "in", "inche": "in",
    "feet": "ft", "foot": "ft", "yard": "yd", "mile": "mi", "gram": "g", "kilogram": "kg",
    "liter": "l", "litre": "l", "milliliter": "ml", "second": "s", "sec": "s", "minute": "min",
    "hour": "h", "hr": "h", "degree": "degree", "deg": "degree", "usd": "dollar", "cent": "cent",
    "euro": "euro", "pound": "pound", "unit": "unit", "mph": "mph", "day": "day", "week": "week",
    "year": "year", "month": "month", "radian": "rad", "people": "people", "cm": "cm", "km": "km",
    "mm": "mm", "kg": "kg", "ml": "ml", "min": "min", "ft": "ft", "rad": "rad", "lb": "pound",
}  # fmt: skip
_LETTERS = frozenset("mgshlLNJWVAKCF")  # other lone letters are no units
_CHANGES_VALUE = """
hundred thousand million billion trillion dozen score pair half halves third quarter fifth times
plus minus over divided squared cubed factorial choose mod modulo base power and or to into not
about around approximately almost between less more than least most remainder pi tau alpha beta
gamma delta theta lambda sigma omega infinity infinite sqrt root log sin cos tan gcd lcm max
floor ceil percent hundredth thousandth tenth point double twice triple exp arg det below above
negative
"""
"""Words that make another number of the one before them, or doubt of it: never a unit."""
_NO_UNITS = frozenset(_CHANGES_VALUE.split())
_WORD = re.compile(r"([A-Za-z]{1,24})\.?(\^[23])?")
MAX_UNIT_CHARACTERS = 64


def _unit(rest: str) -> str | None:
    r"""The unit that stands behind a number, or None where it is none.

    In \text{} any words are; otherwise known units are, and words of four letters or more behind a
    space: a product of variables is none.
    """
    in_text = _IN_TEXT in rest
    if len(rest) > MAX_UNIT_CHARACTERS:
        return None
    plain = rest.replace(_IN_TEXT, "").replace(" ^", "^")
    words = plain.replace("/", " per ").replace("°", " degrees ").split()
    power, names = "", []
    for written in words:
        found = _WORD.fullmatch(written)
        if not found:
            return None
        word = found[1].lower()
        stem = word.removesuffix("s") if len(word) > 2 else word
        if word in _NO_UNITS or stem in _NO_UNITS:
            return None
        if word in ("square", "sq", "cubic"):
            power = "^3" if word == "cubic" else "^2"
            continue
        known = stem in _UNITS or word == "per"
        in_words = len(word) > 3 and rest.startswith(" ")
        lone = len(word) == 1 and found[1] not in _LETTERS
        if not known and (lone or not (in_text or in_words)):
            return None
        names.append(_UNITS.get(stem, stem) + (found[2] or power))
        power = ""
    return " ".join(names) if names and "per" not in (names[0], names[-1]) else None

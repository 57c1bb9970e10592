"""The filter language of exports: text → a small tree → one function that judges a row.

    status = 'open' and (n >= 10 or not city in ('Rome', 'Oslo')) and note is not null

Strategy. One regular expression cuts the text into tokens, a recursive descent builds a tree of
frozen structs. Names and values stand in the tree by themselves, as parameters: whoever evaluates
it, here or in SQL, binds them and never pastes them into text. ``compile_test`` turns the tree into
nested closures once, so that a row costs a few calls. All work on a cell is linear in its length.

What a test means (docs/exports.md has it for users): a text literal compares with the cell's text
by code points; a number compares exactly, and a cell that is no number matches no numeric test; a
cell without a value matches nothing but ``is null``. ``not`` inverts what it finds.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

MAX_BYTES = 4096
MAX_DEPTH = 32
MAX_TESTS = 200
MAX_SEARCHED = 64  # characters of patterns like %a_b%, all together: each costs time for each byte
_MAX_NUMBER_CHARS = 1000

Value = str | Decimal | bool
Op = Literal["=", "!=", "<", "<=", ">", ">="]


class _Node(msgspec.Struct, frozen=True):
    """A part of the tree."""


class Compare(_Node, frozen=True):
    """``column op value``."""

    column: str
    op: Op
    value: Value


class In(_Node, frozen=True):
    """``column in (value, …)``."""

    column: str
    values: tuple[Value, ...]


class Like(_Node, frozen=True):
    """``column like 'pattern'``: ``%`` stands for any text, ``_`` for any one character."""

    column: str
    pattern: str


class Between(_Node, frozen=True):
    """``column between low and high``, both included."""

    column: str
    low: str | Decimal
    high: str | Decimal


class Null(_Node, frozen=True):
    """``column is null``: missing, JSON null, or empty."""

    column: str


class Not(_Node, frozen=True):
    """``not test``."""

    test: Test


class And(_Node, frozen=True):
    """All of them."""

    tests: tuple[Test, ...]


class Or(_Node, frozen=True):
    """Any of them."""

    tests: tuple[Test, ...]


Test = Compare | In | Like | Between | Null | Not | And | Or


class WhereError(ValueError):
    """The text is no filter; says what was expected, and at which character."""


# Text → tree

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<text>'(?:[^']++|'')*+')
    | (?P<name>"(?:[^"]++|"")*+")
    | (?P<number>[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?(?!\w))
    | (?P<word>[^\W\d]\w*+)
    | (?P<sign><=|>=|!=|<>|[=<>(),])
    | (?P<end>\Z)
    )""",
    re.VERBOSE,
)
_KEYWORDS = frozenset({"and", "or", "not", "in", "like", "between", "is", "null", "true", "false"})


class _Token(NamedTuple):
    kind: str  # text, name, number, sign, end, or the keyword itself
    value: str
    at: int


def _tokens(text: str) -> list[_Token]:
    found, at = [], 0
    while True:
        match = _TOKEN.match(text, at)
        if match is None:
            at += len(text[at:]) - len(text[at:].lstrip())
            if text[at] in "'\"":
                raise WhereError(f"the quote at character {at + 1} is not closed")
            raise WhereError(f"{text[at : at + 20]!r} at character {at + 1} is not understood")
        kind, value = str(match.lastgroup), match[str(match.lastgroup)]
        start, at = match.start(kind), match.end()
        if kind in ("text", "name"):
            value = value[1:-1].replace(value[0] * 2, value[0])
        if kind == "word":
            lower = value.lower()
            kind = lower if lower in _KEYWORDS else "name"
        found.append(_Token(kind, value, start))
        if kind == "end":
            return found


class _Parser:
    """Recursive descent; ``or`` binds weaker than ``and``, ``and`` weaker than ``not``."""

    def __init__(self, text: str) -> None:
        self._tokens = _tokens(text)
        self._next = 0
        self._depth = 0
        self._tests = 0
        self._searched = 0

    def whole(self) -> Test:
        test = self._any()
        if self._peek.kind != "end":
            raise self._wrong("'and', 'or' or the end")
        return test

    @property
    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self, kind: str, value: str | None = None) -> _Token | None:
        token = self._peek
        if token.kind != kind or (value is not None and token.value != value):
            return None
        self._next += 1
        return token

    def _wrong(self, expected: str) -> WhereError:
        token = self._peek
        found = "the end" if token.kind == "end" else repr(token.value[:40])
        return WhereError(f"at character {token.at + 1}: expected {expected}, found {found}")

    def _sign(self, value: str) -> None:
        if self._take("sign", value) is None:
            raise self._wrong(repr(value))

    def _any(self) -> Test:
        tests = [self._all()]
        while self._take("or"):
            tests.append(self._all())
        return tests[0] if len(tests) == 1 else Or(tuple(tests))

    def _all(self) -> Test:
        tests = [self._one()]
        while self._take("and"):
            tests.append(self._one())
        return tests[0] if len(tests) == 1 else And(tuple(tests))

    def _one(self) -> Test:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise WhereError(f"more than {MAX_DEPTH} levels of 'not' and parentheses")
        if self._take("not"):
            test: Test = Not(self._one())
        elif self._take("sign", "("):
            test = self._any()
            self._sign(")")
        else:
            test = self._test()
        self._depth -= 1
        return test

    def _test(self) -> Test:
        name = self._take("name")
        if name is None:
            raise self._wrong("the name of a column")
        self._tests += 1
        if self._tests > MAX_TESTS:
            raise WhereError(f"more than {MAX_TESTS} tests")
        if self._take("is"):
            negated = self._take("not") is not None
            if self._take("null") is None:
                raise self._wrong("'null'")
            return Not(Null(name.value)) if negated else Null(name.value)
        if self._peek.kind == "sign":
            return self._comparison(name.value)
        negated = self._take("not") is not None
        test = self._membership(name.value)
        return Not(test) if negated else test

    def _membership(self, column: str) -> Test:
        if self._take("in"):
            self._sign("(")
            values = [self._value()]
            while self._take("sign", ","):
                values.append(self._value())
            self._sign(")")
            return In(column, tuple(values))
        if self._take("like"):
            pattern = self._take("text")
            if pattern is None:
                raise self._wrong("a pattern in single quotes")
            self._searched += sum(len(part) for part in _searched(pattern.value) if "_" in part)
            if self._searched > MAX_SEARCHED:
                raise WhereError(
                    f"patterns with '_' between two '%' are longer than {MAX_SEARCHED} characters"
                )
            return Like(column, pattern.value)
        if self._take("between"):
            low = self._ordered()
            if self._take("and") is None:
                raise self._wrong("'and'")
            at = self._peek.at
            high = self._ordered()
            if type(low) is not type(high):
                raise WhereError(f"at character {at + 1}: expected two numbers or two texts")
            return Between(column, low, high)
        raise self._wrong("a comparison, 'in', 'like', 'between' or 'is'")

    def _comparison(self, column: str) -> Test:
        sign = self._peek
        if sign.value not in _COMPARES and sign.value != "<>":
            raise self._wrong("a comparison")
        self._next += 1
        op: Any = "!=" if sign.value == "<>" else sign.value
        value = self._value() if op in ("=", "!=") else self._ordered()
        return Compare(column, op, value)

    def _ordered(self) -> str | Decimal:
        if self._peek.kind not in ("text", "number"):
            raise self._wrong("a number, or a text in single quotes")
        value = self._value()
        assert not isinstance(value, bool)
        return value

    def _value(self) -> Value:
        token = self._peek
        if token.kind == "text":
            value: Value = token.value
        elif token.kind == "number":
            number = number_of(token.value)
            if number is None:
                raise WhereError(f"at character {token.at + 1}: the number is too large or long")
            value = number
        elif token.kind in ("true", "false"):
            value = token.kind == "true"
        elif token.kind == "null":
            raise WhereError(f"at character {token.at + 1}: null is tested by 'is null'")
        else:
            raise self._wrong("a number, true, false, or a text in single quotes")
        self._next += 1
        return value


def parse(text: str) -> Test:
    """Read a filter of at most 4 KiB. Raises WhereError."""
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise WhereError(f"it is longer than {MAX_BYTES} bytes")
    return _Parser(text).whole()


def columns_of(test: Test) -> list[str]:
    """The columns that a filter looks at, each once, in their order."""
    if isinstance(test, Not):
        return columns_of(test.test)
    if isinstance(test, And | Or):
        return list(dict.fromkeys(name for part in test.tests for name in columns_of(part)))
    return [test.column]


def count_of(test: Test) -> int:
    """How many cells a filter looks at."""
    if isinstance(test, Not):
        return count_of(test.test)
    if isinstance(test, And | Or):
        return sum(map(count_of, test.tests))
    return 1


# Tree → function


class Cells(Protocol):
    """How a source's rows are read: what stands in a column, as the language sees it."""

    def text(self, column: str) -> Callable[[Any], str | None]:
        """Of a row: the cell's text, or None where there is no value."""
        ...

    def truth(self, column: str) -> Callable[[Any], bool | None]:
        """Of a row: true, false, or None where the cell is neither."""
        ...


Judge = Callable[[Any], bool]

_NUMBER = re.compile(r"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?")
_COMPARES: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def number_of(text: str) -> Decimal | None:
    """The exact number that a text is; None for all else, also for ``1_000``, nan and inf."""
    if len(text) > _MAX_NUMBER_CHARS or _NUMBER.fullmatch(text) is None:
        return None
    try:
        return Decimal(text)
    except InvalidOperation:  # an exponent beyond all bounds
        return None


def compile_test(test: Test, cells: Cells) -> Judge:
    """One function from a row to whether it matches."""
    match test:
        case Not(inner):
            judge = compile_test(inner, cells)
            return lambda row: not judge(row)
        case And(tests):
            return _every([compile_test(part, cells) for part in tests])
        case Or(tests):
            return _some([compile_test(part, cells) for part in tests])
        case _:
            return _leaf(test, cells)


def _leaf(test: Null | Compare | In | Like | Between, cells: Cells) -> Judge:
    """The function for a test of one cell."""
    match test:
        case Null(column):
            text = cells.text(column)
            return lambda row: not text(row)
        case Compare(column, op, value):
            return _on(cells, column, value, _compared(op, value))
        case In(column, values):
            return _some(_members(cells, column, values))
        case Like(column, pattern):
            return _on(cells, column, pattern, like(pattern))
        case Between(column, low, high):
            return _on(cells, column, low, lambda cell: low <= cell <= high)


def _every(judges: list[Judge]) -> Judge:
    if len(judges) == 2:
        first, second = judges
        return lambda row: first(row) and second(row)
    return lambda row: all(judge(row) for judge in judges)


def _some(judges: list[Judge]) -> Judge:
    if len(judges) == 1:
        return judges[0]
    return lambda row: any(judge(row) for judge in judges)


def _compared(op: str, value: Value) -> Callable[[Any], bool]:
    compare = _COMPARES[op]
    return lambda cell: compare(cell, value)


def _members(cells: Cells, column: str, values: tuple[Value, ...]) -> list[Judge]:
    """One look-up for each sort of value."""
    judges = []
    for sort in (str, Decimal, bool):
        chosen = frozenset(value for value in values if type(value) is sort)
        if chosen:
            judges.append(_on(cells, column, next(iter(chosen)), chosen.__contains__))
    return judges


def _on(cells: Cells, column: str, like_this: Value, test: Callable[[Any], bool]) -> Judge:
    """Apply a test to what the cell is as such a value; a cell that is none does not match."""
    if isinstance(like_this, bool):
        truth = cells.truth(column)
        return lambda row: (cell := truth(row)) is not None and test(cell)
    text = cells.text(column)
    if isinstance(like_this, str):
        return lambda row: (cell := text(row)) is not None and test(cell)

    def numeric(row: Any) -> bool:
        cell = text(row)
        if cell is None:
            return False
        number = number_of(cell)
        return number is not None and test(number)

    return numeric


def _searched(pattern: str) -> list[str]:
    """The parts of a pattern that may stand anywhere: those between two ``%``."""
    return [part for part in pattern.split("%")[1:-1] if part]


def like(pattern: str) -> Callable[[str], bool]:
    """A function that tells whether a whole text matches, case-sensitively.

    The parts between ``%`` are looked for from left to right, each at the first place behind the
    one before. That is as good as any other choice, so nothing is ever tried twice.
    """
    if "%" not in pattern:
        size, starts = len(pattern), _at(pattern)
        return lambda text: len(text) == size and starts(text, 0)
    first, last = pattern[: pattern.index("%")], pattern[pattern.rindex("%") + 1 :]
    starts, ends = _at(first), _at(last)
    head, tail = len(first), len(last)
    finds = [_find(part) for part in _searched(pattern)]

    def matches(text: str) -> bool:
        if len(text) < head + tail or not starts(text, 0):
            return False
        end = len(text) - tail
        if not ends(text, end):
            return False
        at = head
        for find in finds:
            at = find(text, at, end)
            if at < 0:
                return False
        return True

    return matches


def _at(part: str) -> Callable[[str, int], bool]:
    """Whether a part stands at a place."""
    if "_" not in part:
        return lambda text, at: text.startswith(part, at)
    match = _regex(part).match
    return lambda text, at: match(text, at) is not None


def _find(part: str) -> Callable[[str, int, int], int]:
    """Where the first such part ends that stands whole between two places; -1 if there is none."""
    if "_" not in part:
        size = len(part)
        return lambda text, at, end: -1 if (found := text.find(part, at, end)) < 0 else found + size
    search = _regex(part).search
    return lambda text, at, end: -1 if (found := search(text, at, end)) is None else found.end()


def _regex(part: str) -> re.Pattern[str]:
    return re.compile("".join("." if c == "_" else re.escape(c) for c in part), re.DOTALL)

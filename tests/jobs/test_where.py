"""The filter language of exports: what it reads, what it means, what it refuses, what it costs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from time import process_time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.kinds._where import (
    MAX_DEPTH,
    And,
    Between,
    Compare,
    In,
    Like,
    Not,
    Null,
    Or,
    Test,
    Value,
    WhereError,
    columns_of,
    compile_test,
    count_of,
    like,
    number_of,
    parse,
)

Row = dict[str, Any]


class Plain:
    """Rows whose cells are texts, true, false or nothing."""

    def text(self, column: str) -> Callable[[Row], str | None]:
        """The cell as text."""

        def text(row: Row) -> str | None:
            cell = row.get(column)
            return str(cell).lower() if isinstance(cell, bool) else cell

        return text

    def truth(self, column: str) -> Callable[[Row], bool | None]:
        """The cell if it is true or false."""
        return lambda row: cell if isinstance(cell := row.get(column), bool) else None


def matches(text: str, **row: Any) -> bool:
    """Whether a filter lets a row through."""
    return compile_test(parse(text), Plain())(row)


# A printer and an oracle that share nothing with the code.


def shown(test: Test) -> str:
    """The tree as text, with all parentheses."""
    match test:
        case Not(inner):
            return f"not ({shown(inner)})"
        case And(tests):
            return " and ".join(f"({shown(part)})" for part in tests)
        case Or(tests):
            return " OR ".join(f"({shown(part)})" for part in tests)
        case _:
            return shown_leaf(test)


def shown_leaf(test: Null | Compare | In | Like | Between) -> str:
    """One test as text."""
    match test:
        case Null(column):
            return f"{name(column)} Is Null"
        case Compare(column, op, value):
            return f"{name(column)}{op}{literal(value)}"
        case In(column, values):
            return f"{name(column)} in({','.join(map(literal, values))})"
        case Like(column, pattern):
            return f"{name(column)} like {literal(pattern)}"
        case Between(column, low, high):
            return f"{name(column)} between {literal(low)} and {literal(high)}"


def name(column: str) -> str:
    """A column as text."""
    return '"' + column.replace('"', '""') + '"'


def literal(value: Value) -> str:
    """A value as text."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, Decimal) else "'" + value.replace("'", "''") + "'"


def fraction(cell: Any) -> Fraction | None:
    """What a cell is as a number."""
    text = str(cell).lower() if isinstance(cell, bool) else cell
    if text is None or not re.match(r"^[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\Z", text, re.ASCII):
        return None
    return Fraction(text.rstrip(".") if text.endswith(".") else re.sub(r"\.([eE])", r"\1", text))


def oracle(test: Test, row: Row) -> bool:
    """What the documentation says, word by word."""
    match test:
        case Not(inner):
            return not oracle(inner, row)
        case And(tests):
            return min(oracle(part, row) for part in tests)
        case Or(tests):
            return max(oracle(part, row) for part in tests)
        case _:
            return oracle_leaf(test, row)


def oracle_leaf(test: Null | Compare | In | Like | Between, row: Row) -> bool:
    """The meaning of one test."""
    match test:
        case Null(column):
            return row.get(column) in (None, "")
        case In(column, values):
            return max(oracle(Compare(column, "=", value), row) for value in values)
        case Between(column, low, high):
            return oracle(Compare(column, ">=", low), row) and oracle(
                Compare(column, "<=", high), row
            )
        case Compare():
            return oracle_compare(test, row.get(test.column))
        case Like():
            return oracle_like(test, row.get(test.column))


def oracle_like(test: Like, cell: Any) -> bool:
    """The meaning of a pattern, by a regular expression."""
    pattern = "".join({"%": ".*", "_": "."}.get(c, re.escape(c)) for c in test.pattern)
    text = str(cell).lower() if isinstance(cell, bool) else cell
    return text is not None and re.fullmatch(pattern, text, re.DOTALL) is not None


def oracle_compare(test: Compare, cell: Any) -> bool:
    """The meaning of a comparison."""
    left: Any
    right: Any
    if isinstance(test.value, bool):
        left, right = cell if isinstance(cell, bool) else None, test.value
    elif isinstance(test.value, Decimal):
        left, right = fraction(cell), Fraction(test.value)
    else:
        left, right = str(cell).lower() if isinstance(cell, bool) else cell, test.value
    if left is None:
        return False
    verdicts: dict[str, bool] = {
        "=": left == right,
        "!=": left != right,
        "<": left < right,
        "<=": left <= right,
        ">": left > right,
        ">=": left >= right,
    }
    return verdicts[test.op]


COLUMNS = st.sampled_from(["a", "b", "and", 'odd "name"', "ä", ""])
TEXTS = st.text("ab%_'\\.*\nä1", max_size=4)
NUMBERS = st.decimals(-100, 100, places=2) | st.integers(-(10**20), 10**20).map(Decimal)
ORDERED = st.one_of(
    st.tuples(COLUMNS, TEXTS, TEXTS).map(lambda t: Between(*t)),
    st.tuples(COLUMNS, NUMBERS, NUMBERS).map(lambda t: Between(*t)),
    st.builds(Compare, COLUMNS, st.sampled_from(["<", "<=", ">", ">="]), TEXTS | NUMBERS),
)
VALUES = TEXTS | NUMBERS | st.booleans()
LEAVES = st.one_of(
    ORDERED,
    st.builds(Compare, COLUMNS, st.sampled_from(["=", "!="]), VALUES),
    st.tuples(COLUMNS, st.lists(VALUES, min_size=1, max_size=4).map(tuple)).map(lambda t: In(*t)),
    st.tuples(COLUMNS, TEXTS).map(lambda t: Like(*t)),
    COLUMNS.map(Null),
)


def _grown(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, min_size=2, max_size=3).map(tuple)
    return inner.map(Not) | several.map(And) | several.map(Or)


TREES = st.recursive(LEAVES, _grown, max_leaves=8)
CELLS = st.one_of(
    st.none(), st.booleans(), TEXTS, NUMBERS.map(str), st.sampled_from(["1_0", "nan", "-.5", "1e2"])
)
ROWS = st.dictionaries(COLUMNS, CELLS, max_size=6)


@given(TREES)
def test_a_tree_that_is_written_is_read_again(tree: Test) -> None:
    """What is printed with all quotes and parentheses is read as the same tree."""
    assert parse(shown(tree)) == tree


@given(TREES, st.lists(ROWS, min_size=1, max_size=5))
def test_a_filter_means_what_is_documented(tree: Test, rows: list[Row]) -> None:
    """On any row, the compiled filter agrees with the documentation taken literally."""
    judge = compile_test(tree, Plain())
    assert [judge(row) for row in rows] == [oracle(tree, row) for row in rows]


def test_and_binds_stronger_than_or() -> None:
    """``not`` before ``and`` before ``or``; parentheses change that."""
    a, b, c = (Compare(column, "=", "x") for column in "abc")
    assert parse("a='x' or b='x' and not c='x'") == Or((a, And((b, Not(c)))))
    assert parse("(a='x' or b='x') and c='x'") == And((Or((a, b)), c))


def test_the_whole_language_in_one() -> None:
    """Keywords in any case, names and values with their quotes doubled, every sort of test."""
    text = """a <> 'it''s' AND n >= -1.5e3 And not b in ('p', 2, TRUE) and c not like 'ab%'
              and d IS NOT NULL and e not between 1 and 9 and "odd ""name" != ''"""
    assert parse(text) == And(
        (
            Compare("a", "!=", "it's"),
            Compare("n", ">=", Decimal("-1.5e3")),
            Not(In("b", ("p", Decimal(2), True))),
            Not(Like("c", "ab%")),
            Not(Null("d")),
            Not(Between("e", Decimal(1), Decimal(9))),
            Compare('odd "name', "!=", ""),
        )
    )
    assert columns_of(parse(text)) == ["a", "n", "b", "c", "d", "e", 'odd "name']
    assert count_of(parse(text)) == 7


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "character 1: expected the name of a column, found the end"),
        ("a", "character 2: expected a comparison"),
        ("a =", "character 4: expected a number"),
        ("a = 'x", "quote at character 5 is not closed"),
        ('"a = 1', "quote at character 1 is not closed"),
        ("a == 1", "character 4: expected"),
        ("a = b", "character 5: expected a number"),
        ("a = 1_000", "character 5"),
        ("a = nan", "character 5"),
        ("a = 1e99999999999999999999", "character 5: the number is too large"),
        ("a = null", "is null"),
        ("a < true", "character 5: expected a number, or a text"),
        ("a between 1 and 'x'", "character 17: expected two numbers or two texts"),
        ("a between true and false", "character 11"),
        ("a in ()", "character 7"),
        ("a in (1", "character 8: expected '\\)'"),
        ("a like 5", "character 8: expected a pattern"),
        ("a is not 5", "character 10: expected 'null'"),
        ("a not = 5", "character 7"),
        ("(a = 1", "character 7: expected '\\)', found the end"),
        ("a = 1 b = 2", "character 7: expected 'and', 'or' or the end, found 'b'"),
        ("a = 1; drop table x", "';.*' at character 6 is not understood"),
        ("1 = 1", "character 1: expected the name of a column"),
        ("and = 1", "character 1: expected the name of a column"),
        ("not " * MAX_DEPTH + "a = 1", "32 levels"),
        ("(" * 4000, "32 levels"),
        (" or ".join(["a=1"] * 201), "200 tests"),
        ("a = '" + "x" * 4092 + "'", "longer than 4096 bytes"),
        ("a = '" + "ä" * 2046 + "'", "longer than 4096 bytes"),
        ("a like '%" + "_b" * 33 + "%'", "longer than 64 characters"),
    ],
)
def test_what_is_no_filter_is_refused(text: str, said: str) -> None:
    """The refusal says what was expected, and at which character."""
    with pytest.raises(WhereError, match=said):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "not " * (MAX_DEPTH - 1) + "a = 1",
        " or ".join(["a=1"] * 200),
        "a = '" + "x" * 4090 + "'",
        "a like '%" + "_b" * 32 + "%'",
        "a like '" + "_" * 1000 + "%'",
    ],
)
def test_the_limits_themselves_are_allowed(text: str) -> None:
    """As much as is documented, is read."""
    parse(text)


@pytest.mark.parametrize(
    "pattern", ["'(?:[^']|'')*", "'" * 4095, '"' * 4095, "a" * 4096, "((a=" * 9]
)
def test_hostile_texts_end_soon(pattern: str) -> None:
    """No text of the allowed length takes long to refuse."""
    begin = process_time()
    with pytest.raises(WhereError):
        parse(pattern)
    assert process_time() - begin < 1


@given(st.text(max_size=60))
def test_any_text_is_a_filter_or_refused(text: str) -> None:
    """Nothing else than a tree or a WhereError comes of any text."""
    with contextlib.suppress(WhereError):
        parse(text)


@pytest.mark.parametrize(
    ("text", "cell", "result"),
    [
        ("c = 'x'", "x", True),
        ("c = 'x'", "X", False),
        ("c = '1'", "1.0", False),
        ("c = 1", "1.0", True),
        ("c = 1", "+1e0", True),
        ("c = 1", " 1", False),
        ("c = 1000", "1_000", False),
        ("c != 5", "abc", False),
        ("not c = 5", "abc", True),
        ("c != 'x'", None, False),
        ("not c = 'x'", None, True),
        ("c = ''", "", True),
        ("c = ''", None, False),
        ("c is null", "", True),
        ("c is null", None, True),
        ("c is null", "0", False),
        ("c < 'b'", "a", True),
        ("c < '9'", "10", True),
        ("c < 9", "10", False),
        ("c > '\U0001f600'", "\uffff", False),  # by code points, not by UTF-16 units
        ("c = 9007199254740993", "9007199254740992", False),  # exact, where floats are not
        ("c = 0.1", "0.1000000000000000055511151231257827", False),
        ("c < 1", "nan", False),
        ("c > 1", "inf", False),
        ("c > 1", "1" * 1001, False),  # too long for a number
        ("c > 1", "1" * 1000, True),
        ("c > 1", "1e999999", True),
        ("c > 1", "1e999999999999999999999", False),
        ("c = 1", "\u0661", False),  # only ASCII digits
        ("c between 1 and 3", "3", True),
        ("c between 1 and 3", "3.01", False),
        ("c in (1, 'x')", "1.0", True),
        ("c in ('1')", "1.0", False),
        ("c = true", True, True),
        ("c = true", "true", False),
        ("c = 'true'", True, True),
        ("c != false", True, True),
        ("c != true", None, False),
    ],
)
def test_what_matches(text: str, cell: Any, result: bool) -> None:
    """Text compares as text, numbers exactly as numbers, and nothing matches nothing."""
    assert matches(text, c=cell) is result


@pytest.mark.parametrize(
    ("pattern", "text", "result"),
    [
        ("", "", True),
        ("", "a", False),
        ("%", "", True),
        ("a%", "ab", True),
        ("a%", "ba", False),
        ("%a", "ba", True),
        ("%a%", "xay", True),
        ("a%a", "a", False),
        ("a%a", "aa", True),
        ("ab%ba", "aba", False),
        ("%ab%ab%", "abab", True),
        ("%ab%ab%", "aab", False),
        ("%ab%b", "ab", False),
        ("_", "\n", True),
        ("_", "", False),
        ("__", "a", False),
        ("_%_", "a", False),
        ("%a_c%e", "xabcde", True),
        ("%a_c%c", "abc", False),
        ("a.c", "abc", False),
        ("a.c_", "abcd", False),
        ("%[a]_%", "xax", False),
        ("[a]%", "[a]x", True),
        ("%\\d", "5", False),
        ("A%", "ab", False),
    ],
)
def test_patterns(pattern: str, text: str, result: bool) -> None:
    """``%`` and ``_`` stand for text and for one character; all else stands for itself."""
    assert like(pattern)(text) is result


@pytest.mark.parametrize(
    ("pattern", "unit"),
    [
        ("%" + "a%" * 500 + "b", "a"),
        ("%" + "a" * 2000 + "b%", "a"),
        ("%" + "a" * 30 + "_" + "a" * 30 + "b%", "a"),
        ("%" + "ab%" * 500 + "c%", "ab"),
        ("a%" * 500 + "_b", "a"),
    ],
)
def test_patterns_cost_linear_time(pattern: str, unit: str) -> None:
    """Eight times the text takes about eight times as long, however hostile the pattern."""
    test = like(pattern)

    def seconds(n: int) -> float:
        text = unit * n
        best = 9e9
        for _ in range(5):
            begin = process_time()
            test(text)
            best = min(best, process_time() - begin)
        return best

    assert seconds(80_000) < 30 * seconds(10_000) + 0.0005


def test_numbers_are_exact() -> None:
    """A number keeps each of its digits."""
    assert number_of("12345678901234567890.123456789") == Decimal("12345678901234567890.123456789")
    assert number_of("0x10") is None

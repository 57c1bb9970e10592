"""Pages of a list: ``?limit`` and ``?after``."""

from __future__ import annotations

from errors import SluiceError

_LIMIT, _MOST = 50, 500


def paging(values: dict[str, str]) -> tuple[int, int | None]:
    """How many items (50, at most 500), and the key after which they begin.

    Raises invalid-field, naming the parameter.
    """
    limit = _number(values, "limit", _LIMIT)
    if limit is None or not 1 <= limit <= _MOST:
        raise SluiceError("invalid-field", f"limit must be 1 to {_MOST}.", field="limit")
    return limit, _number(values, "after", None)


def _number(values: dict[str, str], name: str, default: int | None) -> int | None:
    text = values.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise SluiceError("invalid-field", f"{name} must be a whole number.", field=name)
    return int(text)

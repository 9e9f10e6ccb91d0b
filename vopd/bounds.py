"""Bounds of settings, stated where a setting has its default: `steps: int = within(65, 1, 1_000_000)`.

A dataclass of settings (of a run, or a method's `Settings`) carries its bounds as field metadata, and one call checks
them all. A bound says what can work at all, not what is wise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any

from vopd.errors import UserError

KEY = "bound"


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`; without the ends where they are open. NaN is never inside."""

    least: float
    most: float
    open_below: bool = False
    open_above: bool = False

    def holds(self, value: Any) -> bool:
        """Whether a number is inside."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        above = value > self.least if self.open_below else value >= self.least
        return above and (value < self.most if self.open_above else value <= self.most)

    def __str__(self) -> str:
        low = f"above {_plain(self.least)}" if self.open_below else f"from {_plain(self.least)}"
        return f"{low} {'to below' if self.open_above else 'to'} {_plain(self.most)}"


@dataclass(frozen=True)
class OneOf:
    """A choice among names."""

    names: tuple[str, ...]

    def holds(self, value: Any) -> bool:
        """Whether it is one of them."""
        return value in self.names

    def __str__(self) -> str:
        return f"one of {', '.join(name or repr(name) for name in self.names)}"


@dataclass(frozen=True)
class Each:
    """A list of `count` values that are all inside `of`."""

    of: Range
    count: int

    def holds(self, value: Any) -> bool:
        """Whether the list has the length and every value is inside."""
        return len(value) == self.count and all(self.of.holds(item) for item in value)

    def __str__(self) -> str:
        return f"{self.count} numbers, each {self.of}"


Bound = Range | OneOf | Each


def within(default: Any, least: float, most: float) -> Any:
    """A setting from `least` to `most`, both included. None, where the type allows it, is not judged."""
    return field(default=default, metadata={KEY: Range(least, most)})


def above(default: Any, least: float, most: float) -> Any:
    """A setting above `least`, up to and including `most`."""
    return field(default=default, metadata={KEY: Range(least, most, open_below=True)})


def one_of(default: str, *names: str) -> Any:
    """A setting that is one of `names`."""
    return field(default=default, metadata={KEY: OneOf(names)})


def bounded(bound: Bound) -> dict[str, Bound]:
    """The metadata of a `dataclasses.field` that has this bound."""
    return {KEY: bound}


def check(kind: type, values: Any, prefix: str = "") -> None:
    """Refuse the first value outside its bound.

    Args:
        kind: the dataclass that states the bounds, in its own fields and those of the dataclasses in it.
        values: an instance of it, or a DictConfig of its shape.
        prefix: what precedes a key in the message, such as `method.`.

    Raises:
        UserError: names key, value and bound.
    """
    for f in fields(kind):
        value = getattr(values, f.name)
        bound: Bound | None = f.metadata.get(KEY)
        if bound is not None and value is not None and not bound.holds(value):
            raise UserError(f"{prefix}{f.name}={_shown(value)} is not allowed; give {bound}.")
        if f.default_factory is not MISSING and is_dataclass(f.default_factory):
            check(f.default_factory, value, f"{prefix}{f.name}.")


def bounds(kind: type, prefix: str = "") -> Mapping[str, Bound | None]:
    """Dotted key -> its bound, None for a setting without one; sections are gone into."""
    found: dict[str, Bound | None] = {}
    for f in fields(kind):
        if f.default_factory is not MISSING and is_dataclass(f.default_factory):
            found |= bounds(f.default_factory, f"{prefix}{f.name}.")
        else:
            found[f"{prefix}{f.name}"] = f.metadata.get(KEY)
    return found


def _plain(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def _shown(value: Any, most: int = 60) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}..."

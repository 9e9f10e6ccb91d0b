"""A run's `key=value` words, read strictly before Hydra applies them.

Hydra's grammar has more than a run can use: additions, deletions, sweeps, config groups, resolvers. Each of these, and
each slip of the hand, is refused here in one sentence that names the word.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from vopd.errors import UserError

OPEN = ("verl", "rollout.chat_template")
"""Sections without a fixed set of keys: verl's own tree, which is checked later, and a chat template's arguments."""
GIVEN = {
    "recipe": "it is the first word of the command",
    "recipe_folder": "it is where the recipe's file lies",
    "method.module": "it belongs to the recipe; write a recipe of your own for another module",
}
PROFILE = "profile"
# The one kind of `${...}` that a person's own text may hold: another key. The others read the environment or compute.
_KEY_REFERENCE = re.compile(r"\$\{[A-Za-z_][\w.]*\}")
_KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z0-9_]\w*)*", re.ASCII)


def profile(words: Sequence[str], default: str) -> tuple[str, list[str]]:
    """The profile's name and the other words.

    Raises:
        UserError: two profiles, or one without a name.
    """
    named = [word.partition("=")[2] for word in words if word.startswith(f"{PROFILE}=")]
    if len(named) > 1:
        raise UserError(f"profile= is given twice ({', '.join(named)}); give one.")
    if named and not named[0]:
        raise UserError("profile= has no value; give a profile's name or file, or leave the word out.")
    return (named or [default])[0], [word for word in words if not word.startswith(f"{PROFILE}=")]


def overrides(words: Sequence[str], settings: DictConfig) -> list[str]:
    """The words as Hydra shall apply them.

    Args:
        words: `key=value`, without the profile.
        settings: the tree that they change; what it does not have is unknown.

    Raises:
        UserError: a word that is no setting, an unknown key, a key given twice, a value that is no value.
    """
    first: dict[str, str] = {}
    applied = []
    for word in words:
        key, value = _split(word)
        _check_key(word, key, settings)
        content = _parsed(word, key, value, settings).value()
        _check_content(word, key, content, settings)
        for leaf in _leaves(key, content):
            for other, before in first.items():
                if other == leaf or other.startswith(f"{leaf}.") or leaf.startswith(f"{other}."):
                    raise UserError(f"{leaf} is given twice, by '{before}' and by '{word}'; give it once.")
        first.update(dict.fromkeys(_leaves(key, content), word))
        # Below an open section a key may be new; everything else is there already.
        applied.append(f"++{key}={value}" if _is_open(key) else f"{key}={value}")
    return applied


def check_interpolations(where: str, value: Any) -> None:
    """Refuse every `${...}` in a person's own text but a reference to another key.

    `${oc.env:...}` would write a variable of the environment, a secret perhaps, into the run's files.

    Args:
        where: the file or word, for the sentence.
        value: text, or lists and mappings with text in them.
    """
    for text in _texts(value):
        if "${" in _KEY_REFERENCE.sub("", text):
            shown = text if len(text) <= 60 else f"{text[:60]}..."
            raise UserError(
                f"{where}: '{shown}' is not taken; ${{...}} may name another key and nothing else. What the "
                "environment holds stays out of a run's files: pass a variable to the process itself."
            )


def unknown(content: Any, settings: DictConfig, prefix: str = "") -> str | None:
    """A sentence about the first key of nested mappings that `settings` does not have, or that is no section there."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        if _is_open(key):
            continue
        if fault := _fault(key, value, settings):
            return fault
        if isinstance(value, Mapping) and (fault := unknown(value, settings, f"{key}.")):
            return fault
    return None


# ---- one word --------------------------------------------------------------------------------------------------------


def _split(word: str) -> tuple[str, str]:
    """Key and value; a `+` before the key of an open section is taken off, as Hydra's users write it."""
    key, equals, value = word.partition("=")
    plain = key.lstrip("+")
    if key.startswith("~"):
        raise UserError(f"'{word}': a setting cannot be removed; give it another value.")
    if not equals:
        raise UserError(f"'{word}' is not a setting; write key=value, e.g. seed=1 (--help lists the keys).")
    if key != key.strip() or not key:
        raise UserError(f"'{word}': write key=value without spaces around the equals sign.")
    if key.startswith("-"):
        raise UserError(f"'{word}': settings have no dashes; write {key.lstrip('-')}={value}.")
    if key.startswith("+") and not _is_open(plain):
        raise UserError(f"'{word}': nothing can be added to the settings; write {plain}={value}, without +.")
    return plain, value


def _check_key(word: str, key: str, settings: DictConfig) -> None:
    for sign in key:
        if not sign.isascii():
            name = unicodedata.name(sign, "a sign without a name")
            raise UserError(
                f"'{word}': the key holds {sign!r} (U+{ord(sign):04X}, {name}), which only looks like a plain letter."
            )
    if not _KEY.fullmatch(key):
        raise UserError(f"'{word}': '{key}' is no key; write section.key=value (--help lists the keys).")
    if key in GIVEN:
        raise UserError(f"'{word}': {key} cannot be set; {GIVEN[key]}.")
    if not _is_open(key) and (fault := _fault(key, {}, settings)):
        raise UserError(fault)


def _parsed(word: str, key: str, value: str, settings: DictConfig) -> Override:
    if not value.strip():
        raise UserError(f"'{word}' has no value; leave the word out to keep the default.")
    check_interpolations(f"'{word}'", value)
    try:
        parsed = OverridesParser.create().parse_override(f"{key}={value}")
    except (HydraException, ValueError) as error:
        raise UserError(
            f"'{word}' is not understood; {_strange(value)}put such a value in quotes that the shell leaves alone: "
            f"'{key}=\"...\"'."
        ) from error
    if parsed.package is not None:
        raise UserError(f"'{word}': '@' has no meaning in a key.")
    if not parsed.is_sweep_override():
        return parsed
    before = (
        None
        if _is_open(key)
        else OmegaConf.select(settings, key, throw_on_missing=False, throw_on_resolution_failure=False)
    )
    if isinstance(before, int | float) or "(" in value:
        raise UserError(f"'{word}': a run has one value a key; start a run for each.")
    raise UserError(
        f"'{word}': commas need brackets or quotes: a list is {key}=[{value}], a text is '{key}=\"{value}\"'."
    )


def _strange(value: str) -> str:
    sign = next((s for s in value if not s.isascii() or s in ";#~\"'(){}[]=\n\t"), None)
    return f"it holds {sign!r}; " if sign else ""


def _check_content(word: str, key: str, content: Any, settings: DictConfig) -> None:
    if key in OPEN and not isinstance(content, Mapping):
        raise UserError(f"'{word}': {key} is a section; set its keys, {key}.KEY=...")
    for text in _texts(content):
        if any(unicodedata.category(sign) in ("Cc", "Cf", "Cs") for sign in text):
            raise UserError(f"'{word}': a control character or an invisible sign stands in the value.")
    if _is_open(key):
        return
    fault = _fault(key, content, settings)
    if fault is None and isinstance(content, Mapping):
        fault = unknown(content, settings, f"{key}.")
    if fault:
        raise UserError(fault)


def _fault(key: str, value: Any, settings: DictConfig) -> str | None:
    """What is wrong with a key, given the value (a mapping, or not) that it shall have; None if nothing is."""
    node: Any = settings
    *path, last = key.split(".")
    for name in path:
        node = node._get_node(name) if isinstance(node, DictConfig) and name in node.keys() else None
    if (
        not isinstance(node, DictConfig) or last not in node.keys()
    ):  # `in node` would not see a key without a value
        return f"{key}: there is no such setting{_meant(key, settings)}; --help lists them."
    if isinstance(node._get_node(last), DictConfig) and not isinstance(value, Mapping):
        return (
            f"{key} is a section and has no value of its own; set its keys, e.g. {_example(key, settings)}."
        )
    return None


def _meant(key: str, settings: DictConfig) -> str:
    near = difflib.get_close_matches(key, list(_keys(settings)), n=1, cutoff=0.7)
    return f" (is {near[0]} meant?)" if near else ""


def _example(key: str, settings: DictConfig) -> str:
    return next((name for name in _keys(settings) if name.startswith(f"{key}.")), f"{key}.KEY")


def _keys(settings: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in map(str, settings):
        node = settings._get_node(name)
        if isinstance(node, DictConfig) and not _is_open(f"{prefix}{name}"):
            yield from _keys(node, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _is_open(key: str) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in OPEN)


def _leaves(key: str, content: Any) -> Iterator[str]:
    if isinstance(content, Mapping) and content:
        for name, value in content.items():
            yield from _leaves(f"{key}.{name}", value)
    else:
        yield key


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(name)
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)

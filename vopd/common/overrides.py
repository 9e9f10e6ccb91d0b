"""`key=value` overrides of every command, read strictly before Hydra applies them.

Hydra's grammar has more than a command can use: additions, deletions, sweeps, config groups, resolvers. Each of these,
and each slip of the hand, is refused here in one sentence that names the override.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vopd.errors import UserError

PROFILE = "profile"
_NAME = "vopd_settings"
# The one kind of `${...}` that user text may hold: another key. The others read the environment or compute.
_KEY_REFERENCE = re.compile(r"\$\{[A-Za-z_][\w.]*\}")
_KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z0-9_]\w*)*", re.ASCII)


def profile(overrides: Sequence[str], default: str) -> tuple[str, list[str]]:
    """The profile's name and the other overrides.

    Raises:
        UserError: two profiles, or one without a name.
    """
    named = [override.partition("=")[2] for override in overrides if override.startswith(f"{PROFILE}=")]
    if len(named) > 1:
        raise UserError(f"profile= is given twice ({', '.join(named)}); give one.")
    if named and not named[0]:
        raise UserError("profile= has no value; give a profile's name or file, or leave it out.")
    return (named or [default])[0], [
        override for override in overrides if not override.startswith(f"{PROFILE}=")
    ]


@dataclass(frozen=True)
class Tree:
    """Settings that overrides change.

    Args:
        settings: with every key there is; what it does not have is unknown.
        open: sections without a fixed set of keys, such as another library's own settings.
        fixed: keys that cannot be overridden, and why.
    """

    settings: DictConfig
    open: tuple[str, ...] = ()
    fixed: Mapping[str, str] = field(default_factory=dict)

    def override(self, given: Sequence[str]) -> DictConfig:
        """The settings with `key=value` overrides applied by Hydra, resolved.

        Raises:
            UserError: a malformed override, an unknown key, a key given twice, a value that is missing, malformed or
                of another type, a setting left without a value.
        """
        ConfigStore.instance().store(name=_NAME, node=self.settings)
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(version_base=None, config_dir=str(Path(__file__).parent)):
                config = compose(_NAME, overrides=self.checked(given))
            OmegaConf.resolve(config)
            missing = sorted(OmegaConf.missing_keys(config))
        except (HydraException, OmegaConfBaseException, RecursionError) as error:
            cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
            raise UserError(f"Setting not understood: {said(cause)}") from error
        if missing:
            raise UserError(
                f"The setting '{missing[0]}' has no value; give {missing[0]}=... (--help shows how)."
            )
        return config

    def with_file(self, path: Path, content: Mapping[str, Any]) -> DictConfig:
        """The settings with a YAML file's values on top.

        Raises:
            UserError: an unknown key, or a value of another type.
        """
        if fault := self.unknown(content):
            raise UserError(f"{path}: {fault}")
        try:
            merged = OmegaConf.merge(self.settings, content)
        except OmegaConfBaseException as error:
            raise UserError(f"{path}: {said(error)}") from error
        assert isinstance(merged, DictConfig)
        return merged

    def checked(self, given: Sequence[str]) -> list[str]:
        """The overrides as Hydra is to apply them; UserError for a malformed one."""
        first: dict[str, str] = {}
        applied = []
        for override in given:
            key, value = self._split(override)
            self._check_key(override, key)
            content = self._parsed(override, key, value).value()
            self._check_content(override, key, content)
            for leaf in _leaves(key, content):
                for other, before in first.items():
                    if other == leaf or other.startswith(f"{leaf}.") or leaf.startswith(f"{other}."):
                        raise UserError(
                            f"{leaf} is given twice, by '{before}' and by '{override}'; give it once."
                        )
            first.update(dict.fromkeys(_leaves(key, content), override))
            # Below an open section a key may be new; everything else is there already.
            applied.append(f"++{key}={value}" if self._is_open(key) else f"{key}={value}")
        return applied

    def keys(self) -> list[str]:
        """All keys that have a value, dotted."""
        return list(self._keys(self.settings))

    def unknown(self, content: Any, prefix: str = "") -> str | None:
        """A sentence about the first key of nested mappings that the settings do not have, or that is not a section."""
        for name, value in content.items():
            key = f"{prefix}{name}"
            if self._is_open(key):
                continue
            if fault := self._fault(key, value):
                return fault
            if isinstance(value, Mapping) and (fault := self.unknown(value, f"{key}.")):
                return fault
        return None

    def _split(self, override: str) -> tuple[str, str]:
        """Key and value; a `+` before the key of an open section is taken off, as Hydra's users write it."""
        key, equals, value = override.partition("=")
        plain = key.lstrip("+")
        if key.startswith("~"):
            raise UserError(f"'{override}': a setting cannot be removed; give it another value.")
        if not equals:
            raise UserError(
                f"'{override}' is not a setting; write key=value, e.g. seed=1 (--help lists the keys)."
            )
        if key != key.strip() or not key:
            raise UserError(f"'{override}': write key=value without spaces around the equals sign.")
        if key.startswith("-"):
            raise UserError(f"'{override}': settings have no dashes; write {key.lstrip('-')}={value}.")
        if key.startswith("+") and not self._is_open(plain):
            raise UserError(f"'{override}': settings cannot be added; write {plain}={value}, without +.")
        return plain, value

    def _check_key(self, override: str, key: str) -> None:
        for sign in key:
            if not sign.isascii():
                name = unicodedata.name(sign, "a sign without a name")
                raise UserError(
                    f"'{override}': the key holds {sign!r} (U+{ord(sign):04X}, {name}), which only looks "
                    "like a plain letter."
                )
        if not _KEY.fullmatch(key):
            raise UserError(
                f"'{override}': '{key}' is not a key; write section.key=value (--help lists the keys)."
            )
        if key in self.fixed:
            raise UserError(f"'{override}': {key} cannot be set; {self.fixed[key]}.")
        if not self._is_open(key) and (fault := self._fault(key, {})):
            raise UserError(fault)

    def _parsed(self, override: str, key: str, value: str) -> Override:
        if not value.strip():
            raise UserError(f"'{override}' has no value; leave it out to keep the default.")
        check_interpolations(f"'{override}'", value)
        try:
            parsed = OverridesParser.create().parse_override(f"{key}={value}")
        except (HydraException, ValueError) as error:
            raise UserError(
                f"'{override}' is not understood; {_strange(value)}put such a value in quotes that the shell leaves "
                f"alone: '{key}=\"...\"'."
            ) from error
        if parsed.package is not None:
            raise UserError(f"'{override}': '@' has no meaning in a key.")
        if not parsed.is_sweep_override():
            return parsed
        before = (
            None
            if self._is_open(key)
            else OmegaConf.select(
                self.settings, key, throw_on_missing=False, throw_on_resolution_failure=False
            )
        )
        if isinstance(before, int | float) or "(" in value:
            raise UserError(f"'{override}': a key has one value; run the command for each.")
        raise UserError(
            f"'{override}': commas need brackets or quotes: a list is {key}=[{value}], a text is '{key}=\"{value}\"'."
        )

    def _check_content(self, override: str, key: str, content: Any) -> None:
        if key in self.open and not isinstance(content, Mapping):
            raise UserError(f"'{override}': {key} is a section; set its keys, {key}.KEY=...")
        for text in _texts(content):
            if any(unicodedata.category(sign) in ("Cc", "Cf", "Cs") for sign in text):
                raise UserError(f"'{override}': the value holds a control or an invisible character.")
        if self._is_open(key):
            return
        fault = self._fault(key, content)
        if fault is None and isinstance(content, Mapping):
            fault = self.unknown(content, f"{key}.")
        if fault:
            raise UserError(fault)

    def _fault(self, key: str, value: Any) -> str | None:
        """What is wrong with a key, given the value (a mapping, or not) that it is to have; None if nothing is."""
        node: Any = self.settings
        *path, last = key.split(".")
        for name in path:
            node = node._get_node(name) if isinstance(node, DictConfig) and name in node.keys() else None
        if (
            not isinstance(node, DictConfig) or last not in node.keys()
        ):  # `in node` would not see a key without a value
            return f"{key}: there is no such setting{self._meant(key)}; --help lists them."
        if isinstance(node._get_node(last), DictConfig) and not isinstance(value, Mapping):
            return f"{key} is a section and has no value of its own; set its keys, e.g. {self._example(key)}."
        return None

    def _meant(self, key: str) -> str:
        near = difflib.get_close_matches(key, self.keys(), n=1, cutoff=0.7)
        return f" (is {near[0]} meant?)" if near else ""

    def _example(self, key: str) -> str:
        return next((name for name in self.keys() if name.startswith(f"{key}.")), f"{key}.KEY")

    def _keys(self, section: DictConfig, prefix: str = "") -> Iterator[str]:
        for name in map(str, section):
            node = section._get_node(name)
            if isinstance(node, DictConfig) and not self._is_open(f"{prefix}{name}"):
                yield from self._keys(node, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    def _is_open(self, key: str) -> bool:
        return any(key == section or key.startswith(f"{section}.") for section in self.open)


def said(error: BaseException) -> str:
    """The first line of what OmegaConf says, and the key that it speaks of."""
    said = str(error).strip().splitlines()[0]
    key = getattr(error, "full_key", None) or ""
    if said.endswith("is not Optional"):
        return f"{key or said.split(chr(39))[1]} cannot be null; give a value, or leave it out."
    return f"{key}: {said}" if key not in said else said


def check_interpolations(where: str, value: Any) -> None:
    """Refuse every `${...}` in user text but a reference to another key.

    `${oc.env:...}` would write a variable of the environment, possibly a secret, into the run's files.

    Args:
        where: the file or override, for the message.
        value: text, or lists and mappings with text in them.
    """
    for text in _texts(value):
        if "${" in _KEY_REFERENCE.sub("", text):
            shown = text if len(text) <= 60 else f"{text[:60]}..."
            raise UserError(
                f"{where}: '{shown}' is not allowed; ${{...}} may name another key and nothing else. What the "
                "environment holds stays out of a run's files: pass a variable to the process itself."
            )


def _strange(value: str) -> str:
    sign = next((s for s in value if not s.isascii() or s in ";#~\"'(){}[]=\n\t"), None)
    return f"it holds {sign!r}; " if sign else ""


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

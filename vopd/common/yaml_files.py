"""A settings file as plain data: safe, bounded in size and expansion, and strict.

A recipe or profile comes from anywhere. Nothing in it can run code (no tags but YAML's own plain ones), and its size is
bounded before and after aliases are expanded. What YAML would accept silently is refused: a key that is given
twice, a key that is not text, an encoding other than UTF-8.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader

from vopd.errors import UserError

MOST_BYTES = 64 * 1024  # the longest recipe here has one; PyYAML reads about 100 KB a second
MOST_DEPTH = 32
MOST_VALUES = 10_000
PREFIX = "tag:yaml.org,2002:"
TAGS = {f"{PREFIX}{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")}


def read(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        UserError: not a file, too large, not UTF-8, not YAML, no mapping, a tag, a doubled or non-text key, an alias
            that holds itself or expands to too much; names the file, and the line where there is one.
    """
    text = _text(path)
    try:
        _check_events(path, text)
        loader = get_yaml_loader()(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}: a mapping of keys is expected, such as `method:` with keys below it.")
        _check_expansion(path, node)
        _check_keys(path, node)
        return dict(loader.construct_document(node))
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{path}: not readable as YAML ({_problem(error)}).") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not readable as YAML ({str(error).splitlines()[0]}).") from error


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    if len(data) > MOST_BYTES:
        raise UserError(f"{path}: larger than {MOST_BYTES // 1024} KiB, too large for a settings file.")
    if b"\0" in data:
        raise UserError(f"{path}: not UTF-8 text; save it as UTF-8, or give another file.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8; save the file as UTF-8.") from error


def _check_events(path: Path, text: str) -> None:
    """Depth and tags, from the flat stream of events: nothing has been built yet."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MOST_DEPTH:
                raise UserError(f"{_place(path, event)}: nested more than {MOST_DEPTH} deep.")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        tag = getattr(event, "tag", None)
        if tag not in (None, "!") and tag not in TAGS:
            shown = tag.replace(PREFIX, "!!")
            raise UserError(f"{_place(path, event)}: the tag {shown} is not allowed; write a plain value.")


def _check_expansion(path: Path, root: yaml.Node) -> None:
    """Count the values as they are with every alias written out; shared nodes are counted once and multiplied."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in open_nodes:
            raise UserError(f"{_place(path, node)}: an alias that contains itself.")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            sizes[id(node)] = 1 + sum(size(child) for child in _children(node))
            open_nodes.discard(id(node))
        return sizes[id(node)]

    if size(root) > MOST_VALUES:
        raise UserError(f"{path}: more than {MOST_VALUES:,} values once its aliases are written out.")


def _check_keys(path: Path, root: yaml.Node) -> None:
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        waiting.extend(_children(node))
        if not isinstance(node, yaml.MappingNode):
            continue
        names: set[str] = set()
        for key, _ in node.value:
            if key.tag not in (f"{PREFIX}str", f"{PREFIX}merge"):
                shown = f"'{key.value}'" if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                raise UserError(f"{_place(path, key)}: {shown} is a key but not text; put it in quotes.")
            if key.value in names:
                raise UserError(f"{_place(path, key)}: the key '{key.value}' is given twice.")
            names.add(key.value)


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _place(path: Path, at: Any) -> str:
    return f"{path}, line {at.start_mark.line + 1}"


def _problem(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = f", line {mark.line + 1}" if mark else ""
    return f"{error.problem or error.context}{where}"

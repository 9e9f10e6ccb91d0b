"""Settings files: safe, bounded and strict; what they hold arrives as OmegaConf would read it."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from vopd.common import yaml_files
from vopd.config import ROOT
from vopd.errors import UserError

FILES = sorted([*(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "vopd").rglob("*.yaml")])


def read(path: Path, content: str | bytes) -> dict[str, object]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return yaml_files.read(path)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_our_own_files_read_as_omegaconf_reads_them(file: Path) -> None:
    assert yaml_files.read(file) == OmegaConf.to_container(OmegaConf.load(file))


def test_aliases_merge_keys_and_a_mark_of_utf_8_are_taken(tmp_path: Path) -> None:
    text = "base: &base {a: 1}\nmore:\n  <<: *base\n  b: 1e-3\nagain: *base\nplain: !!str 5\n"
    wanted = {"base": {"a": 1}, "more": {"a": 1, "b": 0.001}, "again": {"a": 1}, "plain": "5"}
    assert read(tmp_path / "x.yaml", text) == wanted
    assert read(tmp_path / "x.yaml", b"\xef\xbb\xbf" + text.encode()) == wanted


def test_nothing_in_a_file_runs(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for tag in ("!!python/object/apply:pathlib.Path.touch", "!!python/object/apply:os.system", "!x"):
        with pytest.raises(UserError, match="the tag"):
            read(tmp_path / "x.yaml", f"a: {tag} ['touch {mark}']\n")
    assert not mark.exists()


def bomb(levels: int, width: int) -> str:
    lines = [f"a0: &a0 [{', '.join(['x'] * width)}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


def test_aliases_are_bounded_by_what_they_expand_to(tmp_path: Path) -> None:
    assert len(read(tmp_path / "x.yaml", bomb(3, 9))) == 3
    with pytest.raises(UserError, match="more than 10,000 values"):
        read(tmp_path / "x.yaml", bomb(9, 9))
    with pytest.raises(UserError, match="more than 10,000 values"):
        read(tmp_path / "x.yaml", bomb(30, 100))
    with pytest.raises(UserError, match="line 1: an alias that contains itself"):
        read(tmp_path / "x.yaml", "a: &a {b: *a}\n")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a: \xff\n", "line 1: not UTF-8"),
        ("a: 1\n".encode("utf-16"), "save it as UTF-8"),
        ("a: {b: 1, b: 2}\n", "line 1: the key 'b' is given twice"),
        ("a:\n  true: 1\n", "line 2: 'true' is a key but not text"),
        ("? [a]\n: 1\n", "a list or mapping is a key"),
        ("a: 2026-02-30\n", None),
        ("a: *gone\n", "found undefined alias"),
        ("a: '\x07'\n", "not readable as YAML"),
        ("null\n", "a mapping of keys is expected"),
        ("a: 1\n" + "#" * yaml_files.MOST_BYTES, "larger than 64 KiB"),
    ],
)
def test_what_is_refused_names_the_file(content: str | bytes, sentence: str | None, tmp_path: Path) -> None:
    if sentence is None:
        assert read(tmp_path / "x.yaml", content) == {"a": "2026-02-30"}
        return
    with pytest.raises(UserError) as refused:
        read(tmp_path / "x.yaml", content)
    assert sentence in str(refused.value) and "x.yaml" in str(refused.value)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.yaml: cannot be read"):
        yaml_files.read(tmp_path / "gone.yaml")


@settings(max_examples=150, deadline=None)
@given(
    content=st.one_of(
        st.binary(max_size=200), st.text(alphabet="abc:*&<{}[]-!\n ,'\"|>?#%@\t1.~", max_size=60)
    )
)
def test_any_bytes_end_in_a_mapping_or_a_sentence(content: str | bytes, tmp_path_factory) -> None:
    file = tmp_path_factory.mktemp("any") / "x.yaml"
    try:
        found, said = read(file, content), str(file)
    except UserError as error:
        found, said = {}, str(error)
    assert all(isinstance(key, str) for key in found)
    assert str(file) in said and "\n" not in said


values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(10**9), 10**9), st.text(alphabet="abc xyz", max_size=8)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(alphabet="ab", min_size=1), inner, max_size=3)
    ),
    max_leaves=10,
)


@settings(max_examples=50, deadline=None)
@given(content=st.dictionaries(st.text(alphabet="abc", min_size=1), values, max_size=4))
def test_what_was_written_is_read(content: dict[str, object], tmp_path_factory) -> None:
    file = tmp_path_factory.mktemp("any") / "x.yaml"
    assert read(file, yaml.safe_dump(content)) == content

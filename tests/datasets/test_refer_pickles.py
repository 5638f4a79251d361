"""Lists of references are read as data: pickles of any protocol, also of Python 2; nothing that they name is called."""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refer_files import python2_pickle, refs

from tokenprune.datasets.files.refer import unpickler
from tokenprune.datasets.files.refer.unpickler import read_pickle
from tokenprune.errors import InputError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def same_types(one: Any, other: Any) -> bool:
    if type(one) is not type(other) or one != other:
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(same_types, one.values(), other.values()))
    return not isinstance(one, (list, tuple)) or all(map(same_types, one, other))


@SHARED
@given(VALUES, st.sampled_from(PROTOCOLS))
def test_data_comes_back_the_same(tmp_path: Path, value: Any, protocol: int) -> None:
    (tmp_path / "a.p").write_bytes(pickle.dumps(value, protocol))
    assert same_types(read_pickle(tmp_path / "a.p"), value)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_sets_and_shared_objects_come_back(tmp_path: Path, protocol: int) -> None:
    shared = ["a"]
    value = [shared, shared, {1, "a"}, frozenset({2}), b"", b"\xff"]
    (tmp_path / "a.p").write_bytes(pickle.dumps(value, protocol))
    found = read_pickle(tmp_path / "a.p")
    assert found == value
    assert found[0] is found[1]


def test_what_python_2_wrote(tmp_path: Path) -> None:
    (tmp_path / "a.p").write_bytes(python2_pickle(refs()))
    assert read_pickle(tmp_path / "a.p") == refs()


def test_texts_of_python_2(tmp_path: Path) -> None:
    """Bytes are read as UTF-8, else as Latin-1; `unicode` as it is."""
    texts = ["café".encode(), "café".encode("latin-1"), b"plain", "naïve", b"\xe2\x80 \xc3\xa9", b"x" * 300, 2**70]
    (tmp_path / "a.p").write_bytes(python2_pickle(texts))
    assert read_pickle(tmp_path / "a.p") == ["café", "café", "plain", "naïve", "â\x80 é", "x" * 300, 2**70]


# what is refused -----------------------------------------------------------------------------------------------------

ran: list[str] = []


def tell(*arguments: Any) -> Any:
    """Only a pickle would call it."""
    ran.append("called")
    return arguments


class Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> Any:
        return self.called


class WithState:
    def __setstate__(self, state: Any) -> None:
        tell()

    def __getstate__(self) -> Any:
        return {"a": 1}


class Plain:
    pass


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("made", "named"),
    [
        (lambda path: Calls(os.system, f"touch {path}"), "system"),
        (lambda path: Calls(eval, f"open({str(path)!r}, 'w')"), "eval"),
        (lambda path: Calls(exec, f"open({str(path)!r}, 'w')"), "exec"),
        (lambda path: Calls(getattr, "a", "upper"), "getattr"),
        (lambda path: [{"a": (1, [Calls(os.system, f"touch {path}")])}], "system"),
        (lambda path: {"ref_id": 1, "sentences": [Calls(open, str(path), "w")]}, "open"),
        (lambda path: WithState(), "(WithState|_reconstructor)"),
        (lambda path: Plain(), "(Plain|_reconstructor)"),
        (lambda path: Calls(tell, 1), "tell"),
        (lambda path: np.int64(5), "numpy"),
        (lambda path: np.arange(3), "numpy"),
        (lambda path: OrderedDict(a=1), "OrderedDict"),
        (lambda path: int, "(int|long)"),
        (lambda path: complex(1, 2), "complex"),
    ],
)
def test_names_are_refused_and_nothing_runs(tmp_path: Path, protocol: int, made: Any, named: str) -> None:
    witness = tmp_path / "witness"
    value = made(witness)
    (tmp_path / "a.p").write_bytes(pickle.dumps(value, protocol))
    with pytest.raises(InputError, match=rf"a.p' is a pickle that names '.*{named}.*', which is not data") as told:
        read_pickle(tmp_path / "a.p")
    assert "\n" not in str(told.value)
    assert not witness.exists()
    assert not ran


ENCODE, EMPTY, SET = b"c_codecs\nencode\n", b"c__builtin__\nbytes\n", b"c__builtin__\nset\n"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"cos\nsystem\n(U\x04truetR.", "names 'os.system'"),
        (b"(U\x04trueios\nsystem\n.", "names 'os.system'"),
        (b"(cos\nsystem\nU\x04trueo.", "names 'os.system'"),
        (b"cbuiltins\ntuple.__class__\n.", "names 'builtins.tuple.__class__'"),
        (b"c_codecs\nencode.__class__\n.", "names '_codecs.encode.__class__'"),
        (b"c_codecs\ndecode\n(U\x01aU\x03rotTR.", "names '_codecs.decode'"),
        (ENCODE + b"(U\x01aU\x05rot13tR.", "cannot be read as a pickle"),
        (ENCODE + b"}U\x08__call__K\x01sb.", "cannot be read as a pickle"),  # changes what is called next
        (ENCODE + b"N}U\x08__call__K\x01s\x86b.", "cannot be read as a pickle"),
        (EMPTY + b"(J\xff\xff\xff\x7ftR.", "cannot be read as a pickle"),  # two gigabytes
        (EMPTY + b"(J\xff\xff\xff\x7ft\x81.", "cannot be read as a pickle"),
        (SET + b"}U\x03popK\x01sb.", "cannot be read as a pickle"),
        (SET + b"N}U\x03popK\x01s\x86b.", "cannot be read as a pickle"),
        (b"U\x01aP1\n.", "cannot be read as a pickle"),  # persistent ids
        (b"U\x01aQ.", "cannot be read as a pickle"),
        (b"c\xff\xfe\nsystem\n.", "cannot be read as a pickle"),
        (b"\x82\xf0.", "names 'os.system'"),  # a registered extension
    ],
)
def test_opcodes_by_hand(tmp_path: Path, code: bytes, message: str) -> None:
    path = tmp_path / "a.p"
    path.write_bytes(b"\x80\x02" + code)
    copyreg.add_extension("os", "system", 0xF0)
    try:
        with pytest.raises(InputError, match=message) as told:
            read_pickle(path)
    finally:
        copyreg.remove_extension("os", "system", 0xF0)
    assert "\n" not in str(told.value)
    path.write_bytes(pickle.dumps([b"\xff", b"", {1}], 2))
    assert read_pickle(path) == [b"\xff", b"", {1}]  # nothing was changed


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_truncated_files_are_refused(tmp_path: Path, protocol: int) -> None:
    packed = pickle.dumps(refs(), protocol)
    for length in range(0, len(packed), 23):
        (tmp_path / "a.p").write_bytes(packed[:length])
        with pytest.raises(InputError, match=r"a.p' cannot be read as a pickle .*; give an intact file") as told:
            read_pickle(tmp_path / "a.p")
        assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"<html>not found</html>", b"version https://git-lfs.github.com/spec/v1\n", os.urandom(999)],
    ids=["empty", "line", "html", "lfs", "random"],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.p").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.p' (cannot be read as|is) a pickle"):
        read_pickle(tmp_path / "a.p")


def test_lengths_that_lie_are_refused(tmp_path: Path) -> None:
    for code in (b"\x8e", b"\x8d", b"\x95"):  # bytes, a text, a frame
        (tmp_path / "a.p").write_bytes(b"\x80\x04" + code + struct.pack("<Q", 2**60) + b"ab.")
        with pytest.raises(InputError, match="cannot be read as a pickle"):
            read_pickle(tmp_path / "a.p")


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"'.*none.p': no such file; check the path"):
        read_pickle(tmp_path / "none.p")
    with pytest.raises(InputError, match="is no regular file"):
        read_pickle(tmp_path)
    monkeypatch.setattr(unpickler, "LARGEST", 10)
    (tmp_path / "a.p").write_bytes(pickle.dumps(refs()))
    with pytest.raises(InputError, match=r"a.p' has \d+ bytes, more than any file of referring expressions"):
        read_pickle(tmp_path / "a.p")


def test_pickles_after_it_are_read_as_before() -> None:
    """The decoding of texts is registered under a name of its own."""
    assert pickle.load(io.BytesIO(b"\x80\x02U\x01a.")) == "a"
    with pytest.raises(UnicodeDecodeError):
        pickle.load(io.BytesIO(b"\x80\x02U\x01\xe9."))

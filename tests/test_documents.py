import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vwt.documents import check_writable, is_number, load_document, save_document, write_json
from vwt.errors import DocumentError, VWTError

FIELDS = {"rows": [1, 2.5, None], "name": "α", "nested": {"deep": [True]}}
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(scalars, lambda part: st.lists(part) | st.dictionaries(st.text(), part), max_leaves=8)
names = st.text(min_size=1).filter(lambda name: name not in ("format", "version"))


def load(path, fields=FIELDS):
    return load_document(path, "profile", 3, fields)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "profile.json"
    save_document(path, "profile", 3, FIELDS)
    return path


@given(st.dictionaries(names, values, max_size=4))
def test_there_and_back(tmp_path_factory, fields):
    path = tmp_path_factory.getbasetemp() / "profile.json"
    save_document(path, "profile", 3, fields)
    assert load(path, fields) == fields


def test_it_says_first_what_it_is(path):
    assert path.read_text().startswith('{\n "format": "vwt profile",\n "version": 3,\n')


def test_nothing_else_is_left_behind(path):
    save_document(path, "profile", 3, FIELDS)
    assert list(path.parent.iterdir()) == [path]


def test_paths_may_be_strings(path):
    save_document(str(path), "profile", 3, {"rows": []})
    assert load(str(path), ["rows"]) == {"rows": []}


def test_a_name_without_a_suffix(tmp_path):
    save_document(tmp_path / "profile", "profile", 3, FIELDS)
    assert load(tmp_path / "profile") == FIELDS
    assert list(tmp_path.iterdir()) == [tmp_path / "profile"]


def test_files_beside_it_are_left_alone(tmp_path):
    (tmp_path / "profile.fresh").write_text("mine")
    save_document(tmp_path / "profile.json", "profile", 3, FIELDS)
    assert (tmp_path / "profile.fresh").read_text() == "mine"


def test_the_old_file_stays_where_the_new_one_cannot_be_written(path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    before = path.read_text()
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(DocumentError, match=r"cannot write the profile .*: No space left on device; choose another"):
        save_document(path, "profile", 3, {"rows": []})
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


def test_the_old_file_stays_where_the_value_is_no_json(path):
    before = path.read_text()
    with pytest.raises(TypeError):
        write_json(path, {"rows": object()})
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


def test_write_json_with_and_without_indent(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1]})
    assert (tmp_path / "a.json").read_text() == '{"b": [1]}'
    write_json(tmp_path / "a.json", {"b": [1]}, indent=1)
    assert (tmp_path / "a.json").read_text() == '{\n "b": [\n  1\n ]\n}'


@pytest.mark.parametrize("place", ["absent/profile.json", "file/profile.json", "folder", "."])
def test_what_cannot_be_written(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DocumentError, match=r"cannot write the profile .*; choose another file") as error:
        save_document(place, "profile", 3, FIELDS)
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(DocumentError, match=r"cannot write the profile .*: Permission denied; choose another file"):
        save_document(tmp_path / "profile.json", "profile", 3, FIELDS)


@pytest.mark.parametrize(("place", "reason"), [("absent.json", "No such file or directory"), (".", "Is a directory")])
def test_what_cannot_be_read(tmp_path, place, reason):
    with pytest.raises(DocumentError, match=rf"^cannot read the profile .*: {reason}$"):
        load(tmp_path / place)


def test_a_file_cut_short_anywhere(path):
    text = path.read_text()
    for length in range(len(text)):
        path.write_text(text[:length])
        with pytest.raises(DocumentError, match=r"profile\.json is damaged or no profile: .*; write it again$"):
            load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x81", b"\x00" * 9, b"{'a': 1}", b"PK\x03\x04", b"[" * 100_000, b'{"version": 3} {"version": 3}'],
    ids=["empty", "binary", "zeros", "quotes", "archive", "deep", "two"],
)
def test_a_damaged_file(path, content):
    path.write_bytes(content)
    with pytest.raises(DocumentError, match=r"is damaged or no profile: .*; write it again") as error:
        load(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(("content", "found"), [([], "list"), (3, "int"), ("vwt profile", "str"), (None, "NoneType")])
def test_no_document(path, content, found):
    path.write_text(json.dumps(content))
    with pytest.raises(
        DocumentError, match=rf"is no profile of vwt \(its format is '{found}'\); expected 'vwt profile'"
    ):
        load(path)


@pytest.mark.parametrize("kind", ["vwt schedule", "profile", "vwt profiles", None, 3, ["vwt profile"]], ids=repr)
def test_another_format(path, kind):
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": kind}))
    with pytest.raises(DocumentError, match=r"profile\.json is no profile of vwt .*; expected 'vwt profile'") as error:
        load(path)
    assert repr(kind) in str(error.value)


@pytest.mark.parametrize("version", [0, 2, 4, "3", None, [3], math.inf, 3.0], ids=repr)
def test_another_version(path, version):
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": version}))
    with pytest.raises(DocumentError) as error:
        load(path)
    assert str(error.value) == f"{path} is of version {version!r}, this vwt reads version 3; write it again"


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        (["rows", "name"], "unknown nested"),
        (["name"], "unknown nested, rows"),
        ([*FIELDS, "speed", "budget"], "without budget, speed"),
        (["rows", "name", "speed"], "unknown nested; without speed"),
    ],
)
def test_other_fields(path, fields, fault):
    with pytest.raises(DocumentError) as error:
        load(path, fields)
    assert str(error.value) == f"the profile {path} has not the fields of one: {fault}; write it again"


def test_a_version_that_is_true_is_none(tmp_path):
    save_document(tmp_path / "profile.json", "profile", True, FIELDS)
    with pytest.raises(DocumentError, match="is of version True, this vwt reads version 1"):
        load_document(tmp_path / "profile.json", "profile", 1, FIELDS)


@pytest.mark.parametrize("damage", [{"format": [0] * 9999}, {"version": "x" * 9999}, {"x" * 9999: 1}, {"a\nb": 1}])
def test_messages_on_damaged_values_are_short(path, damage):
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(DocumentError) as error:
        load(path)
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "answer"),
    [(0, True), (-2.5, True), (10**200, True), (True, False), (math.nan, False), (math.inf, False), (10**400, False),
     ("1", False), (None, False), ([1], False)],
)  # fmt: skip
def test_what_is_a_number(value, answer):
    assert is_number(value) is answer


def test_the_error_can_be_caught_as_any_of_vwt(path):
    with pytest.raises(VWTError):
        load(path.parent)


@pytest.mark.skipif(not os.path.isdir("/sys"), reason="needs a folder in which not even root can make files")
def test_a_folder_in_which_nothing_can_be_written():
    with pytest.raises(DocumentError, match=r"cannot write the plan /sys/plan.json: [A-Z].*; choose another folder\Z"):
        check_writable("/sys/plan.json", "plan")

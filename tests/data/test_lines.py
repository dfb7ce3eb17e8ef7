"""Every kind of bad line is named with its number and reason, alone left out, and never changes a neighbour."""

import gzip
import json

import pytest

from potstill.data import lines
from potstill.data.config import MixtureItem
from potstill.data.lines import Rejects
from potstill.data.sources import read_source
from potstill.errors import DataError

GOOD = [{"text": "one"}, {"text": "zwei é 漢 🙂 \u2028 end"}, {"text": "three\nlines\t\u0001"}]

BAD_JSON = {
    "empty object cut": b"{",
    "cut in a string": b'{"text": "on',
    "cut after a value": b'{"text": "one"',
    "trailing comma": b'{"text": "one",}',
    "two objects": b'{"text": "one"} {"text": "two"}',
    "joined objects": b'{"text": "one"}{"text": "two"}',
    "single quotes": b"{'text': 'one'}",
    "unquoted key": b'{text: "one"}',
    "comment": b'// {"text": "one"}',
    "python None": b'{"text": None}',
    "python True": b'{"text": True}',
    "bare word": b"hello",
    "html": b"<html>502 Bad Gateway</html>",
    "bad escape": rb'{"text": "a\q"}',
    "cut unicode escape": rb'{"text": "\u12"}',
    "raw tab": b'{"text": "a\tb"}',
    "raw control character": b'{"text": "a\x01b"}',
    "raw NUL": b'{"text": "a\x00b"}',
    "only NUL": b"\x00\x00\x00",
    "escaped NUL": rb'{"text": "a\u0000b"}',
    "escaped NUL in a key": rb'{"te\u0000xt": "a"}',
    "NaN": b'{"text": "a", "score": NaN}',
    "Infinity": b'{"text": "a", "score": Infinity}',
    "-Infinity": b'{"text": "a", "score": -Infinity}',
    "float that overflows": b'{"text": "a", "score": 1e999}',
    "nested float that overflows": b'{"text": "a", "scores": [{"x": [1, -1e999]}]}',
    "integer of 5000 digits": b'{"text": "a", "n": ' + b"9" * 5000 + b"}",
    "lone high surrogate": rb'{"text": "a\ud83d b"}',
    "lone low surrogate": rb'{"text": "\ude42"}',
    "swapped surrogates": rb'{"text": "\ude42\ud83d"}',
    "lone surrogate in a nested list": rb'{"text": "a", "tags": ["x", ["\udfff"]]}',
    "latin-1": '{"text": "café"}'.encode("latin-1"),
    "cut UTF-8": b'{"text": "\xe6\xbc"}',
    "overlong UTF-8": b'{"text": "\xc0\xaf"}',
    "UTF-8 of a surrogate": b'{"text": "\xed\xa0\x80"}',
    "0xff": b'{"text": "\xff"}',
    "a list": b'["one"]',
    "a string": b'"one"',
    "a number": b"3.5",
    "null": b"null",
    "true": b"true",
    "a key twice": b'{"text": "one", "text": "two"}',
    "a key twice inside": b'{"text": "one", "meta": {"a": 1, "a": 2}}',
    "deep nesting": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "two byte-order marks": b'\xef\xbb\xbf\xef\xbb\xbf{"text": "one"}',
    "longer than allowed": b'{"text": "' + b"x" * 300_000 + b'"}',
}


@pytest.fixture(autouse=True)
def _short_limit(monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 250_000)


def _file(folder, content: list[bytes], suffix: str = ".jsonl", end: bytes = b"\n"):
    data = b"".join(line + end for line in content)
    path = folder / f"rows{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    return path


GOOD_LINES = [json.dumps(row, ensure_ascii=False).encode() for row in GOOD]


@pytest.mark.parametrize("bad", BAD_JSON)
@pytest.mark.parametrize("place", [0, 1, 3], ids=["first", "middle", "last"])
def test_a_bad_line_is_named_and_its_neighbours_are_read(tmp_path, bad, place):
    path = _file(tmp_path, [*GOOD_LINES[:place], BAD_JSON[bad], *GOOD_LINES[place:]], ".jsonl.gz" if place == 1 else ".jsonl")
    rejects = Rejects(allowed=1)
    rows = read_source(MixtureItem(path=str(path)), rejects)
    assert [row.values for row in rows] == GOOD
    numbers = [1, 2, 3, 4]
    del numbers[place]
    assert [row.number for row in rows] == numbers
    assert [reject.origin for reject in rejects.items] == [f"{path}:{place + 1}"]
    assert len(rejects.items[0].reason) > 10
    json.loads(rejects.items[0].as_json().encode())  # can itself be written and read, whatever the line held
    with pytest.raises(DataError, match=rf"rows\.jsonl(\.gz)?:{place + 1}: .*on_bad_line"):
        read_source(MixtureItem(path=str(path)), Rejects())


def test_the_reason_says_what_is_wrong():
    reasons = {
        "NaN": "NaN",
        "lone high surrogate": "lone surrogate",
        "latin-1": "0xe9.*not UTF-8",
        "escaped NUL": "NUL",
        "a list": "a list, not an object",
        "a key twice": "'text' stands twice",
        "cut in a string": "Unterminated string",
        "float that overflows": "'score'.*not finite",
        "deep nesting": "too deeply",
        "two byte-order marks": "byte-order mark",
    }
    for name, reason in reasons.items():
        line = BAD_JSON[name].removeprefix(b"\xef\xbb\xbf")
        with pytest.raises(lines.RowFault, match=reason):
            lines.parse_json_line(line)


def test_skip_allows_so_many_and_no_more(tmp_path):
    path = _file(tmp_path, [b"{", GOOD_LINES[0], b"[", GOOD_LINES[1], b"nope"])
    rejects = Rejects(allowed=3)
    assert [row.values for row in read_source(MixtureItem(path=str(path)), rejects)] == GOOD[:2]
    assert [reject.origin.rpartition(":")[2] for reject in rejects.items] == ["1", "3", "5"]
    with pytest.raises(DataError, match=r":5: .*bad line 3; data\.on_bad_line allows 2"):
        read_source(MixtureItem(path=str(path)), Rejects(allowed=2))


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("last", [True, False], ids=["ended", "unended"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_line_ends_a_first_bom_and_blank_lines_do_no_harm(tmp_path, end, mark, last, suffix):
    data = mark + end.join([GOOD_LINES[0], b"", GOOD_LINES[1], b"  ", GOOD_LINES[2]]) + (end if last else b"")
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    rows = read_source(MixtureItem(path=str(path)), Rejects())
    assert [row.values for row in rows] == GOOD
    assert [row.number for row in rows] == [1, 3, 5]


def test_a_gzip_cut_short_is_never_partly_used(tmp_path):
    whole = gzip.compress(b"\n".join(GOOD_LINES * 200))
    path = tmp_path / "rows.jsonl.gz"
    for content, message in [
        (whole[: len(whole) // 2], "cut short"),
        (whole[:-4], "cut short"),
        (b"not gzip at all", "damaged"),
        (whole[:40] + bytes(20) + whole[60:], "damaged"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"rows.jsonl.gz: .*{message}"):
            read_source(MixtureItem(path=str(path)), Rejects(allowed=1000))


def test_utf16_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"text": "one"}\n'.encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16"):
        read_source(MixtureItem(path=str(path)), Rejects(allowed=1000))


def test_a_file_without_rows(tmp_path):
    for content in (b"", b"\n\n", b"\xef\xbb\xbf"):
        (tmp_path / "rows.jsonl").write_bytes(content)
        with pytest.raises(DataError, match="no usable row"):
            read_source(MixtureItem(path=str(tmp_path / "rows.jsonl")), Rejects())

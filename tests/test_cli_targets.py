"""Targets that the command reads: CSV, JSON, files and pipes."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import virtual_time
from hypothesis import given
from hypothesis import strategies as st

from bctrl_async import BctrlConfigError, RuntimeRef
from bctrl_async.cli import _targets
from bctrl_async.cli._items import MAX_LENGTH, BadLine, Item
from bctrl_async.cli._parser import TargetParser
from bctrl_async.cli._targets import _wait_readable, read_targets

A, B, C = (RuntimeRef("ws", alias) for alias in "abc")


def parse(data: bytes | str, chunks: Sequence[int] = ()) -> list[Item]:
    """Return the items of an input that arrives in chunks of these lengths."""
    parser = TargetParser()
    items: list[Item] = []
    rest = data.encode(errors="surrogateescape") if isinstance(data, str) else data
    for length in chunks:
        chunk, rest = rest[:length], rest[length:]
        if chunk:
            items += parser.feed(chunk)
    if rest:
        items += parser.feed(rest)
    return [*items, *parser.feed(b"")]


def plain(items: Iterable[Item]) -> list[RuntimeRef | str]:
    return [repr(item) if isinstance(item, BadLine) else item for item in items]


def reason(data: bytes | str) -> str:
    """Return the line and the reason of the only bad line."""
    (bad,) = (item for item in parse(data) if isinstance(item, BadLine))
    return f"{bad!r}: {bad}"


# CSV


@pytest.mark.parametrize(
    ("line", "workspace_id", "alias"),
    [
        ("ws,crm", "ws", "crm"),
        ("ws,crm\n", "ws", "crm"),
        ("ws,crm\r\n", "ws", "crm"),
        ("  ws, crm \n", "ws", "crm"),
        ("ws , crm\n", "ws", "crm"),
        ('"ws" ,"crm" \n', "ws", "crm"),
        ('ws , " crm " \n', "ws", " crm "),
        ('"w,s","a ""b"""\n', "w,s", 'a "b"'),
        ('ws, " a "\n', "ws", " a "),
        ("ws,日本\n", "ws", "日本"),
        ("ws,zwei drei\n", "ws", "zwei drei"),
        ("ws;crm\n", "ws", "crm"),
        ("ws\tcrm\n", "ws", "crm"),
        ("ws\ta,b\n", "ws", "a,b"),
        ("ws,a\tb\n", "ws,a", "b"),
        ("ws;a,b,c\n", "ws", "a,b,c"),
        ('ws;"a,b"\n', "ws", "a,b"),
        ('"ws" ; a,"b"\n', "ws", 'a,"b"'),
        ('ws,"a;b"\n', "ws", "a;b"),
        ('ws,5" wide\n', "ws", '5" wide'),
        ("\ufeffws,crm\r\n", "ws", "crm"),
        ("\n\r\n \t\n# a comment, to skip\n  # and another\nws,crm\n", "ws", "crm"),
        ('"#ws",crm\n', "#ws", "crm"),
    ],
)
def test_a_row_without_a_header_is_a_pair(line: str, workspace_id: str, alias: str) -> None:
    (found,) = parse(line)
    assert found == RuntimeRef(workspace_id, alias)
    assert isinstance(found, RuntimeRef)


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("workspace_id,alias", "ws,a"),
        ("workspaceId,alias", "ws,a"),
        ("Workspace, Alias", "ws,a"),
        ('"workspace","alias"', "ws,a"),
        ("ALIAS,WORKSPACE ID", "a,ws"),
        ("name;workspace", "a;ws"),
        ("\tname\tworkspace_id", "0\ta\tws"),
        ("\tname\tworkspace_id", "\ta\tws\t"),
        ("name,alias,workspace,workspace_id", "the name,a,its name,ws"),
        ('note;"alias";kind;workspace', '"a ""note"";\n# of two lines";a;browser;ws'),
        ("alias,workspace,note", 'a,ws,5" wide'),
        ("alias,workspace,note", "a,ws,"),
        ("alias,workspace,note", 'a,ws,"5" wide'),
        ("alias,workspace,note,", "a,ws,"),
        ("alias,workspace,,", "a,ws"),
        ("alias,workspace", "a,ws,,"),
        ("workspace_id , alias", "ws , a"),
        ("alias  ;workspace  ", "a      ;ws"),
        ('"alias" ; "workspace" ', '"a" ; "ws" '),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff", "\ufeff# a comment\n\n"])
def test_the_columns_are_found_by_the_names_in_the_header(mark: str, header: str, row: str) -> None:
    assert parse(f"{mark}{header}\r\n{row}\r\n{row}\r\n") == [A, A]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(
    "header",
    ["workspace_id,alias,note", "workspace_id, alias ,note", '"workspace_id","alias",note'],
)
def test_a_header_that_is_repeated_is_skipped(mark: str, header: str) -> None:
    """Fault: the second header of two files that were joined was sent as a target."""
    first = f"{mark}workspace_id,alias,note\n"
    assert parse(f"{first}ws,a,\n{mark}{header}\r\nws,b,\n{mark}{header}") == [A, B]


def test_a_byte_order_mark_of_a_later_file_is_not_a_part_of_a_name() -> None:
    assert parse("\ufeffws,a\n\ufeffws,b\n") == [A, B]


def test_a_row_that_has_the_names_of_the_columns_elsewhere_is_a_target() -> None:
    named = RuntimeRef("alias", "workspace_id")
    assert parse("workspace_id,alias\nalias,workspace_id") == [named]


def test_a_header_below_the_first_line_is_a_target() -> None:
    assert parse("ws,a\nworkspace_id,alias") == [A, RuntimeRef("workspace_id", "alias")]


@pytest.mark.parametrize("row", ["", ",,", '"","",""', " , ", "#,ws,a"])
def test_an_empty_row_is_skipped(row: str) -> None:
    assert parse(f"x,workspace,alias\n{row}\nx,ws,a\n") == [A]


OPEN_QUOTE = "a quote is not closed; nothing after it was read"
JSON_BELOW = "it looks like JSON, but the first line is CSV"
AMBIGUOUS = "a comma and a semicolon both fit: add a header, or quote the alias"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("crm", "'crm' on line 1: it is neither a header nor a pair"),
        ("a,b,c\n", "'a,b,c' on line 1: it is neither a header nor a pair"),
        ("Dear all, stop", "'Dear all, stop' on line 1: it is neither a header nor a pair"),
        ("workspace,crm", "'workspace,crm' on line 1: the header has no column with an alias"),
        ("a\tname", r"'a\tname' on line 1: the header has no column with a workspace_id"),
        ("ws,a\nws,b,c", "'ws,b,c' on line 2: it has more columns than the first line"),
        ("ws,a\n\nws", "'ws' on line 3: it has fewer columns than the first line"),
        # A file that was cut off, perhaps within the alias.
        (
            "workspace_id,alias,status\nws,a,active\nws,b",
            "'ws,b' on line 3: it has fewer columns than the first line",
        ),
        (
            "note,workspace,alias\n,ws",
            "',ws' on line 2: it has fewer columns than the first line",
        ),
        ('ws,"a"b', """'ws,"a"b' on line 1: text follows a closing quote"""),
        ('ws,"5""" wide\n', """'ws,"5\"\"" wide' on line 1: text follows a closing quote"""),
        (
            'note,workspace,alias\nx,"w"s,a',
            """'x,"w"s,a' on line 2: text follows a closing quote""",
        ),
        (
            'ws,a\n"ws",b\rc\n',
            r"""'"ws",b\rc' on line 2: the alias contains a control character""",
        ),
        ("ws;a,b\n", f"'ws;a,b' on line 1: {AMBIGUOUS}"),
        ('ws;a",b\n', f"""'ws;a",b' on line 1: {AMBIGUOUS}"""),
        (
            "x,workspace,alias\n1,2,ws,a",
            "'1,2,ws,a' on line 2: it has more columns than the first line",
        ),
        ("ws,", "'ws,' on line 1: the alias is empty"),
        (",a", "',a' on line 1: the workspace id is empty"),
        ("ws,a\nws,a\tb", r"'ws,a\tb' on line 2: the alias contains a control character"),
        ("ws,caf\udce9", r"'ws,caf\udce9' on line 1: the alias is not UTF-8"),
        ('ws,a\nws,"b\nws,c', rf"""'ws,"b\nws,c' on line 2: {OPEN_QUOTE}"""),
        ('ws,a\nws,"b\nws,c\n', rf"""'ws,"b\nws,c' on line 2: {OPEN_QUOTE}"""),
        ('ws,a\nws,"b\n', """'ws,"b' on line 2: a quote is not closed"""),
        ('ws,a\n["ws", "b"]\n', f"""'["ws", "b"]' on line 2: {JSON_BELOW}"""),
    ],
)
def test_any_other_row_is_a_bad_line_with_its_number(text: str, why: str) -> None:
    assert reason(text) == why


@pytest.mark.parametrize("comment", ['# "b was here', '#"', '  # see, "b', '\ufeff#,"'])
@pytest.mark.parametrize("header", ["", "workspace_id,alias\n"])
def test_a_quote_in_a_comment_opens_no_cell(header: str, comment: str) -> None:
    """Fault: the targets below it, up to the next quote, were a part of the comment."""
    assert parse(f'{comment}\n{header}ws,a\n{comment}\nws,b\nws,"c"\n{comment}') == [A, B, C]


ROWS = "each of its lines could be a row: a quote may be missing"
SAME = "a quoted line names its workspace: a quote may be missing"
AFTER = "text follows a closing quote"


@pytest.mark.parametrize(
    ("text", "number", "why"),
    [
        ('workspace,alias,note\nws,a,"x\nws,b,y\nws,c,"z"\n', 2, AFTER),
        ('workspace,alias,note\nws,a,"x\nws,b,y"\n', 2, ROWS),
        ('workspace,alias,note\nws,a,"x\n\n# a comment\nws,b,y"\n', 2, ROWS),
        ('workspace,alias,note\nws,a,"8\nws,b\nws,c,9"\n', 2, SAME),
        ('workspace,alias,note\n"ws",a,"8\nws,b\n9"\n', 2, SAME),
        ('workspace,alias,note\nws,a,"8\r\n ws ,b\r\n9"\r\n', 2, SAME),
        ('workspace,alias,note\nws,a,"8\n1,2,3\n4,5,9"\n', 2, ROWS),
        ('note,workspace,alias\n"8, 9,ws,a\nws,b\nx",ws,c\n', 2, SAME),
        ('note,workspace,alias\n"8,ws,a\nb"\n', 2, "it has fewer columns than the first line"),
        ('workspace,alias,note\n,a,"\nx"\n', 2, "the workspace id is empty"),
        ('note,workspace,alias\n"x,ws,a\n#",ws,b\n', 2, ROWS),
        ('workspace,alias,"note\nws,a,x\nws,b,y"\n', 1, ROWS),
        ('workspace,alias,"note\nws,a,"x"\n', 1, AFTER),
        ('workspace,alias,,\nws,a,"\nws,b,"\n', 2, ROWS),
        ('workspace;alias;note\nws;a;"x\nws;b;"\n', 2, ROWS),
        ('ws,"a\nws,b"\n', 1, ROWS),
    ],
)
def test_a_quote_that_may_hide_rows_is_a_bad_line(text: str, number: int, why: str) -> None:
    """Fault: a quote that was missing in a note hid the targets below it, up to the next quote."""
    assert reason(text).endswith(f" on line {number}: {why}")


@pytest.mark.parametrize(
    "note", ["x\ny", "x\n\n", "\n", "x, y\nand, z", "x\n# y", 'x\n""y""', "x\n# y\nz"]
)
def test_a_note_may_have_several_lines(note: str) -> None:
    assert parse(f'workspace,alias,note\nws,a,"{note}"\nws,b,\n') == [A, B]
    assert parse(f'note,workspace,alias\n"{note}",ws,a\n,ws,b\n') == [A, B]


def test_a_name_may_have_characters_that_are_not_printed() -> None:
    assert parse("ws,\u200d") == [RuntimeRef("ws", "\u200d")]


def test_a_quoted_cell_with_line_ends_counts_as_its_lines() -> None:
    assert plain(parse('workspace,alias,note\nws,a,"x\ny"\nws\n')) == [A, "'ws' on line 4"]


# JSON


@pytest.mark.parametrize(
    "text",
    [
        '["ws", "a"]["ws", "b"]',
        '\ufeff["ws","a"]\r\n\r\n["ws","b"]\r\n',
        '{"workspace_id": "ws", "alias": "a"}\n# no\n{"alias": "b", "workspaceId": "ws"} # or',
        '{\n"workspace":\n"ws",\n"alias":\n"a",\n"kind":\n{\n"x": [\n1\n]\n}\n}\n["ws"\n,\n"b"\n]',
        '{"workspace_id": "ws", "workspace": "its name", "alias": "a", "name": "x"}["ws", "b"]',
        '[["ws", "a"], {"workspace_id": "ws", "name": "b"}]',
        '[\n  [\n    "ws",\n    "a"\n  ],\n  # not this\n  ["ws", "b"],\n]\n',
        '[{"workspace": "ws", "alias": "a"}]\n[["ws", "b"]]',
        '[\n"ws", "a"]\n["\\u0077s", "b"]',
        '# a comment\n["ws", "a"]{"workspace": "ws", "alias": "b", "runtime": {"x": "\\"{\\\\"}}',
    ],
)
def test_json_values_may_stand_in_lines_in_a_stream_or_in_an_array(text: str) -> None:
    assert parse(text) == [A, B]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{}", "'{}' on line 1: the workspace id is missing"),
        ('{"alias": "a"}', """'{"alias": "a"}' on line 1: the workspace id is missing"""),
        ('{"workspace": "ws"}', """'{"workspace": "ws"}' on line 1: the alias is missing"""),
        ('\n["ws", 1]', """'["ws", 1]' on line 2: the alias is not text"""),
        ('["ws"]', """'["ws"]' on line 1: the list is not a pair"""),
        ('["ws", "a", "b"]', """'["ws", "a", "b"]' on line 1: the list is not a pair"""),
        ('["ws", "\\ud800"]', r"""'["ws", "\\ud800"]' on line 1: the alias is not UTF-8"""),
        ("{ws}", "'{ws}' on line 1: it is not JSON"),
        ('["ws", "a"],\n["ws", "b"]', "',' on line 1: it is not JSON"),
        ('["ws", "a"]\nws,a', "'ws,a' on line 2: it is not JSON"),
        ('{"workspace": "ws"', """'{"workspace": "ws"' on line 1: it has no end"""),
        ("[", "'' on line 1: the array has no end"),
        ('[["ws", "a"],\n', "'' on line 2: the array has no end"),
        (f'["ws", {"1" * 10_000}]', f"""'["ws", {"1" * 53}' on line 1: it is not JSON"""),
    ],
)
def test_any_other_value_is_a_bad_line_with_its_number(text: str, why: str) -> None:
    assert reason(text) == why


@pytest.mark.parametrize(
    "bad",
    [
        "nonsense",
        '{"workspace": "ws", "alias": "x}',
        '{"workspace": "ws", "alias": "x"',
        '{"workspace": "ws" "alias": "x"}',
        '{"workspace": "ws", "alias":\n\n["ws", "x"}',
        '{"a": [1\n  ["ws", "x"]]}',
        '["ws", "x"]]',
        "# not this\n  nonsense",
        '{"a":' * 100_000,
    ],
)
def test_json_is_read_again_from_the_next_line_that_begins_a_value(bad: str) -> None:
    for chunks in ((), (3,), [1] * 500):
        first, *between, last = parse(f'["ws", "a"]\n{bad}\n["ws", "b"]', chunks)
        assert (first, last) == (A, B)
        assert any(isinstance(item, BadLine) for item in between)


@pytest.mark.parametrize("end", ["}", ""])
def test_a_string_that_is_not_closed_ends_with_its_line(end: str) -> None:
    """The targets below it do not wait for the end of the input."""
    bad = f'{{"workspace": "ws",{" " * 80}\n"alias": "x{end}\n'
    items = TargetParser().feed(f'["ws", "a"]\n{bad}["ws", "b"]\n'.encode())
    first, between, last = items
    assert (first, last) == (A, B)
    assert isinstance(between, BadLine)


@pytest.mark.parametrize("bad", ["nonsense", '{"a" 1}', '{"a": "x\n"}', "[" * 100_000])
def test_nothing_is_read_after_a_fault_in_an_array(bad: str) -> None:
    first, last = parse(f'[["ws", "a"],\n{bad}, ["ws", "b"]]\n["ws", "c"]\n')
    assert first == A
    assert isinstance(last, BadLine)
    assert last.ends_input
    assert repr(last).endswith(" on line 2")
    assert str(last).endswith("; nothing after it was read")


# All formats


def broken(text: str) -> st.SearchStrategy[list[int]]:
    """Return lengths of the chunks in which a text arrives."""
    return st.lists(st.integers(1, 9), max_size=len(text.encode()))


names = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1, max_size=6)
pairs = st.lists(st.tuples(names, names), min_size=1, max_size=6)


@given(st.data(), pairs, st.sampled_from([None, 0, 1, 2]), st.booleans(), st.booleans())
def test_however_json_is_broken_the_targets_are_the_same(
    data: st.DataObject,
    targets: list[tuple[str, str]],
    indent: int | None,
    is_array: bool,  # noqa: FBT001
    is_ascii: bool,  # noqa: FBT001
) -> None:
    values = [
        {"workspace_id": workspace, "alias": alias, "runtime": {"alias": [alias, workspace]}}
        if number % 2
        else [workspace, alias]
        for number, (workspace, alias) in enumerate(targets)
    ]
    texts = [
        json.dumps(value, indent=indent, ensure_ascii=is_ascii)
        for value in ([values] if is_array else values)
    ]
    text = data.draw(st.sampled_from(["", "\n", " ", "\r\n\r\n"])).join(texts)
    assert parse(text, data.draw(broken(text))) == targets


@given(
    st.data(), pairs, st.sampled_from("\t,;"), st.permutations(["Alias", "note", "workspace_id"])
)
def test_however_csv_is_broken_the_targets_are_the_same(
    data: st.DataObject, targets: list[tuple[str, str]], delimiter: str, header: list[str]
) -> None:
    file = io.StringIO()
    rows = csv.DictWriter(file, header, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    rows.writeheader()
    for workspace, alias in targets:
        notes = ["", '"', f"ws{delimiter}a"]
        if delimiter not in f"{workspace}{alias}":
            # Otherwise each of its lines could be a row.
            # Nor is any of them a workspace id, which has up to 6 characters.
            notes += ['5" or so\n6" wide', "\r\n\r\n"]
        note = data.draw(st.sampled_from(notes))
        rows.writerow({"workspace_id": workspace, "Alias": alias, "note": note})
    text = file.getvalue()
    assert parse(text, data.draw(broken(text))) == targets


notes = st.lists(st.text("a\" ,#'", max_size=4), min_size=1, max_size=8)


numbers = st.sets(st.integers(0, 7))


@given(notes, st.sampled_from(["{name},{note}", "{note},{name}"]), numbers, numbers)
def test_no_row_of_csv_is_lost_silently(
    notes: list[str], form: str, comments: set[int], short: set[int]
) -> None:
    """Each is a target, or within a bad line; a quote may be missing in any note or comment."""
    lines = [
        f"#{note}" if number in comments else form.format(note=note, name=f"ws,r{number}")
        for number, note in enumerate(notes)
    ]
    for number in (short - comments).intersection(range(len(lines))):
        lines[number] = f"ws,r{number}"
    header = form.format(note="note", name="workspace_id,alias")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bctrl_async.cli._items._MAX_SHOWN", 1000)
        items = parse("\n".join([header, *lines]))
    bad = "".join(repr(item) for item in items if isinstance(item, BadLine))
    for number, line in enumerate(lines):
        is_comment = line.lstrip().startswith("#")
        assert is_comment or ("ws", f"r{number}") in items or f"ws,r{number}" in bad


@given(st.binary(max_size=200), st.lists(st.integers(1, 9), max_size=50))
def test_however_any_bytes_are_broken_the_targets_are_the_same(
    data: bytes, chunks: list[int]
) -> None:
    def targets(items: list[Item]) -> list[RuntimeRef | None]:
        return [None if isinstance(item, BadLine) else item for item in items]

    assert targets(parse(data, chunks)) == targets(parse(data))


LONG = MAX_LENGTH + 1


@pytest.mark.parametrize(
    ("first", "long", "last"),
    [
        ("ws,a\n", "x" * LONG, "\nws,b\n"),
        ("ws,a\n", "x" * LONG, "x\nws,b\n"),
        ('["ws", "a"]\n', f'{{"a": "{"x" * LONG}"}}', '\n["ws", "b"]\n'),
        ('["ws", "a"]\n', '{"a": "x",\n' + '"a": "x",\n' * (LONG // 10), '\n["ws", "b"]\n'),
    ],
)
@pytest.mark.parametrize("chunk", [65536, LONG + 5])
def test_a_value_that_is_too_long_is_a_bad_line_and_the_next_is_read(
    first: str, long: str, last: str, chunk: int
) -> None:
    """Fault: a line of 40 MiB was held in memory, and copied at every chunk."""
    found, bad, following = parse(first + long + last, [chunk] * 100)
    assert (found, following) == (A, B)
    assert repr(bad) == f"{long[:60]!r} on line 2"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ('ws,a\nws,"' + "x" * LONG + '\nws,b\n"\nws,c\n', 2),
        ('ws,a\nws,"' + "x\n" * LONG + "ws,b\n", 2),
        ("ws,a\n" + "x" * 2 * LONG + ',"' + "x" * 70_000 + '\nws,b\n"\nws,c\n', 3),
        ('[["ws", "a"], "' + "x" * LONG + '", ["ws", "b"]]', 2),
    ],
)
def test_nothing_is_read_after_a_long_line_that_may_not_end_where_it_seems_to(
    text: str, count: int
) -> None:
    items = parse(text, [65536] * 100)
    assert (items[0], len(items)) == (A, count)
    last = items[-1]
    assert isinstance(last, BadLine)
    assert last.ends_input


@pytest.mark.parametrize("blank", ["\n", "#\n", " "])
def test_blanks_before_the_first_target_are_not_held_without_end(blank: str) -> None:
    text = blank * 70_000 + "\nws,a\n"
    assert parse(text, [1000] * 100) == [A]


# Files


def read(path: Path, *, allow_empty: bool = False) -> Iterable[Item]:
    found = read_targets(str(path), allow_empty=allow_empty)
    assert isinstance(found, Iterable)
    return found


def test_a_file_yields_its_targets_in_order_and_has_a_length(tmp_path: Path) -> None:
    file = tmp_path / "targets"
    many = "".join(f"{number},ws,x\n" for number in range(100))
    file.write_text(f"x,workspace,alias\n{many}\nnonsense\n1,ws,b\n1,ws,c")
    found = read(file)
    assert len(found) == 103  # type: ignore[arg-type]
    for _ in range(2):
        assert plain(found)[100:] == ["'nonsense' on line 103", B, C]


@pytest.mark.parametrize("name", ["missing", "."])
def test_an_unreadable_file_raises_an_os_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError, match=r"No such file|Is a directory|Permission denied"):
        read_targets(str(tmp_path / name), allow_empty=False)


def test_a_bad_line_among_the_first_hundred_targets_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "targets"
    file.write_text("ws,a\n" * 99 + "\n# x\n" * 5 + "nonsense\n")
    with pytest.raises(BctrlConfigError, match="'nonsense' on line 110 is not a target"):
        read(file)
    file.write_text("ws,a\n" * 100 + "nonsense\n")
    assert plain(read(file))[100:] == ["'nonsense' on line 101"]


CHANGED = "the file has changed since the run began"


def padded(first: str, last: str) -> str:
    """Return a list whose last row ends in the second chunk."""
    return f"{first}\n#".ljust(_targets._CHUNK - len(last), "x") + f"\n{last}\n"


def _empty(file: Path) -> None:
    file.write_text("")


def _append(file: Path) -> None:
    with file.open("a") as opened:
        opened.write("ws,c\n")


def _replace(file: Path) -> None:
    new = file.with_name("new")
    new.write_bytes(file.read_bytes())
    status = file.stat()
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    new.replace(file)


def _touch(file: Path) -> None:
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))


@pytest.mark.parametrize("change", [_empty, _append, _replace, _touch])
def test_a_file_that_changes_between_counting_and_reading_raises_an_os_error(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    file = tmp_path / "targets"
    file.write_text("ws,a\nws,b\n")
    found = iter(read(file))
    change(file)
    with pytest.raises(OSError) as caught:  # noqa: PT011 - its errno is None.
        next(found)
    assert caught.value.strerror == CHANGED


def test_a_row_of_which_only_a_part_was_read_before_a_change_is_not_a_target(
    tmp_path: Path,
) -> None:
    """Fault: a file that was cut off within a row was read to its end, with a part of the row."""
    file = tmp_path / "targets"
    file.write_text(padded("ws,a", "ws,bcd"))
    found = iter(read(file))
    assert next(found) == A
    _empty(file)
    with pytest.raises(OSError) as caught:  # noqa: PT011 - its errno is None.
        next(found)
    assert caught.value.strerror == CHANGED


def test_a_file_that_changes_while_it_is_counted_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "targets"
    file.write_text(padded("ws,a", "ws,b"))

    class Changing(TargetParser):
        def feed(self, data: bytes) -> Iterator[Item]:
            _touch(file)
            return super().feed(data)

    monkeypatch.setattr(_targets, "TargetParser", Changing)
    with pytest.raises(OSError) as caught:  # noqa: PT011 - its errno is None.
        read(file)
    assert caught.value.strerror == CHANGED


def test_a_file_that_is_replaced_while_it_is_open_is_read_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "targets"
    file.write_text(padded("ws,a", "ws,b"))
    found = iter(read(file))
    first = next(found)
    _replace(file)
    assert [first, *found] == [A, B]


# Pipes


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for end in (reader, writer):
        try:
            os.close(end)
        except OSError:
            assert end == writer  # A test may have closed it.


def read_pipe(file: int, *, allow_empty: bool = False) -> AsyncIterator[Item]:
    return _targets.read_pipe(file, "the pipe", allow_empty=allow_empty)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs here")
async def test_a_named_pipe_is_read(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writing = asyncio.create_task(asyncio.to_thread(fifo.write_bytes, b"ws,a\nws,b\n"))
    found = await asyncio.to_thread(read_targets, str(fifo), allow_empty=False)
    await writing
    assert isinstance(found, AsyncIterable)
    assert [item async for item in found] == [A, B]


def test_targets_are_held_back_until_a_second_after_the_first(pipe: tuple[int, int]) -> None:
    """Fault: the first line of a pipe was stopped before the second one showed that it is prose."""
    reader, writer = pipe

    async def use() -> list[float]:
        loop = asyncio.get_running_loop()
        times = []
        loop.call_later(5.0, os.write, writer, b"ws,")
        loop.call_later(7.0, os.write, writer, b"a\n")
        loop.call_later(7.9, os.write, writer, b"ws,b\nws,")
        loop.call_later(20.0, os.write, writer, b"c\n")
        loop.call_later(30.0, os.close, writer)
        found = []
        async for item in read_pipe(reader):
            found.append(item)
            times.append(round(loop.time(), 1))
        assert found == [A, B, C]
        return times

    assert virtual_time.run(use()) == [8.0, 8.0, 20.0]


def test_a_hundred_targets_are_used_at_once(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.write(writer, b"ws,a\n" * 150 + b"nonsense\n")

    async def use() -> int:
        items = read_pipe(reader)
        found = [await anext(items) for _ in range(151)]
        assert asyncio.get_running_loop().time() == 0.0
        return sum(isinstance(item, BadLine) for item in found)

    assert virtual_time.run(use()) == 1


def test_a_bad_line_within_the_first_second_is_an_error(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.write(writer, b"ws,a\n")

    async def use() -> list[Item]:
        asyncio.get_running_loop().call_later(0.9, os.write, writer, b"nonsense\nws,b\n")
        return [item async for item in read_pipe(reader)]

    with pytest.raises(BctrlConfigError, match="'nonsense' on line 2 is not a target"):
        virtual_time.run(use())


async def test_a_pipe_without_targets_is_an_error_unless_allowed(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.write(writer, b"workspace,alias\n")
    os.close(writer)
    with pytest.raises(BctrlConfigError, match="there are no targets in the pipe"):
        await anext(read_pipe(reader))
    assert [item async for item in read_pipe(reader, allow_empty=True)] == []


async def test_a_character_can_arrive_in_two_parts(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    first, second = "é".encode()[:1], "é".encode()[1:]
    os.write(writer, b"ws,a\n" * 100 + b"ws," + first)
    items = read_pipe(reader)
    assert [await anext(items) for _ in range(100)] == [A] * 100
    os.write(writer, second + b"\n")
    assert await anext(items) == RuntimeRef("ws", "é")
    await items.aclose()  # type: ignore[attr-defined]


async def test_a_pipe_is_read_beyond_its_capacity(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    count = 30_000

    def write() -> None:
        with os.fdopen(os.dup(writer), "wb") as file:
            file.writelines(b"ws,runtime-%d\n" % number for number in range(count))
        os.close(writer)

    writing = asyncio.create_task(asyncio.to_thread(write))
    found = [item async for item in read_pipe(reader)]
    await writing
    assert found == [RuntimeRef("ws", f"runtime-{number}") for number in range(count)]


async def test_a_regular_file_can_be_read_as_a_pipe(tmp_path: Path) -> None:
    file = tmp_path / "targets"
    file.write_bytes(b"ws,a\nws,b\n")
    number = os.open(file, os.O_RDONLY)
    assert [item async for item in read_pipe(number)] == [A, B]
    os.close(number)


async def test_waiting_for_a_pipe_can_be_cancelled_as_it_becomes_readable(
    pipe: tuple[int, int],
) -> None:
    reader, writer = pipe
    waiting = asyncio.create_task(_wait_readable(reader))
    await asyncio.sleep(0)
    os.write(writer, b"x")
    # In one iteration of the loop, the task is cancelled and then the pipe becomes readable.
    asyncio.get_running_loop().call_soon(waiting.cancel)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not asyncio.get_running_loop().remove_reader(reader)

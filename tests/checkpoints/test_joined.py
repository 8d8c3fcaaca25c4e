"""Parts are read as the one file that they are, with few of them open, and a change on disk is noticed."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crocuta.checkpoints.torch_save.joined import MAX_OPEN, MAX_PARTS, JoinedFile, Memory
from crocuta.errors import WeightsFormatError


def write_parts(folder: Path, data: bytes, cuts: list[int]) -> list[Path]:
    paths = []
    for index, (begin, end) in enumerate(zip([0, *cuts], [*cuts, len(data)])):
        paths.append(folder / f"x.pt.part{index}")
        paths[-1].write_bytes(data[begin:end])
    return paths


def open_below(folder: Path) -> int:
    """How many files of ``folder`` this process has open."""
    targets = []
    for number in Path("/proc/self/fd").iterdir():
        if number.is_symlink():
            targets.append(os.readlink(number))
    return sum(target.startswith(str(folder)) for target in targets)


spans = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)).map(sorted), min_size=1, max_size=8)


@given(st.lists(st.integers(0, 300), max_size=20).map(sorted), spans)
def test_every_span_of_every_split_is_what_the_whole_file_has_there(tmp_path_factory, cuts, spans):
    folder = tmp_path_factory.mktemp("parts")
    data = os.urandom(300)
    with JoinedFile(write_parts(folder, data, cuts)) as file:
        memory = Memory(data, "memory")
        assert file.size == memory.size == 300
        for begin, end in spans:
            view = bytearray(end - begin)
            file.fill(memoryview(view), begin, "x")
            assert bytes(view) == file.read_at(begin, end - begin) == memory.read_at(begin, end - begin)
            assert bytes(view) == data[begin:end]
            memory.fill(memoryview(view), begin, "x")
            assert bytes(view) == data[begin:end]


@pytest.mark.parametrize("span", [(-1, 1), (0, 301), (300, 1), (301, 0), (5, -1), (1 << 70, 1)])
def test_spans_outside_are_refused(tmp_path, span):
    data = os.urandom(300)
    with JoinedFile(write_parts(tmp_path, data, [100])) as file:
        for source in (file, Memory(data, "memory")):
            with pytest.raises(WeightsFormatError, match="300 bytes"):
                source.read_at(*span)
            if span[1] >= 0:
                with pytest.raises(WeightsFormatError, match="the header would end beyond the file's 300 bytes"):
                    source.fill(memoryview(bytearray(span[1])), span[0], "the header")


def test_few_parts_are_open_at_a_time_and_none_afterwards(tmp_path):
    data = os.urandom(40)
    with JoinedFile(write_parts(tmp_path, data, list(range(1, 40)))) as file:
        for place in (0, 39, 5, 20):
            assert file.read_at(place, 1) == data[place : place + 1]
            assert 1 <= open_below(tmp_path) <= MAX_OPEN
        assert file.read_at(0, 40) == data
    assert open_below(tmp_path) == 0


def test_the_error_names_the_first_part_and_how_many_there_are(tmp_path):
    paths = write_parts(tmp_path, b"abc", [1, 2])
    with JoinedFile(paths) as file:
        assert file.name == f"{paths[0]} and 2 more"
    with JoinedFile(paths[:1]) as file:
        assert file.name == str(paths[0])


def cut(path: Path) -> None:
    os.truncate(path, 1)


def write_again(path: Path) -> None:
    os.utime(path, ns=(0, 1))


def replace_by_another(path: Path) -> None:
    status = path.stat()
    path.with_name("new").write_bytes(bytes(status.st_size))
    os.utime(path.with_name("new"), ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(path.with_name("new"), path)


@pytest.mark.parametrize("change", [cut, write_again, replace_by_another, os.remove])
def test_a_part_that_changed_while_it_was_not_open_is_noticed(tmp_path, change):
    paths = write_parts(tmp_path, os.urandom(40), list(range(2, 40, 2)))
    with JoinedFile(paths) as file:
        file.read_at(2 * MAX_OPEN + 4, 20)  # the first ones are closed by now
        change(paths[0])
        with pytest.raises(WeightsFormatError, match=r"part0(: the file changed while row 7 was read|: got No such)"):
            file.fill(memoryview(bytearray(2)), 0, "row 7")


@pytest.mark.parametrize("change", [cut, write_again])
def test_a_file_that_changes_while_it_is_open_is_noticed(tmp_path, change):
    paths = write_parts(tmp_path, os.urandom(40), [])
    with JoinedFile(paths) as file:
        file.read_at(0, 10)
        change(paths[0])
        with pytest.raises(WeightsFormatError, match=r"part0: the file changed while 10 bytes at 10 was read"):
            file.read_at(10, 10)


def test_what_is_no_regular_file_is_refused_and_nothing_stays_open(tmp_path):
    good = write_parts(tmp_path, b"abc", [1])
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for bad, reason in {"fifo": "not a regular", "loop": "cannot read", "gone": "cannot read", ".": "regular"}.items():
        with pytest.raises(WeightsFormatError, match=reason):
            JoinedFile([*good, tmp_path / bad])
        assert open_below(tmp_path) == 0


@pytest.mark.parametrize("count", [0, MAX_PARTS + 1])
def test_no_files_or_too_many_are_refused(tmp_path, count):
    with pytest.raises(WeightsFormatError, match=f"got {count}; expected 1 to"):
        JoinedFile([tmp_path / "x"] * count)


def test_a_link_to_a_file_is_followed(tmp_path):
    """Downloads of model hubs are links to files named by their hash."""
    write_parts(tmp_path, b"abc", [])
    (tmp_path / "link").symlink_to(tmp_path / "x.pt.part0")
    with JoinedFile([tmp_path / "link"]) as file:
        assert file.read_at(0, 3) == b"abc"

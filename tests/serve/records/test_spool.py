from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from serve.records.spool import Part, Spool
from tests.serve.records.journal_support import child, kill, left_by_a_killed_process, parts

DISK_FULL = """
import resource, signal, sys
from pathlib import Path
from serve.records.spool import Spool
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
spool = Spool(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
for number in range(5):
    try:
        spool.append(b"x" * 30)
        print("kept", flush=True)
    except OSError as error:
        print(error.errno, flush=True)
part = spool.take()
print(part.lines() == [b"x" * 30] * 3, flush=True)
"""


def taken(spool: Spool) -> Part:
    part = spool.take()
    assert part is not None
    return part


def test_lines_are_taken_oldest_first_and_forgotten_when_done(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    assert spool.take() is None
    spool.append(b"1")
    spool.append(b"2")
    first = taken(spool)
    spool.append(b"3")
    assert first.lines() == [b"1", b"2"]
    assert taken(spool) is first  # not done yet
    spool.done(first)
    assert not first.path.exists()
    second = taken(spool)
    assert second.lines() == [b"3"]
    spool.done(second)
    spool.close()
    assert parts(tmp_path) == []


def test_a_mark_is_reached_when_all_before_it_is_done(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    assert spool.reached(spool.mark())
    spool.append(b"1")
    mark = spool.mark()
    part = taken(spool)
    spool.append(b"2")
    later = spool.mark()
    assert not spool.reached(mark)
    spool.done(part)
    assert spool.reached(mark)
    assert not spool.reached(later)
    spool.close()


def test_a_writer_that_does_not_come_gets_several_small_parts(tmp_path: Path) -> None:
    spool = Spool(tmp_path, large=10)
    for number in range(6):
        spool.append(b"%d2345" % number)
    sizes = []
    while part := spool.take():
        sizes.append(len(part.lines()))
        spool.done(part)
    spool.close()
    assert sizes == [2, 2, 2]


def test_lines_that_are_not_done_stay_and_nothing_more_is_taken_in(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append(b"1")
    taken(spool)
    spool.append(b"2")
    spool.close()
    with pytest.raises(OSError, match="closed"):
        spool.append(b"3")
    heir = Spool(tmp_path)
    assert heir.adopt() == 2
    found = []
    while part := heir.take():
        found += part.lines()
        heir.done(part)
    heir.close()
    assert sorted(found) == [b"1", b"2"]
    assert parts(tmp_path) == []


def test_a_line_that_death_cut_off_is_left_out(tmp_path: Path) -> None:
    left_by_a_killed_process(tmp_path, b'{"a":1}\n{"b":')
    spool = Spool(tmp_path)
    spool.adopt()
    assert taken(spool).lines() == [b'{"a":1}']
    spool.close()


def test_a_living_process_keeps_its_part_and_a_dead_one_is_inherited_once(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from serve.records.spool import Spool\n"
        "spool = Spool(Path(sys.argv[1])); spool.append(b'theirs'); print('ready', flush=True)\n"
        "sys.stdin.read()"
    )
    living = child(program, str(tmp_path))
    assert living.stdout
    assert living.stdout.readline() == "ready\n"
    spool, other = Spool(tmp_path), Spool(tmp_path)
    assert spool.adopt() == 0
    assert [path.read_bytes() for path in spool.foreign()] == [b"theirs\n"]
    kill(living)
    assert spool.adopt() == 1
    assert other.adopt() == 0
    assert taken(spool).lines() == [b"theirs"]
    spool.close()
    other.close()


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    process = child(DISK_FULL, str(tmp_path))
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said.split() == ["kept", "kept", "kept", *[str(errno.ENOSPC)] * 2, "True"]


def test_lines_of_many_threads_are_whole(tmp_path: Path) -> None:
    spool = Spool(tmp_path, large=5_000)
    lines = [b"%d-" % number * 200 for number in range(8)]

    def write(line: bytes) -> None:
        for _ in range(50):
            spool.append(line)

    threads = [threading.Thread(target=write, args=[line]) for line in lines]
    for thread in threads:
        thread.start()
    found: list[bytes] = []
    while any(thread.is_alive() for thread in threads) or spool.waiting():
        if part := spool.take():
            found += part.lines()
            spool.done(part)
    spool.close()
    assert sorted(found) == sorted(lines * 50)


def test_without_descriptors_the_old_part_goes_on(tmp_path: Path) -> None:
    spool = Spool(tmp_path, large=1)
    spool.append(b"1")
    moved = tmp_path.rename(tmp_path.with_name("elsewhere"))  # a new part cannot be made where nothing is
    spool.append(b"2")
    with pytest.raises(FileNotFoundError):
        spool.take()
    moved.rename(tmp_path)
    assert taken(spool).lines() == [b"1", b"2"]
    spool.close()

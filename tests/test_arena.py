import ctypes
import mmap
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier.arena import Arena, stride
from kvtier.core.blocks import BlockKey, Slot
from kvtier.errors import RemoteProtocolError

KEY = BlockKey(bytes(range(16)))


def test_slots_do_not_overlap_and_start_on_pages() -> None:
    arena = Arena.create(5000, 3)
    for slot in range(3):
        arena.slot(Slot(slot))[:] = bytes([slot + 1]) * 5000
    assert [bytes(arena.slot(Slot(slot))) for slot in range(3)] == [
        bytes([slot + 1]) * 5000 for slot in range(3)
    ]
    assert stride(5000) == 8192
    assert len(arena.view) == 3 * 8192
    with pytest.raises(IndexError, match="slot 3 of 3"):
        arena.slot(Slot(3))
    with pytest.raises(IndexError):
        arena.slot(Slot(-1))


def test_another_process_sees_the_same_bytes_and_they_survive_the_owner() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    child = os.fork()
    if child == 0:
        arena = Arena.create(4096, 2)
        arena.slot(Slot(1))[:] = b"x" * 4096
        socket.send_fds(theirs, [b"."], [arena.fd])
        os._exit(0)
    theirs.close()
    _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    os.waitpid(child, 0)
    ours.close()
    attached = Arena.attach(fds[0], 4096, 2)
    assert bytes(attached.slot(Slot(1))) == b"x" * 4096
    attached.slot(Slot(0))[:] = b"y" * 4096  # still memory, though nobody owns it
    attached.close()
    attached.close()


def test_an_arena_cannot_be_resized_by_anybody() -> None:
    arena = Arena.create(4096, 2)
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, 4096)
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, 4096 * 4)


def test_the_index_is_seen_on_both_sides_and_is_no_part_of_the_slots() -> None:
    arena = Arena.create(4096, 3)
    theirs = Arena.attach(os.dup(arena.fd), 4096, 3)
    arena.index.enter([KEY], [Slot(2)])
    assert theirs.index.find([KEY]) == ([Slot(2)], 1)
    arena.index.leave([Slot(2)])
    assert theirs.index.find([KEY]) == ([], 2)
    assert theirs.index.unmoved([Slot(1), Slot(2)], 1) == 1
    assert theirs.view == bytes(3 * 4096)


def test_what_is_not_a_sealed_arena_is_refused() -> None:
    loose = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(loose, 8192)
    with pytest.raises(RemoteProtocolError, match="not sealed"):
        Arena.attach(loose, 4096, 2)
    arena = Arena.create(4096, 2)
    with pytest.raises(RemoteProtocolError, match="12288 bytes long, announced were 16384"):
        Arena.attach(os.dup(arena.fd), 4096, 3)
    reader, writer = os.pipe()
    os.close(writer)
    with pytest.raises(RemoteProtocolError, match="not a memfd"):
        Arena.attach(reader, 4096, 2)


def test_more_memory_than_there_is_gives_one_clear_line() -> None:
    code = """
import resource
from kvtier.arena import Arena
from kvtier.errors import ConfigError
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
try:
    Arena.create(1 << 20, 4096)
except ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("host.bytes: cannot take 4294967296 bytes of memory")


@pytest.mark.parametrize("nbytes", [4096, (2 << 20) - 4096, 2 << 20, (4 << 20) + 4096, 9 << 20])
def test_large_pages_or_small_all_is_zero_and_another_process_sees_it(nbytes: int) -> None:
    arena = Arena.create(4096, nbytes // 4096)
    assert 0 <= arena.large_nbytes <= nbytes // (2 << 20) * (2 << 20)
    assert arena.view == bytes(nbytes)
    data = os.urandom(nbytes)
    arena.view[:] = data
    attached = Arena.attach(os.dup(arena.fd), 4096, nbytes // 4096)
    assert attached.view == data
    for each in (arena, attached):
        each.close()


def test_without_address_space_to_choose_from_it_lies_where_there_is_room() -> None:
    code = """
import resource
from kvtier.arena import Arena
in_use = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (in_use + (67 << 20), in_use + (67 << 20)))
arena = Arena.create(1 << 20, 64)
print(len(arena.view), *{max(arena.slot(n)) for n in range(64)})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(64 << 20), "0"]


def test_each_mapping_begins_on_a_large_page_wherever_others_lie() -> None:
    odd = [mmap.mmap(-1, 4096 * (2 * n + 1)) for n in range(5)]
    arena = Arena.create(4096, 3 * 512)
    mapped = [arena]
    for n in range(5):
        odd.append(mmap.mmap(-1, 4096 * (2 * n + 1)))
        mapped.append(Arena.attach(os.dup(arena.fd), 4096, 3 * 512))
    starts = [ctypes.addressof(ctypes.c_char.from_buffer(each.view)) for each in mapped]
    assert len({*starts}) == len(mapped)
    assert [start % (2 << 20) for start in starts] == [0] * len(mapped)
    for each in odd:
        each.close()


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("kvtier-arena")


@pytest.mark.parametrize("nbytes", [4096, 9 << 20])
def test_a_mapping_stays_for_its_last_view_and_goes_with_it(nbytes: int) -> None:
    before = mappings()
    arena = Arena.create(4096, nbytes // 4096)
    arena.slot(Slot(0))[:3] = b"abc"
    slot, left = arena.slot(Slot(0)), arena.index.left
    arena.close()
    del arena
    assert mappings() == before + 1
    assert bytes(slot[:3]) == b"abc"
    del slot
    assert left[0] == 0
    del left
    assert mappings() == before


def test_nothing_is_left_in_dev_shm() -> None:
    before = set(Path("/dev/shm").iterdir())
    arena = Arena.create(4096, 2)
    assert set(Path("/dev/shm").iterdir()) == before
    arena.close()


@pytest.mark.parametrize("slots", [1, 3, 5000])
def test_a_large_arena_is_whole_large_pages_or_the_processor_sees_small_ones(slots: int) -> None:
    arena = Arena.create(2 << 20, slots, prefault=False)
    try:
        nbytes = os.fstat(arena.fd).st_size
        assert nbytes % (2 << 20) == 0
        assert nbytes >= slots * ((2 << 20) + 8), "the turns lie behind the slots"
    finally:
        arena.close()

"""The collector works while a daemon is quiet, and is as it was afterwards."""

import asyncio
import gc
import weakref

from kvtier.node.garbage import collected_when_quiet


class _Cycle:
    def __init__(self) -> None:
        self.me = self


async def test_cycles_go_when_the_process_is_quiet():
    assert gc.isenabled()
    async with collected_when_quiet(every_s=0.0, look_s=0.05):
        assert not gc.isenabled()
        gone = asyncio.Event()
        lost = weakref.ref(_Cycle(), lambda _: gone.set())
        await asyncio.wait_for(gone.wait(), 60)
        assert lost() is None
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


async def test_there_is_no_pass_before_its_time():
    async with collected_when_quiet(every_s=3600.0, look_s=0.001):
        lost = weakref.ref(_Cycle())
        for _ in range(100):
            await asyncio.sleep(0.002)
        assert lost() is not None

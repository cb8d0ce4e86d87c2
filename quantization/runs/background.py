"""Work that need not be waited for: writing one block while a GPU quantizes the next."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch

__all__ = ["Background"]


class Background:
    """Does jobs in a thread of its own, one after the other; a new one is taken when the one before is done.

    The end of the `with` waits for the last one. What a job raises, the next call raises. on: whether there is a
    thread; otherwise jobs are done at once. device: a GPU's jobs run beside what it computes meanwhile.
    """

    def __init__(self, device: torch.device, on: bool):
        self._device = device
        self._thread = ThreadPoolExecutor(1) if on else None
        self._last: Future[None] | None = None

    def do(self, job: Callable[[], None]) -> None:
        """Take a job. It must hold all that it needs: the caller goes on."""
        if self._thread is None:
            job()
            return
        self.wait()
        ready = None
        if self._device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))
        self._last = self._thread.submit(self._run, job, ready)

    def wait(self) -> None:
        """Until the job that was taken is done."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def _run(self, job: Callable[[], None], ready: torch.cuda.Event | None) -> None:
        with ExitStack() as stack:
            if ready is not None:
                aside = torch.cuda.Stream(self._device)
                aside.wait_event(ready)  # what the job reads is computed by then
                stack.enter_context(torch.cuda.stream(aside))
            job()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()

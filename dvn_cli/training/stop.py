"""Signals that ask a run to stop, heard when a step has ended: nothing that was computed is lost.

Of several processes that train together all stop after the same step, whichever of them had the signal.
"""

import signal
import threading
from types import FrameType, TracebackType

import torch
from torch import Tensor

from dvn_cli import processes


class Stop:
    """A context in which SIGINT and SIGTERM are noted, each once: a second one does what it did before.

    Attributes:
        signal: the one that came; None where none did.
        agreed: whether all processes know that one came to some of them.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.agreed = False
        self._told: tuple[Tensor, torch.cuda.Event] | None = None
        self._handlers: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # no other one may
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:  # such as under nohup
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._give_back()

    def hear(self, asked: Tensor) -> None:
        """Takes after a step what processes have told each other: (1,), more than 0 where one of them is to stop.

        On CUDA it is looked at a step later, when the device has long told it, so that the device has work meanwhile.
        """
        if processes.count() == 1:
            return
        if not asked.is_cuda:
            self.agreed = bool(asked)
            return
        if self._told is not None:
            (told, is_there), self._told = self._told, None
            is_there.synchronize()
            self.agreed = bool(told)
        with torch.cuda.device(asked.device):
            copied = torch.empty(1, pin_memory=True).copy_(asked, non_blocking=True)
            (event := torch.cuda.Event()).record()
        self._told = copied, event

    @property
    def is_due(self) -> bool:
        """Whether the run stops after this step."""
        return self.agreed if processes.count() > 1 else self.signal is not None

    def check(self) -> None:
        """Raises what the signal that came stands for: KeyboardInterrupt, or SystemExit with 128 and its number."""
        if self.is_due and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.is_due:
            raise SystemExit(128 + (self.signal or signal.SIGTERM))

"""One run on several GPUs or nodes: Accelerate starts the processes and carries what they share."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch


def launched() -> int:
    """Return how many processes work on this run, 1 unless `accelerate launch` (or torchrun) started more."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Processes:
    """What one process knows of the others; alone, every method does nothing.

    Parameters
    ----------
    device
        Where this process computes; a CPU device makes the processes talk through gloo.
    alone
        Take no notice of other processes, whatever was launched.

    Attributes
    ----------
    rank, count : int
        This process's number, and how many there are.
    """

    def __init__(self, device: str | torch.device, *, alone: bool = False):
        self.count, self.rank, self._state = 1 if alone else launched(), 0, None
        if self.count > 1:
            from datetime import timedelta

            from accelerate import PartialState

            # The others wait while one embeds a cohort or writes its tiles, which may take hours.
            self._state = PartialState(cpu=torch.device(device).type == "cpu", timeout=timedelta(days=2))
            self.rank, self.count = self._state.process_index, self._state.num_processes

    @property
    def first(self) -> bool:
        """True in the one process that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process is here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def same(self, value):
        """Return the first process's value (anything that pickles) in every process."""
        if self._state is None:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of every process's tensor."""
        if self._state is None:
            return tensor
        from accelerate.utils import reduce

        return reduce(tensor, "sum")

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum gradients over processes, in one message; a process whose share was empty adds nothing."""
        if self._state is None:
            return
        learn = [p for p in parameters if p.requires_grad]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learn])
        for p, grad in zip(learn, self.add(flat).split([p.numel() for p in learn]), strict=True):
            p.grad = grad.view_as(p)

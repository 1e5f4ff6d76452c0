"""Run on several GPUs or nodes: Accelerate starts the processes and exchanges their data."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch


def launched() -> int:
    """Return the number of processes of this run: 1 unless `accelerate launch` (or torchrun) started more."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Processes:
    """Communicate between the processes of a run; in a single process every method does nothing.

    `rank` is the index of this process, `count` the number of processes; if `alone`, others are ignored. On the CPU
    they communicate through gloo.
    """

    def __init__(self, device: str | torch.device, *, alone: bool = False):
        self.count, self.rank, self._state = 1 if alone else launched(), 0, None
        if self.count > 1:
            from datetime import timedelta

            from accelerate import PartialState

            # The other processes wait while one embeds a cohort or writes its tiles, which may take hours.
            self._state = PartialState(cpu=torch.device(device).type == "cpu", timeout=timedelta(days=2))
            self.rank, self.count = self._state.process_index, self._state.num_processes

    @property
    def first(self) -> bool:
        """Return whether this is the process that writes files."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait for every process."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def same(self, value):
        """Return the first process's value (any picklable object) in every process."""
        if self._state is None:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over processes."""
        if self._state is None:
            return tensor
        from accelerate.utils import reduce

        return reduce(tensor, "sum")

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum gradients over processes, in one message; a process without rows adds zeros."""
        if self._state is None:
            return
        trainable = [p for p in parameters if p.requires_grad]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trainable])
        for p, grad in zip(trainable, self.add(flat).split([p.numel() for p in trainable]), strict=True):
            p.grad = grad.view_as(p)

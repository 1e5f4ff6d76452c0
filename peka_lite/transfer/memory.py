"""How a student runs in training: frozen weights in the compute type, blocks recomputed, compiled where that works."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@contextlib.contextmanager
def frozen_dtype(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Hold the frozen weights of linear and convolution layers in `dtype`; what they were comes back afterwards.

    Autocast casts these weights at every use and keeps each copy for the backward pass; held in the compute type, they
    are half as large and never copied, and every product is the same. Originals wait in the CPU's memory.
    """
    own = [
        p
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        for p in module.parameters(recurse=False)
        if not p.requires_grad and p.dtype != dtype
    ]
    kept = [(p, p.data.cpu(), p.device) for p in own]
    try:
        for p in own:
            p.data = p.data.to(dtype)
        yield
    finally:
        for p, data, device in kept:
            p.data = data.to(device)


@contextlib.contextmanager
def checkpoint_blocks(model: nn.Module) -> Iterator[None]:
    """Keep only the input of each transformer block, and run the block again when its gradient is asked for.

    Memory falls to about one block's activations; a step takes one more forward pass. Gradients are the same.

    Raises
    ------
    ValueError
        For a model without a row of ``blocks``.
    """
    blocks = getattr(model, "blocks", None)
    if blocks is None:
        raise ValueError(f"{type(model).__name__} has no transformer blocks to recompute; leave recompute off")
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def compile_if_possible(model: nn.Module, step: Callable[[nn.Module], torch.Tensor]) -> nn.Module:
    """Return `torch.compile` of a model where a whole step works with it, else the model, with a warning that says why.

    Parameters
    ----------
    step
        Given the compiled model, returns a loss to run backward from; tried once. Gradients it leaves are removed.
    """
    try:
        compiled = torch.compile(model, dynamic=False)
        step(compiled).backward()
        return compiled
    except torch.OutOfMemoryError:
        raise  # no fault of the compiler's
    except Exception as error:
        # Compilers fail in many ways: no C++ compiler, an unsupported card, a graph they cannot take.
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        warnings.warn(
            f"torch.compile did not work here ({type(error).__name__}: {first[:200]}); training goes on without it",
            stacklevel=3,
        )
        torch._dynamo.reset()
        return model
    finally:
        model.zero_grad(set_to_none=True)

"""Save memory and time in training: frozen weights in 16 bits, recomputed blocks, torch.compile."""

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
    """Cast the frozen weights of linear and convolution layers to `dtype`, and restore them on exit.

    Autocast casts these weights at every use and saves each copy for the backward pass. In the compute dtype they take
    half the memory, are never copied, and give the same products. The originals are stored in CPU memory.
    """
    originals = [
        (p, p.data.cpu(), p.device)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        for p in module.parameters(recurse=False)
        if not p.requires_grad and p.dtype != dtype
    ]
    try:
        for p, _, _ in originals:
            p.data = p.data.to(dtype)
        yield
    finally:
        for p, data, device in originals:
            p.data = data.to(device)


@contextlib.contextmanager
def checkpoint_blocks(model: nn.Module) -> Iterator[None]:
    """Store only the input of each transformer block, and recompute the block in the backward pass.

    Memory falls to about one block's activations. A step takes one more forward pass, with the same gradients.

    Raises
    ------
    ValueError
        For a model without ``blocks``.
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
    """Return a compiled model if a training step works with it; else warn and return the model.

    Parameters
    ----------
    step
        Function from the compiled model to a loss, tried once. Gradients are cleared afterwards.
    """
    try:
        compiled = torch.compile(model, dynamic=False)
        step(compiled).backward()
        return compiled
    except torch.OutOfMemoryError:
        raise  # not a compiler error
    except Exception as error:
        # Many causes: no C++ compiler, an unsupported GPU, an unsupported graph.
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        warnings.warn(
            f"torch.compile failed ({type(error).__name__}: {first[:200]}); training continues without it", stacklevel=4
        )
        torch._dynamo.reset()
        return model
    finally:
        model.zero_grad(set_to_none=True)

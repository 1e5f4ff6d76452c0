"""Stop a training whose adapters get no gradient in its first steps."""

from __future__ import annotations

import torch
from torch import nn

CHECKED_STEPS = 3  # steps


class GradientCheck:
    """Check that every adapted layer gets a gradient in the first steps of a training.

    At least one adapter parameter of each layer must have a finite, non-zero gradient within `CHECKED_STEPS` steps.
    Checking stops once all layers had one.

    Parameters
    ----------
    model
        `TransferModel` with an adapted backbone.
    scaled
        Whether a `GradScaler` skips steps with non-finite gradients. Skipped steps do not count.
    """

    def __init__(self, model: nn.Module, *, scaled: bool):
        self.adapter, self._scaled, self.steps = model.backbone.adapter, scaled, 0
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._missing = {name: self._checked(model.backbone.get_submodule(name)) for name in self.adapter.layers}
        self._head_has_gradient = False  # of projector or classifier, which no network can bypass
        adapters = {id(p) for p in model.backbone.parameters()}
        self._head_params = [p for p in self._params if id(p) not in adapters]

    def _checked(self, layer: nn.Module) -> list[nn.Parameter]:
        # AdaLoRA's regularizer gives A and B a gradient even where the layer is not used; E has one only if it is.
        only = "lora_E" if self.adapter.method == "adalora" else ""
        return [p for name, p in layer.named_parameters() if p.requires_grad and only in name]

    def check_step(self) -> None:
        """Check the gradients of the next optimizer step, summed over micro-batches and processes.

        Raises
        ------
        ValueError
            After `CHECKED_STEPS` steps, if layers had no gradient.
        """
        if not self._missing:
            return
        device = self._params[0].device
        finite = _any([~torch.isfinite(p.grad).all() for p in self._params if p.grad is not None], device).logical_not()
        trained = [_any([_nonzero(p.grad) for p in ps if p.grad is not None], device) for ps in self._missing.values()]
        head = _any([_nonzero(p.grad) for p in self._head_params if p.grad is not None], device)
        finite, head, *trained = torch.stack([finite, head, *trained]).tolist()  # synchronize once
        if self._scaled and not finite:
            return
        self.steps += 1
        self._head_has_gradient |= head
        self._missing = {name: ps for (name, ps), ok in zip(self._missing.items(), trained, strict=True) if not ok}
        if self.steps == CHECKED_STEPS:
            self.check_all()

    def check_all(self) -> None:
        """Raise a ValueError naming the layers without a gradient so far, if a step was counted."""
        if not self._missing or not self.steps:
            return
        names, method = list(self._missing), self.adapter.method
        steps = f"the first {self.steps} steps" if self.steps > 1 else "the only step"
        if not self._head_has_gradient and len(names) == len(self.adapter.layers):
            raise ValueError(
                f"the loss had no gradient in {steps}, neither for the adapters nor for projector and classifier; set "
                "kd_weight or ce_weight above 0, and use more than one label"
            )
        shown = ", ".join(names[:4]) + (f", ... ({len(names)} layers)" if len(names) > 4 else "")
        cause, fix = "the network does not use the layer's output", ""
        if method != "bone":
            cause = f"the network reads the layer's weight directly, without the adapter, or {cause[12:]}"
            fix = ", or use method 'bone', which also adapts a weight that is read directly"
        raise ValueError(
            f"{method} does not train {shown}: no parameter of the adapter had a gradient in {steps}; {cause}; adapt "
            f"the layers {'proj' if names[0].endswith('qkv') else 'qkv'!r}{fix}"
        )


def _nonzero(grad: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(grad).all() & grad.any()


def _any(flags: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.stack(flags).any() if flags else torch.tensor(False, device=device)

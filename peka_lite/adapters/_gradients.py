"""Adapters that no gradient reaches learn nothing: seen in the first steps of a training, and refused."""

from __future__ import annotations

import torch
from torch import nn

JUDGED_AFTER = 3  # steps


class GradientCheck:
    """Look at the gradients of a training's first steps for adapted layers that would learn nothing.

    Of every adapted layer at least one adapter parameter must have had a finite, non-zero gradient within
    `JUDGED_AFTER` steps. Once all have, nothing is looked at any more.

    Parameters
    ----------
    model
        `TransferModel` whose backbone `adapt` has adapted.
    scaled
        Whether a `GradScaler` leaves out the steps whose gradients are not finite: those do not count.
    """

    def __init__(self, model: nn.Module, *, scaled: bool):
        self.adapter, self._scaled, self.steps = model.backbone.adapter, scaled, 0
        self._learn = [p for p in model.parameters() if p.requires_grad]
        self._silent = {name: self._judged(model.backbone.get_submodule(name)) for name in self.adapter.layers}
        self._elsewhere = False  # whether projector or classifier, which nothing can bypass, had a gradient
        adapters = {id(p) for p in model.backbone.parameters()}
        self._others = [p for p in self._learn if id(p) not in adapters]

    def _judged(self, layer: nn.Module) -> list[nn.Parameter]:
        # AdaLoRA's regularizer gives A and B a gradient whether or not the layer is used; E has one only through it.
        only = "lora_E" if self.adapter.method == "adalora" else ""
        return [p for name, p in layer.named_parameters() if p.requires_grad and only in name]

    def look(self) -> None:
        """Look at the gradients of the step that is about to be taken, summed over pieces and processes.

        Raises
        ------
        ValueError
            Where that is the last of `JUDGED_AFTER` steps and layers have had no gradient.
        """
        if not self._silent:
            return
        device = self._learn[0].device
        finite = _any([~torch.isfinite(p.grad).all() for p in self._learn if p.grad is not None], device).logical_not()
        alive = [_any([_moves(p.grad) for p in ps if p.grad is not None], device) for ps in self._silent.values()]
        others = _any([_moves(p.grad) for p in self._others if p.grad is not None], device)
        finite, elsewhere, *alive = torch.stack([finite, others, *alive]).tolist()  # one wait for the device
        if self._scaled and not finite:
            return
        self.steps += 1
        self._elsewhere |= elsewhere
        self._silent = {name: ps for (name, ps), moves in zip(self._silent.items(), alive, strict=True) if not moves}
        if self.steps == JUDGED_AFTER:
            self.judge()

    def judge(self) -> None:
        """Raise a ValueError that names the layers without a gradient so far, if there are any and a step counted."""
        if not self._silent or not self.steps:
            return
        names, method = list(self._silent), self.adapter.method
        steps = f"the first {self.steps} steps" if self.steps > 1 else "the only step"
        if not self._elsewhere and len(names) == len(self.adapter.layers):
            raise ValueError(
                f"the loss had no gradient in {steps}, for the projector and the classifier as little as for the "
                "adapters; training needs a kd_weight or ce_weight above 0, and more than one label"
            )
        shown = ", ".join(names[:4]) + (f", ... ({len(names)} layers)" if len(names) > 4 else "")
        why, fix = "the network does not use what the layer gives", ""
        if method != "bone":
            why = f"the network reads the layer's weight itself, past the adapter, or {why[12:]}"
            fix = ", or use method 'bone', which acts where a weight is read"
        raise ValueError(
            f"{method} learns nothing in {shown}: no parameter of the adapter had a gradient in {steps}; {why}; adapt "
            f"the layers {'proj' if names[0].endswith('qkv') else 'qkv'!r}{fix}"
        )


def _moves(grad: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(grad).all() & grad.any()


def _any(answers: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.stack(answers).any() if answers else torch.tensor(False, device=device)

"""What the modules of the losses share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LossModule"]


class LossModule(nn.Module):
    """No parameters, an empty state_dict. A weight that is a tensor goes to the module's device, in its own dtype."""

    WEIGHTS: tuple[str, ...] = ()  # the attributes that are numbers, 0-d tensors or parameters

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> LossModule:
        cast("Any", super())._apply(fn, *args, **kwargs)
        for name in self.WEIGHTS:
            weight = getattr(self, name)
            if isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter):
                setattr(self, name, weight.to(fn(weight).device))
        return self

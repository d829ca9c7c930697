"""What the modules share."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LossModule", "OfGroup"]


class OfGroup(nn.Module):
    """A module whose copies have the same process group. An average of the weights copies the whole model.

    Of a subclass __getstate__ and __setstate__ count, as they do for any other module.
    """

    process_group: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> OfGroup:
        copied: Any = type(self).__new__(type(self))
        memo |= {id(self): copied, id(self.process_group): self.process_group}
        copied.__setstate__(copy.deepcopy(self.__reduce_ex__(2)[2], memo))
        return cast("OfGroup", copied)


class LossModule(OfGroup):
    """No parameters, an empty state_dict. A weight that is a tensor goes to the module's device, in its own dtype."""

    WEIGHTS: tuple[str, ...] = ()  # the attributes that are numbers, 0-d tensors or parameters

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> LossModule:
        cast("Any", super())._apply(fn, *args, **kwargs)
        for name in self.WEIGHTS:
            weight = getattr(self, name)
            if isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter):
                setattr(self, name, weight.to(fn(weight).device))
        return self

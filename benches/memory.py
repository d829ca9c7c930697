"""Peak working memory of one step: what it allocates beyond its inputs and the gradients that it returns.

PyTorch's allocator tells its profiler of every block that it gives out and takes back. So the buffers inside its
kernels count, and those of code that ``torch.compile`` generated; the scratch of the libraries behind it, MKL and
oneDNN, does not.

Byte model, float32: the dual holds at most 5·N·D + 3·N² elements, the textbook formula about 4·D².
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from torch.profiler import ProfilerActivity, profile

from workload import Answer, step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from baselines import Contender

    Results = TypeVar("Results", bound=tuple[Tensor, ...])


def watched_step(contender: Contender, z1: Tensor, z2: Tensor) -> tuple[Answer, int]:
    """A step's answer, and the peak bytes alive at once in it, without inputs and returned gradients.

    A compiled contender must have run before: its compiler allocates too.
    """
    return watched(lambda: step(contender, z1, z2))


def watched(run: Callable[[], Results]) -> tuple[Results, int]:
    """What ``run`` returns, tensors, and the peak bytes alive at once in it, without these."""
    answer, changes = _watched(run)
    results = {tensor.data_ptr() for tensor in answer}
    born = {address: i for i, (_, address, size) in enumerate(changes) if size > 0 and address in results}
    live = peak = 0
    for i, (_, address, size) in enumerate(changes):
        if born.get(address) != i:
            live += size
            peak = max(peak, live)
    return answer, peak


def _watched(run: Callable[[], Results]) -> tuple[Results, list[tuple[int, int, int]]]:
    """What it returns; (time, address, bytes) of every block given out (+) or taken back (−) meanwhile, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        answer = run()
    tree: Any = profiler.profiler
    return answer, sorted(_changes(tree.kineto_results.experimental_event_tree()))


def _changes(events: Any) -> Iterator[tuple[int, int, int]]:
    pending = list(events)
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag.name == "Allocation":
            block = event.typed[1]
            yield event.start_time_ns, block.ptr, block.alloc_size

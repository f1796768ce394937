"""PyTorch: batches as tensors over the memory that they were received into, a dataset for ``DataLoader``, weights.

::

    replay = client.replay("pong", schema, empty=pinned_empty)
    async for batch in Tensors(await replay.epoch(), device="cuda"):
        train(batch["state"])
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aionpredis import blocking
from aionpredis.errors import EncodeError, UsageError
from aionpredis.formats.npy import ml_dtype
from aionpredis.frameworks import extra
from aionpredis.memory import aligned_empty
from aionpredis.replay.sampler import Sample

with extra("torch"):
    import torch
    from torch import Tensor
    from torch.utils.data import IterableDataset, get_worker_info

if TYPE_CHECKING:
    from aionpredis.replay.index import Ids

__all__ = ["ReplayDataset", "TensorSample", "Tensors", "as_arrays", "as_tensors", "pinned_empty"]

Arrays = Mapping[str, NDArray[Any]]


class TensorSample(dict[str, Tensor]):
    """A :class:`~aionpredis.Sample` as tensors. ``ids``: as there, for ``update_priorities``; ``weights``: a tensor."""

    def __init__(self, tensors: Mapping[str, Tensor], ids: Ids, weights: Tensor) -> None:
        super().__init__(tensors)
        self.ids = ids
        self.weights = weights

    def __reduce__(self) -> tuple[Any, ...]:
        """From a worker of a ``DataLoader``: a dict's own way would call the class without arguments."""
        return TensorSample, (dict(self), self.ids, self.weights)


def as_tensors(batch: Arrays) -> dict[str, Tensor]:
    """Tensors of the same names over the same memory, of which nothing is copied; a :class:`TensorSample` of a sample.

    A batch's memory is not used again as long as a tensor that lies in it lives. bfloat16 and float8 are torch's own.

    Raises:
        UsageError: torch has no such dtype.
    """
    tensors = {name: _as_tensor(name, array) for name, array in batch.items()}
    if isinstance(batch, Sample):
        return TensorSample(tensors, batch.ids, torch.from_numpy(batch.weights))
    return tensors


def _as_tensor(name: str, array: NDArray[Any]) -> Tensor:
    kind = array.dtype
    # bfloat16 and float8: of ml_dtypes, or a structure with a field of that name where it is not installed
    dtype = getattr(torch, kind.names[0] if kind.names else kind.name, None)
    if not isinstance(dtype, torch.dtype) or dtype.itemsize != kind.itemsize or not kind.isnative:
        raise UsageError(f"{name!r}: torch has no dtype like {kind}")
    if kind.isbuiltin == 1:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(f"u{kind.itemsize}")).view(dtype)


def as_arrays(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Arrays of the same names over the same memory: ``policy.publish(as_arrays(module.state_dict()))``. And back:
    ``module.load_state_dict(as_tensors(version.weights))``.

    Raises:
        EncodeError: a tensor is not in the CPU's memory, or NumPy cannot show it (sparse, quantized).
    """
    return {name: _as_array(name, tensor) for name, tensor in tensors.items()}


def _as_array(name: str, tensor: Tensor) -> NDArray[Any]:
    if not isinstance(tensor, Tensor):
        raise EncodeError(f"{name!r} is no tensor, but {type(tensor).__qualname__}")
    if tensor.device.type != "cpu":
        raise EncodeError(f"{name!r} is on {tensor.device}: pass {name!r}.cpu(), or a state_dict of module.cpu()")
    tensor = tensor.detach()
    ml_name = str(tensor.dtype).removeprefix("torch.")
    try:
        if ml_name.startswith(("bfloat16", "float8_")):
            carrier = tensor.view(torch.uint16 if tensor.itemsize == 2 else torch.uint8).numpy()
            array: NDArray[Any] = carrier.view(ml_dtype(ml_name, carrier.dtype))
        else:
            array = tensor.numpy()
    except (TypeError, RuntimeError) as error:
        raise EncodeError(f"{name!r}: {error}") from error
    return array


def pinned_empty(nbytes: int) -> NDArray[np.uint8]:
    """Page-locked memory, from which CUDA copies while the program goes on: ``client.replay(name, schema,
    empty=pinned_empty)``. Where CUDA is not available, ordinary memory.
    """
    if not torch.cuda.is_available():
        return aligned_empty(nbytes)
    memory: NDArray[np.uint8] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
    return memory


class Tensors:
    """The batches of any reader or sampler, as tensors: ``async for`` over one of :mod:`aionpredis`, ``for`` over one of
    :mod:`aionpredis.blocking`.

    Without ``device`` they share the memory of the batch. With one they are copied to it, on its current stream; from
    pinned memory without waiting, see :func:`pinned_empty`. In a :class:`~aionpredis.Loader` the next batches travel
    while this one is trained on.
    """

    def __init__(self, batches: Any, *, device: str | torch.device | None = None) -> None:
        self._batches = batches
        self._device = None if device is None else torch.device(device)

    def __aiter__(self) -> AsyncIterator[dict[str, Tensor]]:
        return self

    async def __anext__(self) -> dict[str, Tensor]:
        return self._take(await anext(self._batches))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(self._take, self._batches)

    def _take(self, batch: Arrays) -> dict[str, Tensor]:
        tensors = as_tensors(batch)
        if self._device is None:
            return tensors
        _let_go()
        # Metal would still read memory that is released (pytorch/pytorch#189690).
        later = self._device.type == "cuda"
        moved = {name: tensor.to(self._device, non_blocking=later) for name, tensor in tensors.items()}
        if isinstance(tensors, TensorSample):
            moved = TensorSample(moved, tensors.ids, tensors.weights.to(self._device))
        if (event := _mark(self._device)) is not None:
            _travelling.append((event, tensors))
        return moved


_travelling: deque[tuple[Any, Mapping[str, Tensor]]] = deque()
"""What is held until it is copied: memory that nobody refers to is received into again. A :class:`Tensors` may be gone
before its last batches are.
"""

_letting_go = threading.Lock()


def _let_go() -> None:
    """Hold no more what is copied by now, in whichever thread."""
    with _letting_go:
        while _travelling and _travelling[0][0].query():
            _travelling.popleft()


def _mark(device: torch.device) -> Any:
    """An event that happens when what was asked of the device's current stream so far is done; ``None`` if that is waited for
    anyway.
    """
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


class ReplayDataset(IterableDataset):
    """What ``read`` reads, as tensors, for torch's ``DataLoader``. Each of its workers connects by itself::

        def read(client, shard):
            return client.replay("pong", schema).epoch(batch=256, shard=shard)


        dataset = ReplayDataset("redis://trainer", read)
        for batch in DataLoader(dataset, batch_size=None, num_workers=4):  # batches are made by the replay
            train(batch["state"], batch["action"])

    ``read``: gets a client of :mod:`aionpredis.blocking` and the worker's ``(i, n)``, and returns any reader or sampler;
    with ``shard=`` each chunk goes to one of the workers. A function of a module, unless workers are forked. If runs may
    begin meanwhile, have it read the run with a certain number: the newest may be another one for each worker.
    ``shard``: this process among those that read together, such as ``(rank, world_size)``; its workers share what is its.
    ``options``: for :func:`aionpredis.blocking.connect`.
    """

    def __init__(
        self,
        url: str,
        read: Callable[[blocking.Client, tuple[int, int]], Iterable[Arrays]],
        *,
        shard: tuple[int, int] = (0, 1),
        **options: Any,
    ) -> None:
        super().__init__()
        self._url = url
        self._read = read
        self._shard = shard
        self._options = options

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        index, learners = self._shard
        with blocking.connect(self._url, **self._options) as client:
            yield from Tensors(self._read(client, (index * workers + number, learners * workers)))

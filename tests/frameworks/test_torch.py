"""torch: tensors over the memory of batches, datasets for its loader, weights there and back."""

from __future__ import annotations

import pickle
from collections import deque
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import aionpredis
from aionpredis import EncodeError, Loader, Prioritized, Replay, Schema, UsageError, blocking

from ..replays import SCHEMA, fill, replay_of

torch: Any = pytest.importorskip("torch", reason="torch is not installed")

from torch.utils.data import DataLoader  # noqa: E402

from aionpredis.frameworks import torch as frameworks  # noqa: E402
from aionpredis.frameworks.torch import ReplayDataset, Tensors, TensorSample, as_arrays, as_tensors, pinned_empty  # noqa: E402
from aionpredis.memory import REFERENCES_ARE_COUNTED, aligned_empty  # noqa: E402

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.one_server("what is received is the same"),
    pytest.mark.one_loop("nor does the loop matter"),
]


def place(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def check(tensors: dict[str, Any]) -> None:
    """The columns belong together."""
    uid = tensors["uid"]
    assert (tensors["state"] == (uid % 256)[:, None]).all()
    assert (tensors["terminated"] == (uid % 10 == 9)).all()


async def filled(replay: Replay, count: int) -> None:
    await replay.begin_run()
    async with replay.actor() as actor:
        await actor.join()
        await fill(actor, range(count))


# Batches


def test_tensors_share_the_memory_of_the_batch() -> None:
    batch: dict[str, NDArray[Any]] = {
        "state": np.arange(12, dtype=np.uint8).reshape(4, 3),
        "reward": np.ones(4, np.float32),
    }
    tensors = as_tensors(batch)
    assert list(tensors) == ["state", "reward"]
    for name, tensor in tensors.items():
        assert tensor.data_ptr() == place(batch[name])
        assert tensor.shape == batch[name].shape
    tensors["reward"][2] = 7
    assert batch["reward"].tolist() == [1, 1, 7, 1]


DTYPES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
DTYPES += ["float16", "float32", "float64", "complex64"]
ML_DTYPES = ["bfloat16", "float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("name", [*DTYPES, *ML_DTYPES])
@pytest.mark.parametrize("shape", [(), (3, 2), (0, 4)])
def test_every_dtype_is_torchs_own_and_back_without_a_copy(name: str, shape: tuple[int, ...]) -> None:
    dtype = np.dtype(getattr(pytest.importorskip("ml_dtypes"), name) if name in ML_DTYPES else name)
    array = np.ones(shape, dtype)
    tensor = as_tensors({"x": array})["x"]
    assert tensor.dtype is getattr(torch, name)
    assert tensor.shape == shape
    assert (tensor.to(torch.complex64) == 1).all()
    back = as_arrays({"x": tensor})["x"]
    assert (back.dtype, back.shape) == (dtype, shape)
    if array.size:
        assert tensor.data_ptr() == place(array) == place(back)


def test_bfloat16_that_was_read_without_ml_dtypes_is_torchs_own() -> None:
    array = np.array([0x3F80], np.uint16).view([("bfloat16", "<u2")])
    assert as_tensors({"x": array})["x"].tolist() == [1.0]
    assert as_tensors({"x": array})["x"].dtype is torch.bfloat16


@pytest.mark.parametrize("name", ["float8_e3m4", "longdouble", ">i4", "U3"])
def test_dtype_that_torch_does_not_have_is_named(name: str) -> None:
    dtype = np.dtype(getattr(pytest.importorskip("ml_dtypes"), name) if name.startswith("float8") else name)
    with pytest.raises(UsageError, match=f"'x': torch has no dtype like {dtype}"):
        as_tensors({"x": np.zeros(2, dtype)})


async def test_batches_come_as_tensors_over_the_memory_they_were_received_into(url: str) -> None:
    places = []

    def empty(nbytes: int) -> NDArray[np.uint8]:
        memory = aligned_empty(nbytes)
        places.append(place(memory))
        return memory

    async with aionpredis.connect(url) as client:
        replay = client.replay("r", SCHEMA, chunk=4, empty=empty)
        await filled(replay, 100)
        async with Loader(Tensors(await replay.epoch(batch=20))) as loader:
            batches = [tensors async for tensors in loader]
    assert [len(tensors["uid"]) for tensors in batches] == [20] * 5
    assert {tensor.data_ptr() for tensors in batches for tensor in tensors.values()} <= set(places)
    assert sorted(uid for tensors in batches for uid in tensors["uid"].tolist()) == list(range(100))
    for tensors in batches:
        check(tensors)


@pytest.mark.skipif(not REFERENCES_ARE_COUNTED, reason="nothing is recycled where references are not counted")
async def test_memory_is_used_again_when_its_tensor_is_gone_and_not_before(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        await filled(replay, 200)
        samples = Tensors(await replay.sampler(batch=10))
        first = await anext(samples)
        kept, expected = first["state"][3:], first["state"][3:].clone()
        del first
        places = set()
        for _ in range(50):
            places.add((await anext(samples))["state"].data_ptr())
        assert torch.equal(kept, expected)
        assert kept.data_ptr() - 9 not in places
        assert len(places) < 5


async def test_samples_keep_what_priorities_need(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        await filled(replay, 40)
        sampler = await replay.sampler(batch=8, selection=Prioritized())
        while True:
            sample = await anext(Tensors(sampler))
            assert isinstance(sample, TensorSample)
            check(sample)
            assert sample.weights.shape == (8,)
            errors = sample["uid"] + 1.0
            sampler.update_priorities(sample.ids, errors * (sample["uid"] == 17))
            if 17 in sample["uid"]:
                break
        for number in range(40):
            sampler.update_priorities(np.array([number]), np.array([float(number == sample.ids[0])]))
        assert set((await anext(Tensors(sampler)))["uid"].tolist()) == {int(sample["uid"][0])}


# Without async


async def fill_replay(url: str, count: int) -> None:
    async with aionpredis.connect(url) as client:
        await filled(replay_of(client), count)


def read_epoch(client: blocking.Client, shard: tuple[int, int]) -> Any:
    return client.replay("r", SCHEMA, chunk=4).epoch(batch=32, shard=shard)


def read_first_run(client: blocking.Client, shard: tuple[int, int]) -> Any:
    replay = client.replay("r", SCHEMA, chunk=4)
    run = replay.latest_run()
    assert run is not None
    return replay.follow(run.run - 1, batch=32, shard=shard)


def read_samples(client: blocking.Client, shard: tuple[int, int]) -> Any:
    return client.replay("r", SCHEMA, chunk=4).sampler(batch=16, shard=shard)


def loader_of(url: str, read: Any, workers: int, **options: Any) -> Any:
    """Its workers are forked. Where they are spawned the dataset is pickled, which it is here in any case."""
    dataset = pickle.loads(pickle.dumps(ReplayDataset(url, read, **options)))
    return DataLoader(
        dataset, batch_size=None, num_workers=workers, multiprocessing_context="fork" if workers else None
    )


FORKS = pytest.mark.filterwarnings(
    "ignore:.*multi-threaded, use of fork:DeprecationWarning",  # by Python 3.12, of any fork beside a thread
    "ignore:This DataLoader will create:UserWarning",  # where there is one core
)


@pytest.mark.parametrize("workers", [0, 2])
@FORKS
async def test_each_transition_comes_once_over_all_workers_of_a_loader(url: str, workers: int) -> None:
    await fill_replay(url, 1000)
    seen: list[int] = []
    for tensors in loader_of(url, read_epoch, workers):
        check(tensors)
        seen += tensors["uid"].tolist()
    assert sorted(seen) == list(range(1000))


@FORKS
async def test_a_run_is_followed_to_its_end_by_the_workers_of_two_processes(url: str) -> None:
    await fill_replay(url, 500)
    async with aionpredis.connect(url) as client:
        await replay_of(client).begin_run(keep=2)
    seen = []
    for rank in range(2):
        mine = [uid for tensors in loader_of(url, read_first_run, 2, shard=(rank, 2)) for uid in tensors["uid"]]
        assert len(mine) > 100
        seen += mine
    assert sorted(seen) == list(range(500))


@FORKS
async def test_loader_of_samples_can_be_left(url: str) -> None:
    await fill_replay(url, 500)
    loader = iter(loader_of(url, read_samples, 2))
    uids = set()
    for _ in range(20):
        sample = next(loader)
        check(sample)
        assert sample.weights.shape == sample.ids.shape == (16,)
        uids |= set(sample["uid"].tolist())
    assert len(uids) > 200
    del loader


@FORKS
@pytest.mark.parametrize(("workers", "error"), [(0, aionpredis.ReplayGone), (1, RuntimeError)])
async def test_an_error_of_a_worker_is_raised(url: str, workers: int, error: type[Exception]) -> None:
    """By torch as a RuntimeError, with the text."""
    with pytest.raises(error, match="no run of 'r' was begun"):
        next(iter(loader_of(url, read_epoch, workers)))


async def test_batches_of_blocking_readers_come_as_tensors(url: str) -> None:
    await fill_replay(url, 100)
    with blocking.connect(url) as client:
        replay = client.replay("r", SCHEMA, chunk=4)
        batches = list(Tensors(replay.epoch(batch=10)))
        sample = next(iter(Tensors(replay.sampler(batch=10))))
    assert sorted(uid for tensors in batches for uid in tensors["uid"].tolist()) == list(range(100))
    for tensors in [*batches, sample]:
        check(tensors)
    assert isinstance(sample, TensorSample)


# Devices


class Event:
    done = False

    def query(self) -> bool:
        return self.done


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Stand-ins for those that copies wait for, in order; that CUDA's are asked for is tested where there is CUDA."""
    events: list[Event] = []

    def mark(device: Any) -> Event:
        events.append(Event())
        return events[-1]

    monkeypatch.setattr(frameworks, "_mark", mark)
    monkeypatch.setattr(frameworks, "_travelling", deque())
    return events


@pytest.mark.skipif(not REFERENCES_ARE_COUNTED, reason="nothing is recycled where references are not counted")
@pytest.mark.parametrize("gone", [False, True], ids=["there", "gone"])
async def test_memory_is_held_until_it_is_copied_to_the_device(url: str, events: list[Event], gone: bool) -> None:
    """Also if the ``Tensors`` that had it copied is gone, as it is behind a loop over it."""
    places: list[int] = []

    def empty(nbytes: int) -> NDArray[np.uint8]:
        places.append(nbytes)
        return aligned_empty(nbytes)

    async with aionpredis.connect(url) as client:
        replay = client.replay("r", Schema(state=("uint8", (3,))), chunk=1, empty=empty)
        await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            for _ in range(60):
                await actor.append(state=np.zeros(3, np.uint8))
        sampler = await replay.sampler(batch=10)
        tensors = Tensors(sampler, device="meta")
        for number in range(1, 6):
            moved = await anext(tensors)
            assert moved["state"].device.type == "meta"
            assert len(places) == number  # nothing is copied yet
            if gone:
                tensors = Tensors(sampler, device="meta")
        for event in events:
            event.done = True
        for _ in range(10):
            await anext(tensors)
            events[-1].done = True
        assert len(places) <= 6


class Copies(torch.overrides.TorchFunctionMode):
    """Stands in for devices: which copies to one are not waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.later: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.to:
            return func(*args, **(kwargs or {}))
        self.later.append(kwargs["non_blocking"])
        return args[0]


@pytest.mark.parametrize(("device", "later"), [("cuda", True), ("mps", False)])
def test_only_copies_to_cuda_are_not_waited_for(device: str, later: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """For no other device is there an event to hold memory by until it is copied."""
    monkeypatch.setattr(frameworks, "_mark", lambda device: None)
    with Copies() as copies:
        next(iter(Tensors(iter([{"x": np.zeros(3)}]), device=device)))
    assert copies.later == [later]


def test_pinned_memory_is_ordinary_memory_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    memory = pinned_empty(1000)
    assert memory.shape == (1000,)
    assert memory.dtype == np.uint8
    memory[:] = 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
async def test_pinned_memory_travels_to_cuda_whole(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = client.replay("r", SCHEMA, chunk=4, empty=pinned_empty)
        await filled(replay, 2000)
        batch = await anext(await replay.epoch(batch=100))
        assert all(tensor.is_pinned() for tensor in as_tensors(batch).values())
        seen = []
        async for tensors in Tensors(await replay.epoch(batch=100), device="cuda"):
            assert tensors["state"].is_cuda
            check(tensors)
            seen += tensors["uid"].tolist()
        assert sorted(seen) == list(range(2000))


# Weights


def network() -> Any:
    """With parameters, buffers, and a scalar among them."""
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
async def test_state_dict_is_published_and_loaded(url: str, dtype: Any) -> None:
    if dtype is torch.bfloat16:
        pytest.importorskip("ml_dtypes")
    sender, receiver = network().to(dtype), network().to(dtype)
    async with aionpredis.connect(url) as client:
        policy = client.policy("p")
        await policy.publish(as_arrays(sender.state_dict()))
        version = await policy.latest()
    assert version is not None
    receiver.load_state_dict(as_tensors(version.weights))
    expected = sender.state_dict()
    assert len(expected) == len(version.weights) == 9
    for name, tensor in receiver.state_dict().items():
        assert tensor.dtype is expected[name].dtype
        assert torch.equal(tensor, expected[name])


async def test_state_dict_of_numpys_dtypes_is_published_as_it_is(url: str) -> None:
    async with aionpredis.connect(url) as client:
        policy = client.policy("p")
        await policy.publish(network().state_dict())
        version = await policy.latest()
    assert version is not None
    assert list(version.weights) == list(network().state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.zeros(2, device="meta"), r"'w' is on meta: pass 'w'\.cpu\(\)"),
        (lambda: torch.eye(2).to_sparse(), "'w': .*to_dense"),
        (lambda: np.zeros(2), "'w' is no tensor, but ndarray"),
    ],
)
def test_tensor_that_numpy_cannot_show_is_named(make: Any, message: str) -> None:
    with pytest.raises(EncodeError, match=message):
        as_arrays({"w": make()})

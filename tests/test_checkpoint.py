"""Checkpoints: a run becomes a folder of standard files, and the same run again on any server."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import struct
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import ml_dtypes
import numpy as np
import pytest
import redis
from safetensors.numpy import load as load_bytes
from safetensors.numpy import load_file

import aionpredis
from aionpredis import Client, CorruptValue, Replay, ReplayGone, Run, RunEnded, Schema, SchemaMismatch, UsageError
from aionpredis.errors import EncodeError, ServerFull
from aionpredis.formats import safetensors
from aionpredis.replay.checkpoint import files, load_extra, restoring, saving
from aionpredis.replay.log import LogReader

from .cancelling import Figures, Stepped
from .replays import LEASE, SCHEMA, data_keys, fill, kept_keys, kill_connections, replay_of, uids, unnamed_without_ttl
from .servers import until

anyio_test = pytest.mark.anyio

Chunk = tuple[bytes, int, int, bytes, bytes]


async def filled(client: Client, count: int, *, chunk: int = 4, flush_every: int = 10**9, name: str = "r") -> Run:
    """A run with the transitions 0 … count-1 of two actors; with ``flush_every`` it has partial chunks, too."""
    replay = replay_of(client, chunk=chunk, name=name)
    run = await replay.begin_run({"w": np.arange(5, dtype=np.float32)})
    for part in (range(count // 3), range(count // 3, count)):
        async with replay.actor() as actor:
            await actor.join()
            for uid in part:
                await fill(actor, range(uid, uid + 1))
                if uid % flush_every == flush_every - 1:
                    await actor.flush()
    return run


def chunks_of(stock: redis.Redis, run: int, name: str = "r") -> list[Chunk]:
    """In the order of the log: incarnation, seq, rows, episode ends, the file on the server."""
    entries: Any = stock.xrange(f"{{{name}}}:log", f"{run}-1", f"{run}-{2**64 - 1}")
    chunks: list[Chunk] = []
    for _, fields in entries:
        incarnation, seq, rows = struct.unpack_from("<8sII", fields[b"c"])
        value: Any = stock.get(f"{name}:{run}:{incarnation.hex()}:{seq}")
        chunks.append((incarnation, seq, rows, fields[b"c"][16:], value))
    return chunks


def renamed(chunks: list[Chunk]) -> list[Chunk]:
    """With 0, 1, … for the incarnations: a restored run has others."""
    names: dict[bytes, bytes] = {}
    return [(names.setdefault(chunk[0], b"%d" % len(names)), *chunk[1:]) for chunk in chunks]


def cancel_at(at: int, scope: anyio.CancelScope) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= at:
            scope.cancel()

    return progress


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@anyio_test
@pytest.mark.parametrize(
    ("count", "chunk", "flush_every", "bundle"),
    [(64, 4, 10**9, 64 << 20), (61, 4, 7, 64 << 20), (61, 16, 5, 300), (200, 1, 3, 1), (9, 4, 3, 100)],
)
async def test_restored_run_has_the_same_chunks_in_the_same_order(
    url: str,
    stock: redis.Redis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    chunk: int,
    flush_every: int,
    bundle: int,
) -> None:
    monkeypatch.setattr(saving, "BUNDLE_BYTES", bundle)
    async with aionpredis.connect(url) as client:
        old = await filled(client, count, chunk=chunk, flush_every=flush_every)
        before = chunks_of(stock, old.run)
        assert await replay_of(client).save(tmp_path / "saved") == count
        assert (len(list((tmp_path / "saved").glob("transitions-*"))) > 1) is (bundle < 1000)
        stock.flushall()
        replay = replay_of(client)
        run = await replay.restore(tmp_path / "saved")
        after = chunks_of(stock, run.run)
        assert [each[:4] for each in renamed(after)] == [each[:4] for each in renamed(before)]
        for restored, original in zip(after, before, strict=True):
            now, then = load_bytes(restored[4]), load_bytes(original[4])
            assert {name: (array.dtype, array.tolist()) for name, array in now.items()} == {
                name: (array.dtype, array.tolist()) for name, array in then.items()
            }
        assert await uids(await replay.epoch(shuffle=False)) == list(range(count))
        assert unnamed_without_ttl(stock) == set()
        assert all(stock.ttl(key) == -1 for key in data_keys(stock))


@anyio_test
async def test_a_replay_is_restored_under_another_name_beside_the_first(
    url: str, stock: redis.Redis, tmp_path: Path
) -> None:
    async with aionpredis.connect(url) as client:
        old = await filled(client, 30)
        await replay_of(client).save(tmp_path / "saved")
        run = await replay_of(client, name="other").restore(tmp_path / "saved")
        assert renamed(chunks_of(stock, run.run, "other")) == renamed(chunks_of(stock, old.run))
        assert await uids(await replay_of(client, name="other").epoch(shuffle=False)) == list(range(30))


@anyio_test
async def test_actors_that_wrote_the_checkpoint_and_live_go_on_in_the_restored_run(url: str, tmp_path: Path) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        await replay.begin_run()
        async with replay.actor() as early, replay.actor() as late:
            for number, actor in enumerate((early, late)):
                await actor.join()
                await fill(actor, range(100 * number, 100 * number + 12))
                await actor.flush()
            await replay.save(tmp_path / "saved")
            begun = anyio.Event()

            def progress(done: int, total: int) -> None:
                begun.set()

            async def join_early() -> None:  # while its chunks are restored
                await begun.wait()
                await early.join()
                await fill(early, range(1000, 1020))
                await early.flush()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(join_early)
                run = await replay.restore(tmp_path / "saved", progress=progress)
            await late.join()
            await fill(late, range(2000, 2020))
            await late.flush()
            assert (early.stats.acknowledged, late.stats.acknowledged) == (32, 32)
        restored, new = {*range(12), *range(100, 112)}, {*range(1000, 1020), *range(2000, 2020)}
        assert sorted(await uids(await replay.epoch(run))) == sorted(restored | new)
        # Nor do they continue the trajectories that were saved.
        sampler = await replay.sampler(run, batch=2000, length=2, seed=1)
        pairs = {(first, second) for first, second in (await sampler.sample())["uid"].tolist()}
        assert all((first in new) == (second in new) for first, second in pairs)


@anyio_test
async def test_weights_come_back_bit_by_bit(url: str, stock: redis.Redis, tmp_path: Path) -> None:
    weights: dict[str, Any] = {
        "b": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
        "z": np.zeros((0, 2), np.float16),
        "f": np.float64(3.5),
        "é": np.array([True, False]),
    }
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        for _ in range(3):
            await replay.policy.publish(weights)
        await filled(client, 5)
        await replay.policy.publish(weights)
        await replay.save(tmp_path / "saved")
        with (tmp_path / "saved" / "policy.safetensors").open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        assert header["__metadata__"]["version"] == "5"
        stock.flushall()
        run = await replay.restore(tmp_path / "saved")
        found = await replay.policy.latest()
        assert found is not None
        assert found.version == run.policy == 1
        assert list(found.weights) == list(weights)
        for name, array in weights.items():
            assert found.weights[name].dtype == array.dtype
            assert found.weights[name].shape == array.shape
            assert found.weights[name].tobytes() == array.tobytes()


@anyio_test
async def test_empty_run_without_a_policy(url: str, stock: redis.Redis, tmp_path: Path) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        await replay.begin_run()
        steps: list[tuple[int, int]] = []
        assert await replay.save(tmp_path / "saved", progress=lambda *step: steps.append(step)) == 0
        assert names_in(tmp_path / "saved") == ["replay.json"]
        stock.flushall()
        run = await replay.restore(tmp_path / "saved", progress=lambda *step: steps.append(step))
        assert steps == [(0, 0), (0, 0)]
        assert await replay.count(run) == run.policy == 0


@anyio_test
async def test_columns_without_bytes_of_bfloat16_and_scalars(url: str, stock: redis.Redis, tmp_path: Path) -> None:
    schema = Schema(nothing=("float32", (0,)), flag="bool", b=(ml_dtypes.bfloat16, (2, 1)), truncated="bool")
    async with aionpredis.connect(url) as client:
        replay = client.replay("r", schema, chunk=3)
        await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            for i in range(20):
                b = np.full((2, 1), i).astype(ml_dtypes.bfloat16)
                await actor.append(nothing=np.empty(0, np.float32), flag=i % 2 == 0, b=b, truncated=i == 9)
        assert await replay.save(tmp_path / "saved") == 20
        stock.flushall()
        await replay.restore(tmp_path / "saved")
        (batch,) = [batch async for batch in await replay.epoch(shuffle=False)]
        assert batch["nothing"].shape == (20, 0)
        assert batch["b"].dtype == ml_dtypes.bfloat16
        assert batch["b"][:, 1, 0].astype(int).tolist() == list(range(20))
        assert np.flatnonzero(batch["truncated"]).tolist() == [9]


@anyio_test
async def test_bfloat16_on_a_host_without_ml_dtypes_is_an_error_that_says_what_to_install(
    url: str, stock: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with aionpredis.connect(url) as client:
        replay = client.replay("r", Schema(b=(ml_dtypes.bfloat16, (2,))))
        await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            await actor.append(b=np.zeros(2, ml_dtypes.bfloat16))
        await replay.save(tmp_path / "saved")
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)
        safetensors._parsed.clear()
        try:
            with pytest.raises(EncodeError, match=r"'b' is of bfloat16 .* ml_dtypes: install"):
                await saving.save_any(client, "r", tmp_path / "other", None, None)
            with pytest.raises(EncodeError, match=r"'b' is of bfloat16 .* ml_dtypes: install"):
                await restoring.restore_any(client, tmp_path / "saved", "other", 1, None)
        finally:
            safetensors._parsed.clear()
        assert not (tmp_path / "other").exists()
        assert not stock.exists("{other}:log")


@anyio_test
async def test_columns_without_any_bytes(url: str, stock: redis.Redis, tmp_path: Path) -> None:
    async with aionpredis.connect(url) as client:
        replay = client.replay("r", Schema(nothing=("float32", (0,))), chunk=3)
        await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            for _ in range(7):
                await actor.append(nothing=np.empty(0, np.float32))
        assert await replay.save(tmp_path / "saved") == 7
        stock.flushall()
        assert await replay.count(await replay.restore(tmp_path / "saved")) == 7


@anyio_test
async def test_files_are_read_by_the_stock_library_and_json(url: str, tmp_path: Path) -> None:
    async with aionpredis.connect(url) as client:
        run = await filled(client, 50, flush_every=7)
        extra = {"priorities": {"alpha": np.float64(0.6), "values": np.arange(50.0)}}
        await replay_of(client).save(tmp_path / "saved", run, extra=extra)
    folder = tmp_path / "saved"
    columns = load_file(folder / "transitions-00000.safetensors")
    assert columns["uid"].tolist() == list(range(50))
    assert columns["state"].shape == (50, 3)
    assert columns["log.episode_end"].tolist() == columns["terminated"].tolist() == [i % 10 == 9 for i in range(50)]
    assert columns["log.rows"].sum() == 50
    assert len({bytes(incarnation) for incarnation in columns["log.incarnation"]}) == 2
    assert load_file(folder / "policy.safetensors")["w"].tolist() == [0, 1, 2, 3, 4]
    assert load_file(folder / "priorities.safetensors")["values"].tolist() == list(range(50))
    facts = json.loads((folder / "replay.json").read_text())
    assert facts["columns"]["state"] == {"dtype": "uint8", "shape": [3]}
    assert (facts["name"], facts["run"], facts["transitions"], facts["policy"]) == ("r", run.run, 50, 1)
    assert [bundle["bytes"] for bundle in facts["bundles"]] == [
        (folder / "transitions-00000.safetensors").stat().st_size
    ]


@anyio_test
async def test_extra_arrays_come_back(url: str, tmp_path: Path) -> None:
    async with aionpredis.connect(url) as client:
        await filled(client, 5)
        replay = replay_of(client)
        extra = {"priorities": {"values": np.arange(5.0), "one": np.float32(1)}, "b": {}}
        await replay.save(tmp_path / "saved", extra=extra)
        loaded = load_extra(tmp_path / "saved", "priorities")
        assert {name: array.tolist() for name, array in loaded.items()} == {"values": [0, 1, 2, 3, 4], "one": 1}
        assert load_extra(tmp_path / "saved", "b") == {}
        with pytest.raises(UsageError, match=r"c\.safetensors is missing"):
            load_extra(tmp_path / "saved", "c")
        for name in ("policy", "transitions-00000", "../x", ""):
            with pytest.raises(UsageError):
                await replay.save(tmp_path / "again", extra={name: {}})
        with pytest.raises(aionpredis.EncodeError):
            await replay.save(tmp_path / "again", extra={"x": {"o": np.array([None])}})
        assert names_in(tmp_path) == ["saved"]


@anyio_test
async def test_compressed_chunks_are_saved_decoded(url: str, stock: redis.Redis, tmp_path: Path) -> None:
    frame = pytest.importorskip("lz4.frame")
    async with aionpredis.connect(url) as client:
        await filled(client, 40)
        for key in data_keys(stock):
            value: Any = stock.get(key)
            stock.set(key, frame.compress(value, store_size=True))
        assert await replay_of(client).save(tmp_path / "saved") == 40
    assert load_file(tmp_path / "saved" / "transitions-00000.safetensors")["uid"].tolist() == list(range(40))


@anyio_test
async def test_chunks_that_are_gone_are_left_out_and_counted(
    url: str, stock: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with aionpredis.connect(url) as client:
        run = await filled(client, 39)
        chunks = chunks_of(stock, run.run)
        entries: Any = stock.xrange("{r}:log")
        read_all = LogReader.read_all

        async def then_delete(log: LogReader, found: Any) -> None:
            await read_all(log, found)
            for index in (0, 2, 5):
                incarnation, seq = chunks[index][:2]
                stock.delete(f"r:{run.run}:{incarnation.hex()}:{seq}")
            stock.xdel("{r}:log", entries[1][0], entries[3][0])

        monkeypatch.setattr(LogReader, "read_all", then_delete)
        steps: list[tuple[int, int]] = []
        with pytest.warns(RuntimeWarning, match="without it"):
            saved = await replay_of(client).save(tmp_path / "saved", progress=lambda *step: steps.append(step))
        monkeypatch.undo()
        assert saved == 39 - sum(chunks[index][2] for index in (0, 2, 5))
        assert steps[-1] == (39, 39)
        facts = json.loads((tmp_path / "saved" / "replay.json").read_text())
        assert (facts["evicted"], facts["missing"], facts["transitions"]) == (2, 1, saved)
        kept = [chunk for index, chunk in enumerate(chunks) if index not in (0, 2, 5)]
        restored = await replay_of(client, name="other").restore(tmp_path / "saved")
        assert renamed(chunks_of(stock, restored.run, "other")) == renamed(kept)


@anyio_test
async def test_older_run_is_saved_and_one_that_is_gone_is_not(url: str, tmp_path: Path) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        with pytest.raises(ReplayGone):
            await replay.save(tmp_path / "saved")
        old = await filled(client, 20)
        new = await replay.begin_run(keep=2)
        assert await replay.save(tmp_path / "old", old) == 20
        assert await replay.save(tmp_path / "new") == 0
        await replay.delete_runs_before(new)
        with pytest.raises(ReplayGone):
            await replay.save(tmp_path / "gone", old.run)
        with pytest.raises(SchemaMismatch):
            await client.replay("r", Schema(x="f4")).save(tmp_path / "gone")
        assert names_in(tmp_path) == ["new", "old"]


@anyio_test
async def test_existing_folder_is_never_touched(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with aionpredis.connect(url) as client:
        await filled(client, 5)
        replay = replay_of(client)
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").write_text("mine")
        (tmp_path / "link").symlink_to("nowhere")
        for name in ("folder", "file", "link"):
            with pytest.raises(UsageError, match="exists already"):
                await replay.save(tmp_path / name)
        with pytest.raises(UsageError, match="no such folder"):
            await replay.save(tmp_path / "no" / "such")

        with pytest.raises(UsageError, match="meanwhile"):
            await replay.save(tmp_path / "late", progress=lambda done, total: (tmp_path / "late").mkdir(exist_ok=True))
        assert names_in(tmp_path / "late") == []
        assert names_in(tmp_path) == ["file", "folder", "late", "link"]


@anyio_test
async def test_cancelled_or_failed_save_leaves_nothing(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "BUNDLE_BYTES", 500)

    class Stop(Exception):
        pass

    async with aionpredis.connect(url) as client:
        await filled(client, 400)
        replay = replay_of(client)
        for delay in (0, 0.0005, 0.002, 0.005):
            with anyio.move_on_after(delay) as scope:
                await replay.save(tmp_path / "saved")
            assert scope.cancelled_caught
            assert names_in(tmp_path) == []
        for at in (0, 100):
            with anyio.CancelScope() as scope:
                await replay.save(tmp_path / "saved", progress=cancel_at(at, scope))
            assert scope.cancelled_caught
            assert names_in(tmp_path) == []

        def fail(done: int, total: int) -> None:
            if done > 100:
                raise Stop

        with pytest.raises(Stop):
            await replay.save(tmp_path / "saved", progress=fail)
        assert names_in(tmp_path) == []
        assert await replay.save(tmp_path / "saved") == 400


def cancel_of(scope: anyio.CancelScope) -> Callable[[], object]:
    """What cancels this task: asyncio's own way, which knows nothing of anyio's shields, where there is one."""
    if anyio.get_cancelled_exc_class() is not asyncio.CancelledError:
        return scope.cancel
    task = asyncio.current_task()
    assert task is not None
    return task.cancel


async def cancelled_at(call: Awaitable[Any], step: int, times: int) -> tuple[bool, bool]:
    """Cancel a call when it suspends for the ``step``-th time, and as often again when it does so next; whether it came to
    that, and whether the call then ended by it.
    """
    with anyio.CancelScope() as scope:
        cancel, left = cancel_of(scope), times
        one = Stepped(call, Figures(), step)

        def cancel_again() -> None:
            nonlocal left
            cancel()
            left -= 1
            one.step = one.suspended + 1 if left else None

        one.cancel, one.wanted = cancel_again, lambda: left < times
        try:
            await one
        except asyncio.CancelledError:
            task = asyncio.current_task()
            while task is not None and task.cancelling():
                task.uncancel()
    return left < times, one.cancelled


@anyio_test
@pytest.mark.one_server("it is about files")
@pytest.mark.parametrize("times", [1, 2])
async def test_save_that_its_task_cancels_at_any_await_leaves_nothing(url: str, tmp_path: Path, times: int) -> None:
    async with aionpredis.connect(url) as client:
        await filled(client, 20)
        replay = replay_of(client)
        for step in itertools.count():
            folder = tmp_path / f"saved{step}"
            extra = {"more": {"x": np.ones(3)}}
            wanted, cancelled = await cancelled_at(replay.save(folder, extra=extra), step, times)
            if not wanted:
                break
            assert names_in(tmp_path) == ([] if cancelled else [folder.name])
            if not cancelled:  # trio's would have come at an await after the last one
                assert anyio.get_cancelled_exc_class() is not asyncio.CancelledError
                shutil.rmtree(folder)
        assert step > 10
        assert names_in(tmp_path) == [folder.name]


@anyio_test
@pytest.mark.one_server("it is about files")
@pytest.mark.parametrize(
    ("function", "name"),
    [
        ("make_beside", "saved"),
        ("_write", "policy.safetensors"),
        ("_write", "more.safetensors"),
        ("_write", "transitions-00000.safetensors"),
        ("_write", "replay.json"),
        ("_sync_folder", ""),  # it has its name already
    ],
)
async def test_cancelled_save_waits_until_its_thread_writes_nothing_more(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, name: str
) -> None:
    begun, go_on = anyio.Event(), threading.Event()
    original = getattr(files, function)

    def held(path: Path, *args: Any) -> Any:
        if path.name == name or path == tmp_path:
            anyio.from_thread.run_sync(begun.set)
            assert go_on.wait(30)
        return original(path, *args)

    monkeypatch.setattr(files, function, held)
    async with aionpredis.connect(url) as client:
        await filled(client, 20)
        replay = replay_of(client)
        ended = False
        cancels: list[Callable[[], object]] = []

        async def save() -> None:
            nonlocal ended
            with anyio.CancelScope() as scope:
                cancels.append(cancel_of(scope))
                try:
                    await replay.save(tmp_path / "saved", extra={"more": {"x": np.ones(3)}})
                    await anyio.lowlevel.checkpoint()
                finally:
                    ended = True

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(save)
                await begun.wait()
                for _ in range(3):
                    cancels[0]()
                    for _ in range(10):
                        await anyio.lowlevel.checkpoint()
                assert not ended
                go_on.set()
        finally:
            go_on.set()
        trio_named_it = anyio.get_cancelled_exc_class() is not asyncio.CancelledError
        at_the_end = name == "replay.json" or function == "_sync_folder"
        assert names_in(tmp_path) == (["saved"] if trio_named_it and at_the_end else [])


@anyio_test
async def test_full_disk_is_an_error_as_it_is(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "BUNDLE_BYTES", 500)
    write = files._write

    def full(path: Path, parts: Any) -> int:
        if path.name == "transitions-00003.safetensors":
            raise OSError(28, "No space left on device")
        return write(path, parts)

    monkeypatch.setattr(files, "_write", full)
    async with aionpredis.connect(url) as client:
        await filled(client, 200)
        with pytest.raises(OSError, match="No space left"):
            await replay_of(client).save(tmp_path / "saved")
        assert names_in(tmp_path) == []


@anyio_test
async def test_at_most_two_bundles_are_in_memory_and_the_loop_goes_on(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    class Counted(saving._Bundle):
        def __init__(self, schema: Schema, rows: int) -> None:
            nonlocal most
            super().__init__(schema, rows)
            alive.add(self)
            most = max(most, sum(bool(each.columns) for each in alive))

        def write(self, path: Path) -> int:
            before = ticks
            until(lambda: ticks > before + 10, "the loop goes on while a bundle is written")
            return super().write(path)

    monkeypatch.setattr(saving, "BUNDLE_BYTES", 1500)
    monkeypatch.setattr(saving, "_Bundle", Counted)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await anyio.sleep(0.005)
            ticks += 1

    async with aionpredis.connect(url) as client:
        await filled(client, 300)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tick)
            await replay_of(client).save(tmp_path / "saved")
            tasks.cancel_scope.cancel()
    files = len(list((tmp_path / "saved").glob("transitions-*")))
    assert files > 4
    assert most == 2


@anyio_test
@pytest.mark.parametrize("bundle", [64 << 20, 700])
async def test_progress_never_falls_and_ends_at_the_total(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: int
) -> None:
    monkeypatch.setattr(saving, "BUNDLE_BYTES", bundle)
    async with aionpredis.connect(url) as client:
        await filled(client, 301, flush_every=11)
        replay = replay_of(client)
        steps: list[tuple[int, int]] = []
        await replay.save(tmp_path / "saved", progress=lambda *step: steps.append(step))
        await replay.restore(tmp_path / "saved", progress=lambda *step: steps.append(step))
    middle = steps.index((0, 301), 1)
    for part in (steps[:middle], steps[middle:]):
        done = [step[0] for step in part]
        assert {step[1] for step in part} == {301}
        assert done == sorted(set(done))
        assert (done[0], done[-1]) == (0, 301)
        assert len(done) > 2 or bundle > 1000


@anyio_test
async def test_cancelled_restore_leaves_no_unnamed_key_after_one_lease(
    url: str, stock: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "BUNDLE_BYTES", 2000)
    async with aionpredis.connect(url) as client:
        await filled(client, 2000)
        replay = replay_of(client, name="other", lease=LEASE)
        await replay_of(client).save(tmp_path / "saved")
        for at in (1, 500, 1500):
            with anyio.CancelScope() as scope:
                await replay.restore(tmp_path / "saved", progress=cancel_at(at, scope))
            assert scope.cancelled_caught
            assert unnamed_without_ttl(stock, "other") == set()
            count = await replay.count()
            assert at <= count < 2000
            until(lambda: data_keys(stock, "other") == kept_keys(stock, "other"), "what was cancelled is gone")
            run = await replay.latest_run()
            assert run is not None
            named = {
                f"other:{run.run}:{chunk[0].hex()}:{chunk[1]}".encode() for chunk in chunks_of(stock, run.run, "other")
            }
            there = data_keys(stock, "other")
            assert there <= named
            assert len(named - there) <= restoring.MAX_TRAVELLING  # named, and cancelled before PERSIST


@anyio_test
async def test_broken_connections_lose_and_double_nothing(
    url: str, stock: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "BUNDLE_BYTES", 5000)
    async with aionpredis.connect(url) as client:
        old = await filled(client, 1000)
        calls = 0

        def kill(done: int, total: int) -> None:
            nonlocal calls
            calls += 1
            if calls % 7 == 0:
                kill_connections(stock)

        assert await replay_of(client).save(tmp_path / "saved", progress=kill) == 1000
        run = await replay_of(client, name="other").restore(tmp_path / "saved", progress=kill)
        assert calls > 14
        restored, original = (
            renamed(sorted(chunks, key=lambda chunk: chunk[1:]))
            for chunks in (set(chunks_of(stock, run.run, "other")), chunks_of(stock, old.run))
        )
        assert restored == original
        assert sorted(await uids(await replay_of(client, name="other").epoch())) == list(range(1000))


@anyio_test
async def test_restore_ends_when_a_newer_run_begins_or_the_replay_is_deleted(
    url: str, stock: redis.Redis, tmp_path: Path
) -> None:
    async with aionpredis.connect(url) as client:
        await filled(client, 2000)
        await replay_of(client).save(tmp_path / "saved")
        replay = replay_of(client, name="other")

        fenced = False

        def fence(done: int, total: int) -> None:
            nonlocal fenced
            if done > 100 and not fenced:
                fenced = True
                info: Any = stock.xinfo_stream("{other}:log")
                run = int(info["last-generated-id"].split(b"-")[0])
                stock.xadd("{other}:log", {"begin": "x", "policy": "0", "schema": "x"}, id=f"{run + 1}-0")

        with pytest.raises(RunEnded):
            await replay.restore(tmp_path / "saved", progress=fence)
        stock.delete("{other}:log")

        def delete(done: int, total: int) -> None:
            if done > 100:
                stock.delete("{other}:log")

        with pytest.raises(ReplayGone):
            await replay.restore(tmp_path / "saved", progress=delete)


@anyio_test
async def test_full_server_is_an_error_after_one_lease(url: str, stock: redis.Redis, tmp_path: Path) -> None:
    async with aionpredis.connect(url) as client:
        await filled(client, 2000)
        await replay_of(client).save(tmp_path / "saved")
        replay = replay_of(client, name="other", lease=LEASE)

        def fill_up(done: int, total: int) -> None:
            if done > 100:
                stock.config_set("maxmemory", "1")

        try:
            with anyio.fail_after(20), pytest.raises(ServerFull):
                await replay.restore(tmp_path / "saved", progress=fill_up)
        finally:
            stock.config_set("maxmemory", "0")
        assert 100 < await replay.count() < 2000


@anyio_test
@pytest.mark.parametrize(
    ("schema", "column"),
    [
        (Schema(state=("uint8", (3,)), uid="int32", terminated="bool"), "uid"),
        (Schema(state=("uint8", (4,)), uid="int64", terminated="bool"), "state"),
        (Schema(uid="int64", terminated="bool"), "state"),
        (Schema(state=("uint8", (3,)), uid="int64", terminated="bool", more="f4"), "more"),
    ],
)
async def test_another_schema_is_refused_before_anything_is_written(
    url: str, stock: redis.Redis, tmp_path: Path, schema: Schema, column: str
) -> None:
    async with aionpredis.connect(url) as client:
        await filled(client, 20)
        await replay_of(client).save(tmp_path / "saved")
        stock.flushall()
        with pytest.raises(SchemaMismatch, match=column):
            await client.replay("r", schema).restore(tmp_path / "saved")
        assert stock.dbsize() == 0
        other_order = Schema(**{name: SCHEMA[name] for name in reversed(list(SCHEMA))})
        await client.replay("r", other_order).restore(tmp_path / "saved")


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def make_folder(name: str) -> Callable[[Path], None]:
    def replace_it(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return replace_it


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def replace(name: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        text = (folder / name).read_bytes()
        assert old in text
        (folder / name).write_bytes(text.replace(old, new))

    return edit


def lengthen(folder: Path) -> None:
    with (folder / "transitions-00001.safetensors").open("ab") as file:
        file.write(b"x")


def other_bundle(folder: Path) -> None:
    (folder / "transitions-00001.safetensors").write_bytes((folder / "policy.safetensors").read_bytes())


def other_first(column: str, change: Callable[[int], int]) -> Callable[[Path], None]:
    """The first byte of the column is another one."""

    def edit(folder: Path) -> None:
        path = folder / "transitions-00001.safetensors"
        text = bytearray(path.read_bytes())
        header = json.loads(text[8 : 8 + int.from_bytes(text[:8], "little")])
        at = 8 + int.from_bytes(text[:8], "little") + header[column]["data_offsets"][0]
        text[at] = change(text[at])
        path.write_bytes(text)

    return edit


def same_bundle(folder: Path) -> None:
    first, second = (folder / f"transitions-0000{number}.safetensors" for number in (0, 1))
    facts = json.loads((folder / "replay.json").read_text())
    facts["transitions"] += facts["bundles"][0]["transitions"] - facts["bundles"][1]["transitions"]
    (folder / "replay.json").write_text(json.dumps(facts))
    second.write_bytes(first.read_bytes())


BUNDLE = "transitions-00001.safetensors"


@anyio_test
@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (remove("replay.json"), UsageError, "replay.json is missing"),
        (remove(BUNDLE), UsageError, f"{BUNDLE} is missing"),
        (remove("policy.safetensors"), UsageError, "policy.safetensors is missing"),
        (make_folder("replay.json"), UsageError, "replay.json is a folder"),
        (make_folder(BUNDLE), UsageError, f"{BUNDLE} is a folder"),
        (make_folder("policy.safetensors"), UsageError, "policy.safetensors is a folder"),
        (cut(BUNDLE, 600), CorruptValue, BUNDLE),
        (cut(BUNDLE, 100), CorruptValue, BUNDLE),
        (cut(BUNDLE, 5), CorruptValue, BUNDLE),
        (cut(BUNDLE, 0), CorruptValue, BUNDLE),
        (cut("policy.safetensors", 70), CorruptValue, "policy.safetensors"),
        (cut("replay.json", 100), CorruptValue, "replay.json"),
        (lengthen, CorruptValue, BUNDLE),
        (other_bundle, CorruptValue, BUNDLE),
        (other_first("log.rows", lambda rows: 9), CorruptValue, "add up"),
        (other_first("log.seq", lambda seq: seq ^ 1), CorruptValue, "is there twice"),
        (same_bundle, CorruptValue, "is there twice"),
        (replace(BUNDLE, b'"uid"', b'"uie"'), CorruptValue, BUNDLE),
        (replace(BUNDLE, b'"log.seq"', b'"lag.seq"'), CorruptValue, "log.seq"),
        (replace(BUNDLE, b"{", b"["), CorruptValue, BUNDLE),
        (replace("replay.json", b'"transitions": 50,', b'"transitions": 51,'), CorruptValue, "51"),
        (replace("replay.json", b"aionpredis.replay", b"something"), UsageError, "does not describe"),
        (replace("replay.json", b'"version": 1', b'"version": 2'), UsageError, "version 2"),
        (replace("replay.json", b"transitions-00001", b"../x"), CorruptValue, "replay.json"),
        (replace("replay.json", b'"columns"', b'"rows"'), CorruptValue, "columns"),
    ],
)
async def test_damaged_folder_is_a_clear_error_before_anything_is_written(
    url: str,
    stock: redis.Redis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    error: type[Exception],
    says: str,
) -> None:
    monkeypatch.setattr(saving, "BUNDLE_BYTES", 800)
    async with aionpredis.connect(url) as client:
        await filled(client, 50)
        await replay_of(client).save(tmp_path / "saved")
        stock.flushall()
        damage(tmp_path / "saved")
        with pytest.raises(error) as caught:
            await replay_of(client).restore(tmp_path / "saved")
        assert says in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        assert stock.dbsize() == 0


@anyio_test
async def test_folder_that_is_none_is_a_clear_error(url: str, stock: redis.Redis, tmp_path: Path) -> None:
    async with aionpredis.connect(url) as client:
        replay: Replay = replay_of(client)
        for name in ("nothing", "file"):
            (tmp_path / "file").write_text("")
            with pytest.raises(UsageError, match="no such folder"):
                await replay.restore(tmp_path / name)
        assert stock.dbsize() == 0


@anyio_test
@pytest.mark.parametrize("keep", [0, -1, 2.5, True, "3", None])
async def test_keep_that_is_no_number_of_runs_is_refused_before_the_folder_is_read(
    url: str, stock: redis.Redis, tmp_path: Path, keep: Any
) -> None:
    async with aionpredis.connect(url) as client:
        with pytest.raises(UsageError, match="keep is a positive number of runs"):
            await replay_of(client).restore(tmp_path / "nothing", keep=keep)
        assert stock.dbsize() == 0


@pytest.mark.parametrize("as_json", [True, False])
def test_commands_save_and_restore_without_knowing_the_columns(
    url: str, stock: redis.Redis, tmp_path: Path, as_json: bool
) -> None:
    testing = pytest.importorskip("typer.testing")
    pytest.importorskip("rich")
    from aionpredis.cli import app

    async def prepare() -> Run:
        async with aionpredis.connect(url) as client:
            return await filled(client, 30)

    def command(*arguments: str, code: int = 0) -> Any:
        done = testing.CliRunner().invoke(app, [*arguments, *(["--json"] if as_json else [])])
        assert done.exit_code == code, done.output
        return json.loads(done.stdout) if as_json and not code else done.output

    old = aionpredis.run(prepare)
    folder = str(tmp_path / "saved")
    said = command("save", "r", folder, "--url", url)
    assert (said["transitions"] == 30) if as_json else ("30 transitions" in said)
    said = command("restore", folder, "other", "--url", url)
    assert (said["transitions"] == 30) if as_json else ("30 transitions" in said)
    entries: Any = stock.xrange("{other}:log")
    run = int(entries[0][0].split(b"-")[0])
    assert renamed(chunks_of(stock, run, "other")) == renamed(chunks_of(stock, old.run))
    command("save", "r", folder, "--url", url, code=2)
    command("save", "nothing", str(tmp_path / "x"), "--url", url, code=1)
    command("restore", str(tmp_path / "x"), "--url", url, code=2)

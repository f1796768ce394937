"""What a learner knows of a run: held against a plain list of transitions."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from aionpredis.replay.index import Index
from aionpredis.replay.log import ChunkId

ACTORS = (b"a" * 8, b"b" * 8, b"c" * 8)


@st.composite
def logs(draw: st.DrawFn) -> list[ChunkId]:
    """Chunks of some actors as they may be committed: not quite in order, some never."""
    chunks = []
    for actor in ACTORS:
        for seq in range(draw(st.integers(0, 6))):
            rows = draw(st.integers(1, 4))
            ends = bytes([draw(st.integers(0, 2**rows - 1))]) if draw(st.booleans()) else b""
            chunks.append(ChunkId(actor, seq, rows, ends))
    order = draw(st.permutations(chunks))
    kept = order[: draw(st.integers(0, len(order)))]
    return [chunk._replace(entry=2 * number + 1) for number, chunk in enumerate(kept)]


@given(logs(), st.data())
@settings(max_examples=200, deadline=None)
def test_the_index_knows_what_a_plain_list_knows(log: list[ChunkId], data: st.DataObject) -> None:
    index = Index()
    at = 0
    while at < len(log):
        count = data.draw(st.integers(1, 4))
        index.add(log[at : at + count])
        at += count
    # the number of each transition → its chunk and row; and back
    places = [(chunk, row) for chunk in log for row in range(chunk.rows)]
    numbers = {(chunk.incarnation, chunk.seq, row): number for number, (chunk, row) in enumerate(places)}
    gone = data.draw(st.sets(st.integers(0, len(places) - 1))) if places else set()
    index.discard(np.array(sorted(gone), np.int64))
    assert index.present().tolist() == [number for number in range(len(places)) if number not in gone]
    assert index.present_count == len(places) - len(gone)
    if not places:
        return
    ids = np.arange(len(places))
    chunks, rows = index.locate(ids)
    for number, (chunk, row) in enumerate(places):
        assert index.chunk(int(chunks[number])) == chunk._replace(ends=b"")
        assert rows[number] == row
        assert index.rows(int(chunks[number]))[row] == number
    assert index.lengths(chunks).tolist() == [chunk.rows for chunk, _ in places]
    assert list(index.origins(chunks)) == [(chunk.incarnation, chunk.seq) for chunk, _ in places]

    def ended(number: int) -> bool:
        chunk, row = places[number]
        return bool(chunk.ends) and bool(chunk.ends[0] >> row & 1)

    assert index.ends(ids).tolist() == [ended(number) for number in range(len(places))]
    for number, (chunk, row) in enumerate(places):
        path = [number]
        while len(path) < 6:
            chunk, row = places[path[-1]] if path[-1] >= 0 else (chunk, row)
            name = (
                (chunk.incarnation, chunk.seq, row + 1)
                if row + 1 < chunk.rows
                else (chunk.incarnation, chunk.seq + 1, 0)
            )
            following = numbers.get(name, -1) if path[-1] >= 0 else -1
            path.append(-1 if following in gone else following)
        assert index.follow(np.array([number]), 6)[0].tolist() == path
    entry = data.draw(st.integers(0, 2 * len(log)))
    assert index.committed_until(entry).tolist() == [
        number for number, (chunk, _) in enumerate(places) if chunk.entry <= entry and number not in gone
    ]


@given(logs(), st.data())
@settings(max_examples=200, deadline=None)
def test_idle_chunks_are_those_that_no_open_transition_needs(log: list[ChunkId], data: st.DataObject) -> None:
    index = Index()
    ids = index.add(log)
    barred, gone = (data.draw(st.sets(st.sampled_from(ids.tolist()))) if len(ids) else set() for _ in range(2))
    newly = index.bar(np.array([*barred, *barred], np.int64))
    assert newly.tolist() == sorted(barred)
    assert index.bar(newly).tolist() == []
    index.discard(np.array(sorted(gone), np.int64))
    open_ = [number for number in ids.tolist() if number not in barred | gone]
    assert np.flatnonzero(index.is_open(np.arange(-3, len(ids) + 3))).tolist() == [number + 3 for number in open_]
    steps = data.draw(st.integers(1, 5))
    idle = set(index.idle(steps).tolist())
    path = index.follow(np.array(open_, np.int64), steps + 1) if open_ else np.zeros((0, 1), np.int64)
    needed = {number for number in path.ravel().tolist() if number >= 0}
    assert not idle & needed
    assert idle <= set(ids.tolist()) - gone
    first = 0
    for number, chunk in enumerate(log):
        rows = set(range(first, first + chunk.rows))
        first += chunk.rows
        assert idle & rows in (set(), rows - gone)
        if not gone and not rows & needed:
            assert rows <= idle, number


def test_what_is_long_gone_is_forgotten_and_the_rest_keeps_its_numbers() -> None:
    index = Index()
    for seq in range(3000):
        index.add([ChunkId(ACTORS[seq % 2], seq // 2, 2, b"\2" if seq % 10 == 0 else b"", seq + 1)])
        index.discard(index.committed_until(seq - 300))
    assert index.chunk_count < 1000
    assert index.present().tolist() == list(range(2 * 2699, 2 * 3000))
    ids = index.present()
    chunks, _ = index.locate(ids)
    assert [index.chunk(int(chunk)).entry for chunk in chunks] == [number // 2 + 1 for number in ids]
    assert index.follow(ids[:1], 3)[0].tolist() == [5398, 5399, 5402]  # the next chunk but one is the same actor's
    assert index.ends(ids).tolist() == [number // 2 % 10 == 0 and number % 2 == 1 for number in ids]

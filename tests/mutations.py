"""Do the tests notice when a rule is broken? ``python tests/mutations.py [name …]``; not part of the test suite.

Takes one rule at a time out of a copy of the library, runs the tests that should notice, and says which did so first.
The first half are rules of the replay, those with ``wire:`` in their names belong to what lies below it.
The text to replace must be there exactly once, so this fails loudly when the code has changed. Exit code 1: a rule was
broken and no test noticed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent

OPTIONS = ("-x", "-v", "-p", "no:cacheprovider", "--hypothesis-profile", "unshrunk")
REPLAY = [
    *("tests/test_actor.py", "tests/test_runs.py", "tests/test_reader.py", "tests/test_replay_machine.py"),
    *("-k", "asyncio or machine", "-n", "2"),
]
ONE_LOOP = ("-k", "not redis and not uvloop and not trio", "--timeout", "25")
CONNECTION_TESTS = ["tests/test_connection.py", *ONE_LOOP]
CLIENT_TESTS = ["tests/test_client.py", "tests/test_connection.py", *ONE_LOOP]
WRITER_TESTS = ["tests/test_writer.py", *ONE_LOOP]
LANE_TESTS = ["tests/test_lanes.py", *ONE_LOOP]
DURABILITY_TESTS = ["tests/test_durability.py", *ONE_LOOP]
PARSER_TESTS = ["tests/test_resp.py", *ONE_LOOP]
CANCELLATION_TESTS = ["tests/test_cancellation.py", "tests/test_connection.py", *ONE_LOOP]
RELEASE_TESTS = ["tests/test_release.py", *ONE_LOOP]
CLUSTER_TESTS = ["tests/test_discovery.py", *ONE_LOOP]
SENTINEL_TESTS = ["tests/test_service.py", *ONE_LOOP]
RECONNECT_TESTS = ["tests/test_reconnect.py", "-k", "missing or same_number", *ONE_LOOP[2:]]
RUN_TESTS = ["tests/test_runs.py", *ONE_LOOP]
ENTRIES_TESTS = ["tests/test_entries.py", *ONE_LOOP]
CLUSTER_REPLAY_TESTS = ["tests/test_cluster_replay.py", "-k", "valkey", "-n", "2"]
TIMEOUT = 240
"""Seconds for one of them. All tests pass in a sixth of that."""


class Mutation(NamedTuple):
    """``changes``: file, what is there, what to put there. ``tests``: what pytest runs."""

    name: str
    changes: list[tuple[str, str, str]]
    tests: list[str] = REPLAY


COMMIT = "replay/commit.py"
ENTRIES = "replay/entries.py"
LOG = "replay/log.py"
RUNS = "replay/runs.py"
CONNECTION = "wire/connection.py"
PARSER = "wire/resp.py"
WRITER = "writer.py"
LANE = "lane.py"
PIPELINE = "pipeline.py"
DISCOVERY = "wire/discovery.py"
SENTINEL = "wire/sentinel.py"
DIAL = "wire/dial.py"

XADD = 'arguments = [b"XADD", log, b"NOMKSTREAM", b"%d-*" % run, FIELD]'
SET_LONG = 'return resp.encode("SET", key, Blob(commit.value), "NX", "PX", self._lease_ms)'
SET_OPTIONS = r'options = b"$2\r\nNX\r\n$2\r\nPX\r\n$%d\r\n%b\r\n" % (len(self._lease_ms), self._lease_ms)'
SET_SHORT = 'return resp.encode_set(key, b"", commit.value[0], options, 3)'

MUTATIONS = [
    Mutation(
        "no lease",
        [
            (COMMIT, SET_LONG, 'return resp.encode("SET", key, Blob(commit.value), "NX")'),
            (COMMIT, SET_OPTIONS, r'options = b"$2\r\nNX\r\n"'),
            (COMMIT, SET_SHORT, SET_SHORT.replace("3)", "1)")),
        ],
    ),
    Mutation(
        "no NX",
        [
            (COMMIT, SET_LONG, SET_LONG.replace('"NX", ', "")),
            (COMMIT, SET_OPTIONS, SET_OPTIONS.replace(r"$2\r\nNX\r\n", "")),
            (COMMIT, SET_SHORT, SET_SHORT.replace("3)", "2)")),
        ],
    ),
    Mutation(
        "no NOMKSTREAM",
        [
            (COMMIT, XADD, XADD.replace('b"NOMKSTREAM", ', "")),
            (COMMIT, 'return b"*6" +', 'return b"*5" +'),
            (COMMIT, 'removeprefix(b"*5")', 'removeprefix(b"*4")'),
        ],
    ),
    Mutation("XADD * instead of run-*", [(COMMIT, XADD, XADD.replace('b"%d-*" % run', 'b"*"'))]),
    Mutation(
        "begin_run: r-* instead of r-0",
        [
            (
                "streams.py",
                'client.call("XADD", stream, *option, f"{left}-0", *pairs',
                'client.call("XADD", stream, *option, f"{left}-*", *pairs',
            )
        ],
    ),
    Mutation(
        "begin_run does not compare the token",
        [
            (
                "streams.py",
                'return (await page(client, stream, f"{left}-0", f"{left}-0", retry=retry)) == [((left, 0), fields)]',
                'return bool(await page(client, stream, f"{left}-0", f"{left}-0"))',
            )
        ],
    ),
    Mutation(
        "XTRIM before UNLINK",
        [
            (
                RUNS,
                "        count = await unlink(client, _data(names, entries))\n",
                "        count = 0\n",
            ),
            (
                RUNS,
                '"XTRIM", names.log, "MINID", f"{left}-{right + 1}", repeatable=True)\n',
                (
                    '"XTRIM", names.log, "MINID", f"{left}-{right + 1}", repeatable=True)\n'
                    "        deleted += await unlink(client, _data(names, entries))\n"
                ),
            ),
        ],
    ),
    Mutation(
        "XDEL before UNLINK",
        [
            (
                RUNS,
                "        deleted += await (unlink(client, keys) if ended else",
                "        deleted += 0 and await (unlink(client, keys) if ended else",
            ),
            (
                RUNS,
                "for (left, right), _ in entries), repeatable=True)\n",
                ("for (left, right), _ in entries), repeatable=True)\n        deleted += await unlink(client, keys)\n"),
            ),
        ],
    ),
    Mutation("evicting takes r-0, too", [(RUNS, 'f"{run}-1", f"{run}-{entry}"', 'f"{run}-0", f"{run}-{entry}"')]),
    Mutation("evicts one chunk too many", [(COMMIT, "entry - self._capacity", "entry - self._capacity + 1")]),
    Mutation(
        "a high-water mark instead of Seen",
        [
            (
                LOG,
                "        if seq < stops[at]:\n            return False\n",
                (
                    "        if seq < stops[-1]:\n            return False\n"
                    "        stops[-1] = seq + 1\n        return True\n"
                ),
            )
        ],
    ),
    Mutation(
        "chunks are not told apart",
        [
            (
                LOG,
                "        if seq < stops[at]:\n            return False\n",
                "        return True\n",
            )
        ],
    ),
    Mutation(
        "PERSIST not sent",
        [
            (
                COMMIT,
                "commit.packed, entry)\n                self._queue(commit, _Step.KEEP)\n",
                "commit.packed, entry)\n                self._settle(commit, committed=True)\n",
            )
        ],
    ),
    Mutation(
        "acknowledged before XADD's reply",
        [
            (
                COMMIT,
                "                commit.repeated |= value is None\n",
                (
                    "                commit.repeated |= value is None\n"
                    "                self._settled(commit.buffer, commit.chunk.rows, True)\n"
                ),
            ),
            (COMMIT, "        self._settled(commit.buffer, commit.chunk.rows, committed)\n", ""),
        ],
    ),
    Mutation(
        "lease not renewed",
        [(COMMIT, "if commit.step is _Step.LOG and now - commit.leased > self._lease / 2:", "if False:")],
    ),
    Mutation(
        "PERSIST's 0 is taken for success",
        [(COMMIT, "case _Step.KEEP if value:", "case _Step.KEEP:")],
    ),
    Mutation("a late renewal begins a lease again", [(COMMIT, 'self._lease_ms, b"XX"]', "self._lease_ms]")]),
    Mutation(
        "after a broken connection on with the old step",
        [
            (
                COMMIT,
                (
                    "            commit.repeated |= commit.step is not _Step.SET\n"
                    "            commit.turn = _Turn.FREE\n"
                    "            self._queue(commit, _Step.RENEW if commit.repeated else _Step.SET)\n"
                ),
                "            commit.turn = _Turn.FREE\n            self._queue(commit, commit.step)\n",
            )
        ],
    ),
    Mutation("data of a run that is being deleted are kept", [(COMMIT, "if commit.anew:", "if False:")]),
    Mutation(
        "a stale SET is not deleted",
        [
            (
                COMMIT,
                "self._queue(commit, _Step.FIND if commit.repeated else _Step.DROP)",
                "self._queue(commit, _Step.FIND) if commit.repeated else self._settle(commit, committed=False)",
            )
        ],
    ),
    Mutation(
        "a repeated commit of an ended run is not looked for",
        [(COMMIT, "_Step.FIND if commit.repeated else _Step.DROP", "_Step.DROP")],
    ),
    Mutation(
        "entries that a failover took are not added again",
        [(COMMIT, "if self._last.doubtful and any(", "if False and any(")],
        ENTRIES_TESTS,
    ),
    Mutation(
        "evicted entries come back after a fault",
        [(ENTRIES, "if left[packed] != ABSENT]\n        replies", "]\n        replies")],
        ENTRIES_TESTS,
    ),
    Mutation(
        "data that no entry can name any more stay",
        [(ENTRIES, "await self._ask([*persist, *lend], retry)", "await self._ask(persist, retry)")],
        ENTRIES_TESTS,
    ),
    Mutation(
        "new chunks overtake entries that are added again",
        [(COMMIT, "return self._last.doubtful or (", "return (")],
        ENTRIES_TESTS,
    ),
    Mutation(
        "a nil chunk's log entry is not looked at again",
        [
            (
                "replay/log.py",
                "    if await is_gone():\n        return None, True\n",
                "",
            ),
            (
                "replay/log.py",
                "value is None and await is_gone()",
                "False",
            ),
        ],
    ),
    Mutation(
        "a buffer is used again before its reply",
        [
            (
                "replay/actor.py",
                "        self._committer.commit(buffer, run, chunk)\n",
                "        self._committer.commit(buffer, run, chunk)\n        self._free.append(buffer)\n",
            ),
            (
                "replay/actor.py",
                "            self._stats.stale += rows\n        self._free.append(buffer)\n",
                "            self._stats.stale += rows\n",
            ),
        ],
    ),
    Mutation(
        "a chunk that a failover took is not read when it is sent again",
        [(LOG, "self._missed[chunk[:2]] = 0 if gone else chunk.entry", "self._missed[chunk[:2]] = chunk.entry")],
        RECONNECT_TESTS,
    ),
    Mutation(
        "another chunk's entry is taken for that of one that a failover took",
        [
            (
                LOG,
                'return not any(fields.get(FIELD, b"")[: _ENTRY.size] == origin for _, fields in present)',
                "return not present",
            )
        ],
        RECONNECT_TESTS,
    ),
    # --- clusters ---
    Mutation(
        "cluster: entries come in any order",
        [(COMMIT, "if self._only is None and not lane.pauses:", "if False:")],
    ),
    Mutation(
        "cluster: what was redirected is not followed",
        [(COMMIT, "if one.reply.redirected:", "if False:")],
        CLUSTER_REPLAY_TESTS,
    ),
    Mutation(
        "replicas are not waited for",
        [(COMMIT, "any(commit.step in _REPLICATED for commit in commits)", "False")],
        CLUSTER_REPLAY_TESTS,
    ),
    Mutation(
        "replicas are not waited for when another connection has written",
        [
            (
                COMMIT,
                "case _Step.CHECK if value == PERSISTENT and self._replicas is not None:",
                "case _Step.CHECK if False:",
            )
        ],
        CLUSTER_REPLAY_TESTS,
    ),
    Mutation(
        "what a failover has brought back stays",
        [("replay/deleted.py", "if memory is None or memory.changes == changes:", "if True:")],
        RUN_TESTS,
    ),
    # --- cancellation ---
    Mutation(
        "wire: a cancelled reply is not abandoned",
        [
            (
                CONNECTION,
                "            self.abandon(reply)\n            self._hand_over()",
                "            self._hand_over()",
            )
        ],
        CANCELLATION_TESTS,
    ),
    Mutation(
        "wire: a cancellation is swallowed",
        [(CONNECTION, "the cancellation\n            raise\n", "the cancellation\n            return\n")],
        CANCELLATION_TESTS,
    ),
    Mutation(
        "wire: who is cancelled does not hand over",
        [
            (
                CONNECTION,
                "                        self._driving = False\n                        self._hand_over()\n",
                "                        self._driving = False\n",
            ),
            (
                CONNECTION,
                "            self.abandon(reply)\n            self._hand_over()",
                "            self.abandon(reply)",
            ),
        ],
        CANCELLATION_TESTS,
    ),
    Mutation(
        "wire: a half-sent request's rest is dropped when it is abandoned again",
        [(CONNECTION, "if not reply.sent:", "if not outgoing.index and not outgoing.offset:")],
        CONNECTION_TESTS,
    ),
    Mutation(
        "wire: a half-sent request's memory is not copied",
        [(CONNECTION, '= [b"".join(rest)], 0, 0', "= rest, 0, 0")],
        CONNECTION_TESTS,
    ),
    Mutation(
        "wire: a half-sent request is copied, however long",
        [(CONNECTION, "for part in rest) > MAX_SNAPSHOT", "for part in rest) < 0")],
        CONNECTION_TESTS,
    ),
    Mutation(
        "wire: an unsent request that is withdrawn is still waited for",
        [(CONNECTION, "                    self._parser.pending.remove(reply)\n", "")],
        CONNECTION_TESTS,
    ),
    Mutation(
        "wire: an abandoned reply's present value is still received into its memory",
        [(PARSER, "if self._in_body and self.pending and self.pending[0] is reply:", "if False:")],
        [*PARSER_TESTS[:1], *CANCELLATION_TESTS],
    ),
    Mutation(
        "wire: an abandoned prediction still scatters into its memory",
        [
            (
                PARSER,
                "                reply.template = None\n        if self._in_body",
                "                pass\n        if self._in_body",
            )
        ],
        [*PARSER_TESTS[:1], *CANCELLATION_TESTS],
    ),
    Mutation(
        "wire: an abandoned prediction that is too long to gather still scatters",
        [(PARSER, "            self._slots[slot] = None\n", "            pass\n")],
        [*PARSER_TESTS[:1], *CANCELLATION_TESTS],
    ),
    Mutation(
        "wire: a connection of one's own is kept after a cancellation",
        [("wire/shard.py", "if good and not self._closed", "if not self._closed")],
        CANCELLATION_TESTS,
    ),
    Mutation(
        "wire: connecting is cancelled, the socket stays open",
        [("wire/dial.py", "            attempt.abandon()\n            raise\n", "            raise\n")],
        CANCELLATION_TESTS,
    ),
    Mutation(
        "wire: requests of a cancelled mget() are not abandoned",
        [(PIPELINE, "                entry.connection.abandon(entry.reply)\n", "                pass\n")],
        CANCELLATION_TESTS,
    ),
    Mutation(
        "wire: a cancelled writer's batches are not abandoned",
        [(LANE, "            self._connection.abandon(batch.reply)\n", "            pass\n")],
        [*WRITER_TESTS[:1], *CANCELLATION_TESTS],
    ),
    # --- order, and what belongs to whom ---
    Mutation(
        "wire: replies go to the wrong requests",
        [(PARSER, "        self.pending.append(reply)\n", "        self.pending.appendleft(reply)\n")],
        CONNECTION_TESTS,
    ),
    Mutation(
        "wire: expected bytes are not compared",
        [
            (PARSER, "return self.scratch == pattern.expected\n", "return True\n"),
            (PARSER, "return self.scratch.startswith(pattern.expected[:known])", "return True"),
        ],
        PARSER_TESTS,
    ),
    Mutation(
        "wire: expected bytes are compared only when all have come",
        [(PARSER, "return self.scratch.startswith(pattern.expected[:known])", "return True")],
        PARSER_TESTS,
    ),
    Mutation(
        "wire: a view's len() is taken for its size in bytes",
        [(PARSER, 'return argument.cast("B")', "return argument")],
        PARSER_TESTS,
    ),
    Mutation(
        "wire: an arena is used again before its reply",
        [
            (
                WRITER,
                "        self._latest[slot] = lane.current\n        if",
                "        self._latest[slot] = lane.current\n        self._arenas.append(lane.current.arena)\n        if",
            )
        ],
        WRITER_TESTS,
    ),
    Mutation(
        "wire: the writer takes no snapshot",
        [(WRITER, "        self._copy = copy\n", "        self._copy = False\n")],
        WRITER_TESTS,
    ),
    Mutation(
        "wire: after a break the writer sends its batches in another order",
        [(LANE, "self.queued.extendleft(reversed(self.inflight))", "self.queued.extend(self.inflight)")],
        WRITER_TESTS,
    ),
    Mutation(
        "wire: a batch counts as stored though its reply never came",
        [
            (
                LANE,
                "ServerError) as error:\n                self._requeue()\n",
                (
                    "ServerError) as error:\n                while self.inflight:\n"
                    "                    self._settle(self.inflight.popleft())\n"
                ),
            )
        ],
        WRITER_TESTS,
    ),
    # --- faults ---
    Mutation(
        "wire: what is not repeatable is repeated",
        [("client.py", "if reply.sent and not repeatable:", "if False:")],
        CLIENT_TESTS,
    ),
    Mutation(
        "wire: a broken connection is kept",
        [
            (
                "wire/shard.py",
                "return connection if connection is not None and connection.lost is None else None",
                "return connection",
            ),
            (
                "wire/shard.py",
                "if self._connection is None or self._connection.lost is not None:",
                "if self._connection is None:",
            ),
        ],
        CLIENT_TESTS,
    ),
    Mutation(
        "wire: a connection that sent nonsense is kept",
        [
            (
                CONNECTION,
                "            self.abort(error if isinstance(error, ConnectionLost) else",
                "            self._parser.pending[0].error = (error if isinstance(error, ConnectionLost) else",
            )
        ],
        CONNECTION_TESTS,
    ),
    Mutation(
        "wire: a broken connection does not wake those who wait",
        [
            (
                CONNECTION,
                "                reply.waiter.wake()\n\n    def detach",
                "                pass\n\n    def detach",
            )
        ],
        CONNECTION_TESTS,
    ),
    Mutation(
        "wire: silence is waited for without end",
        [(CONNECTION, "            if self._silence >= self._timeout:", "            if False:")],
        CONNECTION_TESTS,
    ),
    Mutation(
        "wire: who waits for an abandoned reply is not handed the connection",
        [(CONNECTION, "if not reply.done and reply.waiter is not None:", "if not (reply.done or reply.abandoned):")],
        CONNECTION_TESTS,
    ),
    Mutation(
        "wire: a task that is poked forgets the silence",
        [(CONNECTION, "if (ready and not self._poked) or", "if ready or")],
        CONNECTION_TESTS,
    ),
    Mutation(
        "wire: a busy event loop is taken for silence",
        [(CONNECTION, "self._poked) or self._receive() or self._send():", "self._poked):")],
        CONNECTION_TESTS,
    ),
    Mutation(
        "wire: the event loop is not told that a socket closes",
        [
            (
                CONNECTION,
                "        self._ready.closing()\n        self._sock.raw.close()\n",
                "        self._sock.raw.close()\n",
            )
        ],
        CONNECTION_TESTS,
    ),
    # --- bounds ---
    Mutation(
        "wire: nobody else runs while bytes come",
        [(CONNECTION, "            await self._ready.pause()\n", "")],
        CONNECTION_TESTS,
    ),
    Mutation(
        "wire: a turn moves any number of bytes",
        [(PARSER, "TURN = 1 << 20", "TURN = 1 << 40")],
        CLIENT_TESTS,
    ),
    Mutation(
        "wire: replies are asked for without bound",
        [(PIPELINE, "self._window >= connection.reply_window", "False")],
        CLIENT_TESTS,
    ),
    Mutation(
        "wire: the writer holds any number of bytes",
        [(WRITER, "if lane.current is None and self._held and self._held + length > self._bound:", "if False:")],
        WRITER_TESTS,
    ),
    # --- a writer on a cluster ---
    Mutation(
        "wire: what moved overtakes what will be redirected",
        [
            (WRITER, "if latest is not None and not latest.settled and latest.lane is not lane:", "if False:"),
            (WRITER, "if latest is None or latest.settled or latest.lane is lane:", "if True:"),
        ],
        LANE_TESTS,
    ),
    Mutation(
        "wire: what was redirected overtakes what came after its slot had come back",
        [(LANE, "elif key in self._astray and value", "elif False and value")],
        LANE_TESTS,
    ),
    Mutation(
        "wire: what is redirected is sent from memory that a cancelled put takes back",
        [(LANE, '[b"".join(batch.commands())]', "batch.commands()")],
        LANE_TESTS,
    ),
    Mutation(
        "wire: what was sent to a server that became a replica is redirected one by one",
        [
            (
                LANE,
                "self._shard.live_connection if self._shard in shards else None",
                "self._shard.live_connection",
            )
        ],
        LANE_TESTS,
    ),
    Mutation(
        "wire: a lane that had to go elsewhere stays there",
        [(LANE, "        if self._home in shards:\n            self._shard = self._home\n", "")],
        LANE_TESTS,
    ),
    Mutation(
        "wire: replicas are not waited for",
        [(LANE, "                    if batch.over:\n", "                    if False:\n")],
        DURABILITY_TESTS,
    ),
    Mutation(
        "wire: replicas are not waited for where something was redirected to",
        [(LANE, "                batch.over |= over\n", "                pass\n")],
        DURABILITY_TESTS,
    ),
    Mutation(
        "wire: who parks for reading is not told of a request",
        [(CONNECTION, "if self._parked and self._sock.", "if False and self._sock.")],
        CONNECTION_TESTS,
    ),
    # --- memory ---
    Mutation(
        "wire: a reply's error is raised itself",
        [(CONNECTION, "raise _copy(reply.error)", "raise reply.error")],
        RELEASE_TESTS,
    ),
    Mutation(
        "wire: a broken connection keeps the error that was raised",
        [(CONNECTION, "else _copy(error)\n", "else error\n")],
        RELEASE_TESTS,
    ),
    Mutation(
        "wire: what was given up is raised itself",
        [("retry.py", "raise copy.copy(error).with", "raise error.with")],
        RELEASE_TESTS,
    ),
    Mutation(
        "wire: a failed attempt to connect keeps the thread's frames",
        [("wire/dial.py", "                each.__traceback__ = None\n", "                pass\n")],
        RELEASE_TESTS,
    ),
    Mutation(
        "wire: the log keeps errors",
        [("retry.py", "self.place, str(error))", "self.place, error)")],
        RELEASE_TESTS,
    ),
    Mutation(
        "wire: a server's error is raised itself",
        [("errors.py", "        error = copy.copy(self)\n", "        error = self\n")],
        RELEASE_TESTS,
    ),
    Mutation(
        "wire: an idle writer's pump is cancelled",
        [("lane.py", "        self._work.set()  # an idle", "        # an idle")],
        RELEASE_TESTS,
    ),
    Mutation(
        "an actor that was left keeps its buffers",
        [("replay/actor.py", "        self._free.clear()\n", "")],
        RELEASE_TESTS,
    ),
    # --- where the servers are ---
    Mutation(
        "wire: a silent node of a cluster is waited for",
        [(DISCOVERY, "PATIENCE = 0.5", "PATIENCE = 1e9")],
        CLUSTER_TESTS,
    ),
    Mutation(
        "wire: the nodes that a cluster names are forgotten",
        [(DISCOVERY, "self._known = tuple(dict.fromkeys((node, *named)))", "pass")],
        CLUSTER_TESTS,
    ),
    Mutation(
        "wire: the nodes in a cluster's URL are asked once only",
        [(DISCOVERY, "*self._known, *self._startup))", "*(self._known or self._startup)))")],
        CLUSTER_TESTS,
    ),
    Mutation(
        "wire: a node that belongs to no cluster is believed",
        [(DISCOVERY, "if not slots:", "if False:")],
        CLUSTER_TESTS,
    ),
    Mutation(
        "wire: addresses of a cluster are not mapped",
        [(DISCOVERY, "return address if self._remap is None else self._remap(address)", "return address")],
        CLUSTER_TESTS,
    ),
    Mutation(
        "wire: a replica is not told to answer",
        [(DIAL, "        if readonly:\n", "        if False:\n")],
        CLUSTER_TESTS,
    ),
    Mutation(
        "wire: a node's TLS is asked for another's name",
        [(DIAL, '{**self._arguments, "host": host, "port": port}', '{**self._arguments, "port": port}')],
        CLUSTER_TESTS,
    ),
    Mutation(
        "wire: whom a Sentinel names is believed to be the primary",
        [(DIAL, "primary=self._sentinels is not None", "primary=False")],
        SENTINEL_TESTS,
    ),
    Mutation(
        "wire: a service is looked for once only",
        [
            (
                DIAL,
                "        for sentinel, (host, port) in self._sentinels.find():\n",
                """
        if not hasattr(self, "found"):
            self.found = list(self._sentinels.find())
        for sentinel, (host, port) in self.found:
""",
            ),
        ],
        SENTINEL_TESTS,
    ),
    Mutation(
        "wire: a silent Sentinel takes all the time",
        [(SENTINEL, "timeout / (len(source.sentinels) + 1)", "timeout")],
        SENTINEL_TESTS,
    ),
    Mutation(
        "wire: the Sentinel that knew is not asked first",
        [(DIAL, "                self._sentinels.first = sentinel\n", "                pass\n")],
        SENTINEL_TESTS,
    ),
    Mutation(
        "wire: the others are not asked when a Sentinel was wrong",
        [(DIAL, "or isinstance(outcome, AuthenticationError) or attempt.abandoned", "or True")],
        SENTINEL_TESTS,
    ),
    Mutation(
        "wire: connections to Sentinels stay",
        [
            (SENTINEL, "            pool.disconnect()\n", "            keep.append(pool)\n"),
            (SENTINEL, "\n\nclass Sentinels", "\n\nkeep: Any = []\n\n\nclass Sentinels"),
        ],
        SENTINEL_TESTS,
    ),
]


def mutate(tree: Path, mutation: Mutation) -> None:
    for name, old, new in mutation.changes:
        path = tree / "aionpredis" / name
        text = path.read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise SystemExit(f"{mutation.name}: in {name} there is {text.count(old)} times, not once:\n{old}")
        path.write_text(text.replace(old, new), encoding="utf-8")


def noticed(tree: Path, tests: list[str]) -> str:
    """The first test that fails; empty: none."""
    command = [sys.executable, "-m", "pytest", *OPTIONS, *tests]
    try:
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return f"(no end within {TIMEOUT} s)"
    if found := re.search(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - .*)?$", done.stdout, re.MULTILINE):
        return found[1].removeprefix("tests/")
    if "+ Timeout +" in done.stdout + done.stderr:  # that ended the process: the last test that was begun hung
        begun: list[str] = re.findall(r"^tests/(\S+::.*?)(?: PASSED| SKIPPED| \+\+\+| *$)", done.stdout, re.MULTILINE)
        return f"{begun[-1]} (hung)"
    if done.returncode:
        raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return ""


def copy(source: Path, tree: Path) -> None:
    for folder in ("aionpredis", "tests"):
        shutil.copytree(source / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(source / file, tree)


def main(names: list[str]) -> int:
    chosen = [mutation for mutation in MUTATIONS if not names or any(name in mutation.name for name in names)]
    survived = 0
    with tempfile.TemporaryDirectory() as name:
        original, tree = Path(name, "original"), Path(name, "tree")
        original.mkdir()
        copy(ROOT, original)  # somebody may be editing
        for mutation in chosen:  # all of them, before the first takes its time
            copy(original, tree)
            mutate(tree, mutation)
            shutil.rmtree(tree)
        unbroken = [
            Mutation("(nothing is broken)", [], list(tests)) for tests in {tuple(m.tests): None for m in chosen}
        ]
        for mutation in [*unbroken, *chosen]:
            copy(original, tree)
            mutate(tree, mutation)
            started = time.monotonic()
            test = noticed(tree, mutation.tests)
            shutil.rmtree(tree)
            if not mutation.changes:
                if test:
                    raise SystemExit(f"it fails as it is: {test}")
                test = "passes"
            survived += not test
            print(f"{mutation.name:74} {time.monotonic() - started:4.0f} s  {test or 'SURVIVED'}", flush=True)
    return min(survived, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Requests and replies in flight on one connection.

There is no background task: **whoever waits for a reply drives**. The first waiting task sends what is queued and receives
for everybody until its own reply is there; then it hands over to the next one that waits. So a lone caller pays no switch
of tasks, sending never stops receiving, and nothing runs when nobody waits. Who has asked several servers waits for one of
them at a time; meanwhile the event loop itself receives from the others.

A connection about whose state there is any doubt is aborted: every request on it fails, and no byte of it is used again.
"""

from __future__ import annotations

import math
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from aionpredis.errors import ConnectionLost, ProtocolError, Stalled
from aionpredis.stats import Counters
from aionpredis.wire.ready import readiness
from aionpredis.wire.resp import MAX_VECTORS, TURN, Buffer, Parser, Reply
from aionpredis.wire.socket import Socket

__all__ = ["Connection"]

PATIENCE = 3
"""Fruitless looks at the socket, each after letting other tasks run, before the event loop is asked to wait for it:
asking costs 12-16 µs and wakes an idle core."""

DEEP = 8
"""Unanswered requests from which on further ones are sent together, by the driving task, instead of one by one."""

LOCAL_WINDOW = 1 << 20
"""On a Unix socket. An epoch takes 4.5 µs a transition with 0.5 to 1 MiB, 4.8 with 2 to 4, 5.4 with 4 at times."""

REMOTE_WINDOW = 4 << 20
"""On TCP: 10 Gb/s with 3 ms between question and answer. (With an output-buffer limit a server cuts a connection that has
asked for much more than it takes.)"""

SPIN_SECONDS = 40e-6
"""How long a lone short request on this machine looks for its reply again and again: waking up from the event loop's wait
takes longer. ``set`` of 12.8 kB: 56 µs instead of 73, and as much less CPU. Nothing is gained by more."""

MAX_SNAPSHOT = 1 << 20
"""Bytes of a half-sent request that are copied when its caller goes away. For more, the connection is given up."""


class _Outgoing:
    """A request that the kernel has not taken completely: ``buffers[index:]``, the first from byte ``offset``."""

    __slots__ = ("buffers", "index", "offset", "reply")

    def __init__(self, buffers: Sequence[Buffer], reply: Reply) -> None:
        self.buffers = buffers
        self.index = 0
        self.offset = 0
        self.reply = reply

    def rest(self, most: int | None = None) -> list[Buffer]:
        """The first ``most`` buffers that are left."""
        buffers = list(self.buffers[self.index : None if most is None else self.index + most])
        if self.offset:
            buffers[0] = memoryview(buffers[0])[self.offset :]
        return buffers


class Connection:
    """One established connection, for use in the event loop that made it.

    ``timeout``: seconds without any progress, in either direction, after which it is aborted with :class:`Stalled`.
    """

    def __init__(self, sock: Socket, *, timeout: float, max_bulk: int, counters: Counters | None = None) -> None:
        self.lost: Exception | None = None
        self.reply_window = LOCAL_WINDOW if sock.is_local else REMOTE_WINDOW
        """Bytes of replies that one caller should have asked for and not received."""
        self.patience = math.inf
        self.on_silence: Callable[[], Awaitable[None]] | None = None
        """Called after each ``patience`` seconds of silence, while something is outstanding: it may know why."""
        self._counters = Counters() if counters is None else counters
        self._sock = sock
        self._ready = readiness(sock.raw)
        self._timeout = timeout
        self._parser = Parser(max_bulk, self._counters.refused)
        self._outbox: deque[_Outgoing] = deque()
        self._driving = False
        self._parked = False
        self._poked = False
        self._silence = 0.0
        """Seconds that were waited in vain, by one task or several, since a byte moved."""
        self._asked = 0.0
        """At how many of them :attr:`on_silence` was called."""
        self._waiting: deque[Reply] = deque()

    def submit(self, buffers: Sequence[Buffer], reply: Reply, *, send: bool = True) -> Reply:
        """Queue a request, and send it unless many are unanswered. Its memory stays borrowed until the reply is done or
        abandoned. Somebody must then wait. ``send=False``: others follow at once, and it goes with them.

        Raises:
            ConnectionLost: the connection is closed; nothing was queued.
        """
        if self.lost is not None:
            raise _copy(self.lost)
        self._parser.expect(reply)
        self._counters.requests += 1
        if send and len(self._parser.pending) <= DEEP:
            # At once: the server begins, and what was just written is still in the CPU's cache.
            if self._outbox:
                self._outbox.append(_Outgoing(buffers, reply))
                self._send()
            else:
                self._send_first(buffers, reply)
            if self._parked and self._sock.waits_for_write(bool(self._outbox)):
                self._poke()  # it waits for reading only
        else:
            self._outbox.append(_Outgoing(buffers, reply))
        return reply

    def _poke(self) -> None:
        """Have the task that drives look again."""
        self._poked = True
        self._ready.poke()

    def check(self) -> None:
        """Notice an end that came while nothing was asked for (a server's idle ``timeout``): see :attr:`lost`."""
        if not self._parser.pending and not self._driving:
            self._receive()

    def attend(self) -> None:
        """Let the event loop receive what comes, until somebody waits here. For who waits for another connection meanwhile:
        ``mget`` of 256 arrays from three servers reaches 0.82 of one server's rate, and 0.71 if they are read in turn.
        """
        if self._parser.pending and not self._driving:
            self._ready.watch(self._move)

    def _move(self) -> None:
        self._send()
        self._receive()

    async def wait(self, reply: Reply, *, eager: bool = False) -> None:
        """Return when the reply is done. Cancelled, the reply is abandoned: nothing more is written into its memory.

        ``eager``: if nothing else is on its way, hold the event loop for a moment rather than wait longer.

        Raises:
            ConnectionLost: the connection broke before the reply was complete.
        """
        try:
            while not reply.done:
                if self._driving:
                    reply.waiter = self._ready.waiter()
                    self._waiting.append(reply)
                    await reply.waiter.wait()
                else:
                    self._driving = True
                    self._ready.unwatch()
                    try:
                        await self._drive(reply, eager)
                    finally:
                        self._driving = False
                        self._hand_over()
        except BaseException:
            reply.waiter = None  # nobody sleeps there any more
            self.abandon(reply)
            self._hand_over()  # the wake-up may have come just before the cancellation
            raise
        if reply.error is not None:
            raise _copy(reply.error)

    def _hand_over(self) -> None:
        """Wake the next task that still waits, so that it drives."""
        while self._waiting and not self._driving:
            reply = self._waiting.popleft()
            # Of an abandoned one the task may wait nevertheless: a writer's, while a put is cancelled.
            if not reply.done and reply.waiter is not None:
                reply.waiter.wake()
                break

    async def _drive(self, reply: Reply, eager: bool) -> None:
        patience = PATIENCE
        while True:
            sent = self._send()
            # Before looking, not after: others queue their requests now, and no turn moves more than ~1 MB each way.
            await self._ready.pause()
            if self._receive() or sent:
                patience = PATIENCE
            elif eager and self._sock.is_local and len(self._parser.pending) == 1:
                eager = False
                self._spin()
            if reply.done:
                return
            patience -= 1
            if patience > 0:
                continue
            patience = PATIENCE
            write = self._sock.waits_for_write(bool(self._outbox))
            self._parked, self._poked = not write, False
            limit = min(self._asked + self.patience, self._timeout)
            began = time.monotonic()
            try:
                ready = await self._ready.wait(write=write, timeout=max(0.0, limit - self._silence))
            except BaseException:
                # Whoever waits next goes on counting: calls that are all cancelled earlier would never notice.
                self._silence += time.monotonic() - began
                raise
            finally:
                self._parked = False
            # Looking again: the loop may have been busy elsewhere all the time, and come to the timer first.
            if (ready and not self._poked) or self._receive() or self._send():
                self._silence = self._asked = 0.0
                continue
            if ready:  # by a request that came or was cancelled: no byte has moved
                self._silence += time.monotonic() - began
                if self._silence < limit:
                    continue
            self._silence = max(self._silence, limit)
            if self._silence >= self._timeout:
                self.abort(Stalled(f"no byte moved for {self._timeout:g} s while a reply was outstanding"))
                return
            if self.on_silence is not None:
                self._asked = self._silence
                await self.on_silence()

    def _spin(self) -> None:
        """Look until something comes, but not for long."""
        ends = time.perf_counter() + SPIN_SECONDS
        while not self._receive() and time.perf_counter() < ends:
            pass

    def _send_first(self, buffers: Sequence[Buffer], reply: Reply) -> None:
        """:meth:`_send` of a request before which nothing waits, in half of its time: most are taken whole."""
        size = sum(map(len, buffers))
        if size > TURN or len(buffers) > MAX_VECTORS:
            self._outbox.append(_Outgoing(buffers, reply))
            self._send()
            return
        try:
            count = self._sock.send(buffers)
        except Exception as error:  # not only OSError: see _send()
            self.abort(ConnectionLost(f"sending failed: {error}"))
            return
        if count:
            reply.sent = True
            self._counters.bytes_sent += count
        if count < size:
            self._outbox.append(_Outgoing(buffers, reply))
            self._took(count)

    def _send(self) -> int:
        """Hand the kernel what it takes of the outbox, ~1 MB at most; how many bytes it took."""
        outbox = self._outbox
        if not outbox:
            return 0
        buffers: list[Buffer] = []
        room = TURN
        for outgoing in outbox:
            for buffer in outgoing.rest(MAX_VECTORS - len(buffers)):
                size = len(buffer)
                if size >= room:
                    buffers.append(memoryview(buffer)[:room])
                    room = 0
                    break
                buffers.append(buffer)
                room -= size
            if not room or len(buffers) == MAX_VECTORS:
                break
        try:
            count = self._sock.send(buffers)
        except Exception as error:  # not only OSError: what cannot be sent must not stay first in the queue
            self.abort(ConnectionLost(f"sending failed: {error}"))
            return 0
        self._took(count)
        self._counters.bytes_sent += count
        return count

    def _took(self, count: int) -> None:
        """The kernel has taken so many bytes of the outbox."""
        outbox, left = self._outbox, count
        while left:
            outgoing = outbox[0]
            outgoing.reply.sent = True
            rest = len(outgoing.buffers[outgoing.index]) - outgoing.offset
            if left < rest:
                outgoing.offset += left
                break
            left -= rest
            outgoing.offset = 0
            outgoing.index += 1
            if outgoing.index == len(outgoing.buffers):
                outbox.popleft()

    def _receive(self) -> bool:
        """Take what the kernel has, ~1 MB at most; whether there was anything."""
        if self.lost is not None:
            return False
        try:
            count = self._sock.receive(self._parser.get_buffers())
            if count < 0:
                return False
            if count == 0:
                raise ConnectionLost("the server closed the connection")
            self._counters.bytes_received += count
            self._silence = self._asked = 0.0
            done = self._parser.advance(count)
        except Exception as error:  # whatever it was, the parser is in the middle of a reply now
            self.abort(error if isinstance(error, ConnectionLost) else ConnectionLost(f"receiving failed: {error!r}"))
            return False
        for reply in done:
            if reply.waiter is not None:
                reply.waiter.wake()
        return True

    def abandon(self, reply: Reply) -> None:
        """Its caller goes away: its memory is not read or written any more, its reply, if one comes, is dropped."""
        if reply.done:
            return
        for outgoing in self._outbox:
            if outgoing.reply is reply:
                if not reply.sent:
                    self._outbox.remove(outgoing)
                    self._parser.pending.remove(reply)
                    reply.done = True
                    if reply.waiter is not None:
                        reply.waiter.wake()
                    self._poke()  # the driver, if the reply is the one that it waits for
                    return
                rest = outgoing.rest()
                if sum(len(part) for part in rest) > MAX_SNAPSHOT:
                    self.abort(ConnectionLost("a large request was cancelled half-sent"))
                    return
                outgoing.buffers, outgoing.index, outgoing.offset = [b"".join(rest)], 0, 0
                break
        try:
            self._parser.abandon(reply)
        except ProtocolError as error:
            self.abort(error)

    def abort(self, error: Exception) -> None:
        """Close at once; every outstanding request fails with a copy of ``error``. Never waits; may be called again.

        Bytes that are no RESP2 are the answer to the first of them only; the others have lost their connection.
        """
        if self.lost is not None:
            return
        self.lost = ConnectionLost(*error.args) if isinstance(error, ProtocolError) else _copy(error)
        self._ready.closing()
        self._sock.raw.close()
        self._outbox.clear()
        for reply in self._parser.pending:
            reply.done = True
            reply.error = _copy(error)
            error = self.lost
        self._parser.clear()
        for reply in self._waiting:  # also those whose replies were complete when the bytes behind them made no sense
            if reply.waiter is not None:
                reply.waiter.wake()

    def detach(self) -> socket.socket:
        """The bare socket, blocking, from now on the caller's. Nothing may be outstanding; this connection is closed."""
        self.lost = ConnectionLost("its socket was taken away")
        self._ready.closing()
        self._sock.raw.setblocking(True)
        return self._sock.raw

    def close(self) -> None:
        """Close at once. Requests that are still outstanding fail with :class:`ConnectionLost`."""
        self.abort(ConnectionLost("the client is closed"))


def _copy(error: Exception) -> Any:
    """The same error for another task: one instance raised in two tasks would mix their tracebacks."""
    return type(error)(*error.args)

"""RESP2, the Redis serialization protocol, without any IO (https://redis.io/docs/latest/develop/reference/protocol-spec/).

Sending: :func:`encode` turns a command into a list of buffers; a big argument stays the caller's memory.

Receiving: one :class:`Reply` says what one request expects back, :class:`Parser` keeps them in order. Its caller asks
:meth:`Parser.get_buffers` where the next bytes belong, lets the kernel write there, and reports how many came with
:meth:`Parser.advance`. Two paths lead from the bytes to the result:

* The **generic** path understands every reply. Bytes come into one staging buffer; the payload of a bulk string that
  is not there yet is received straight into the destination that :meth:`Reply.bulk` names.
* The **predicted** path serves replies whose bytes are known except for their payloads (``+OK``, an MGET of arrays of one
  dtype and shape). Their :class:`Template` lays destinations and expected bytes out in order, so one system call scatters
  over many replies; the expected bytes are compared afterwards. A reply that is not as predicted is moved to the staging
  buffer as it came and parsed by the generic path, so a prediction can cost time but never correctness.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from numbers import Real
from typing import Any, TypeAlias, cast

from aionpredis.errors import ProtocolError, Redirected, ServerError, ServerFull, ServerUnavailable, UsageError
from aionpredis.memory import aligned_empty

__all__ = ["Blob", "Buffer", "Parser", "Pattern", "Reply", "Template", "encode", "encode_bytes", "encode_set", "split"]

Buffer: TypeAlias = "bytes | bytearray | memoryview"
Argument: TypeAlias = "bytes | str | int | float | Buffer | Blob"

STAGING = 256 * 1024
"""Bytes of the staging buffer: small enough for the L2 cache, large enough that a burst of small replies is one call."""

MAX_LINE = 64 * 1024
"""Bytes. A line (an error, a status, a number) that is longer is not RESP; redis-server's own limit for inline input."""

MAX_DEPTH = 32
"""Arrays within arrays. The deepest reply of a stock server (``COMMAND DOCS``) stays below 10."""

MAX_BULK = 512 << 20
"""Bytes: the server's default ``proto-max-bulk-len``. A longer string than the client allows ends the connection."""

MAX_GATHER = 4 << 20
"""Bytes of a half-received predicted reply that are copied when its caller goes away, before dropping them is cheaper."""

MAX_VECTORS = 64
"""Buffers for one system call. More brought nothing (Linux' limit is 1024)."""

TURN = 1 << 20
"""Bytes for one system call: with a yield after each, another task waits ~1 ms instead of ~150 ms for 500 MB."""


# --- sending ---------------------------------------------------------------------------------------------------------


class Blob:
    """An argument whose bytes lie in several places: ``parts``, ``size`` bytes together. Borrows the parts' memory."""

    __slots__ = ("parts", "size")

    def __init__(self, parts: Sequence[Buffer]) -> None:
        self.parts = parts
        self.size = sum(len(part) for part in parts)


SMALL = 1024
"""Bytes. Joining a shorter buffer to its neighbour costs less than the kernel's handling of one more vector."""


def encode(*arguments: Argument) -> list[Buffer]:
    """The buffers of one command. Small arguments are joined; large ones stay borrowed, uncopied.

    Raises:
        UsageError: an argument is none that a command can have.
    """
    buffers: list[Buffer] = []
    text = bytearray(b"*%d\r\n" % len(arguments))
    for argument in arguments:
        if isinstance(argument, Blob):
            text += b"$%d\r\n" % argument.size
            parts = argument.parts
        else:
            raw = argument if isinstance(argument, bytes) else _raw(argument)
            text += b"$%d\r\n" % len(raw)
            parts = (raw,)
        for part in parts:
            if len(part) < SMALL:
                text += part
            else:
                if text:
                    buffers.append(text)
                    text = bytearray()
                buffers.append(part)
        text += b"\r\n"
    buffers.append(text)
    return buffers


def _raw(argument: object) -> Buffer:
    """An argument's bytes. A view of several axes, or of longer items, has a ``len`` that is not its size in bytes."""
    try:
        if isinstance(argument, str):
            return argument.encode()
        if isinstance(argument, bytearray):
            return argument
        if isinstance(argument, memoryview):
            return argument.cast("B")
        if isinstance(argument, Real) and not isinstance(argument, bool):  # NumPy's numbers are Real, too
            return str(argument).encode()
    except (TypeError, ValueError) as error:
        raise UsageError(f"an argument's bytes cannot be had: {error}") from error
    raise UsageError(f"an argument is str, bytes, a bytes-like view, int or float, not {type(argument).__name__}")


def encode_bytes(arguments: Sequence[bytes]) -> list[Buffer]:
    """A command of short ``bytes`` only: what :func:`encode` gives, in a third of its time."""
    return [b"*%d\r\n" % len(arguments) + b"".join([b"$%d\r\n%b\r\n" % (len(part), part) for part in arguments])]


def encode_set(key: bytes, head: bytes, payload: Buffer, options: bytes = b"", extra: int = 0) -> list[Buffer]:
    """``SET key head+payload [options]``: what :func:`encode` gives, in a fifth of its time.

    ``options``: ``extra`` further arguments, encoded already.
    """
    text = b"*%d\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b" % (3 + extra, len(key), key, len(head) + len(payload), head)
    if len(payload) < SMALL:
        return [b"".join((text, payload, b"\r\n", options))]
    return [text, payload, b"\r\n" + options]


def split(request: Buffer) -> list[memoryview]:
    """The commands of a request, one by one, as views on it."""
    raw, view = bytes(request), memoryview(request)
    commands: list[memoryview] = []
    at = 0
    while at < len(raw):
        start, end = at, raw.index(b"\r\n", at)
        count, at = int(raw[at + 1 : end]), end + 2
        for _ in range(count):
            end = raw.index(b"\r\n", at)
            at = end + 2 + int(raw[at + 1 : end]) + 2
        commands.append(view[start:at])
    return commands


# --- receiving -------------------------------------------------------------------------------------------------------


class Pattern:
    """The bytes of a reply that are known beforehand, and the sizes of the payloads between them.

    ``items``: each an expected ``bytes`` or an ``int``, the length of a payload. Immutable; made once per kind of request.
    """

    __slots__ = (
        "ends",
        "expected",
        "literal_ends",
        "payload_slots",
        "period",
        "scratch_slices",
        "scratch_slots",
        "size",
    )

    def __init__(self, items: Sequence[bytes | int]) -> None:
        sizes = [item if isinstance(item, int) else len(item) for item in items]
        lengths = [0 if isinstance(item, int) else len(item) for item in items]
        self.ends = list(accumulate(sizes))
        self.size = self.ends[-1]
        self.expected = b"".join(item for item in items if isinstance(item, bytes))
        # literal_ends[i]: how many expected bytes the first i items hold
        self.literal_ends = [0, *accumulate(lengths)]
        self.scratch_slots = [i for i, item in enumerate(items) if isinstance(item, bytes)]
        self.payload_slots = [i for i, item in enumerate(items) if isinstance(item, int)]
        # Expected bytes, then as many payloads each time, and so on: their places are then set four times as fast.
        period = self.scratch_slots[1] - self.scratch_slots[0] if len(self.scratch_slots) > 1 else 0
        self.period = period if period and self.scratch_slots == list(range(0, len(items), period)) else 0
        self.scratch_slices = [slice(self.literal_ends[i], self.literal_ends[i + 1]) for i in self.scratch_slots]


class Template:
    """One predicted reply on its way: a :class:`Pattern` and the memory that its payloads go to."""

    __slots__ = ("_dropped", "_slots", "_verified", "pattern", "received", "scratch")

    def __init__(self, pattern: Pattern, payloads: Sequence[memoryview]) -> None:
        self.pattern = pattern
        self.scratch = bytearray(len(pattern.expected))
        self.received = 0
        self._verified = 0
        self._dropped = False
        if not payloads:
            self._slots: list[memoryview | None] = [memoryview(self.scratch)]
            return
        view = memoryview(self.scratch)
        self._slots = [None] * len(pattern.ends)
        literals = [view[part] for part in pattern.scratch_slices]
        if period := pattern.period:
            self._slots[::period] = literals
            for place in range(1, period):
                self._slots[place::period] = payloads[place - 1 :: period - 1]
            return
        for slot, literal in zip(pattern.scratch_slots, literals, strict=True):
            self._slots[slot] = literal
        for slot, payload in zip(pattern.payload_slots, payloads, strict=True):
            self._slots[slot] = payload

    def missing(self, into: list[memoryview], room: int) -> int:
        """Append the buffers that are still to fill, ``room`` bytes at most; return how much room is left."""
        ends = self.pattern.ends
        at = self.received
        if not at and self.pattern.size <= room and not self._dropped:
            into += self._slots  # type: ignore[arg-type]  # None stands only for what was dropped
            return room - self.pattern.size
        index = bisect_right(ends, at)
        if not self._dropped:
            return self._tail(index, into, room)
        for slot, end in zip(self._slots[index:], ends[index:], strict=True):
            size = end - at
            at = end
            if slot is None:
                if not size:
                    continue
                into.append(DROPPED[: min(size, room)])
                return 0
            if size > room:
                into.append(slot[len(slot) - size :][:room])
                return 0
            into.append(slot[len(slot) - size :])
            room -= size
        return room

    def _tail(self, first: int, into: list[memoryview], room: int) -> int:
        """:meth:`missing` from this slot on. Half of all replies arrive in two pieces, so it does not go slot by slot."""
        ends, slots = self.pattern.ends, cast("list[memoryview]", self._slots)
        until = self.received + room
        beyond = bisect_right(ends, until, first)  # the first slot that does not fit in whole
        if first == len(ends):
            return room
        slot = slots[first]
        into.append(slot[len(slot) - (ends[first] - self.received) :][:room])
        if beyond == first:
            return 0
        into += slots[first + 1 : beyond]
        if beyond == len(ends):
            return until - self.pattern.size
        if rest := until - ends[beyond - 1]:
            into.append(slots[beyond][:rest])
        return 0

    def advance(self, count: int) -> int:
        """``count`` more bytes have arrived; return how many of them lie beyond this reply."""
        self.received += count
        beyond = self.received - self.pattern.size
        if beyond <= 0:
            return 0
        self.received = self.pattern.size
        return beyond

    def verify(self) -> bool:
        """Whether what arrived is as expected, to the last byte: a shorter reply (``$-1``) must not be waited for."""
        pattern = self.pattern
        if self.received == pattern.size:
            return self.scratch == pattern.expected
        index = bisect_right(pattern.ends, self.received)
        known = pattern.literal_ends[index]
        if pattern.literal_ends[index + 1] > known:
            known += self.received - (pattern.ends[index - 1] if index else 0)
        if known == self._verified:
            return True
        self._verified = known
        return self.scratch.startswith(pattern.expected[:known])

    def arrived(self) -> list[memoryview]:
        """What has been received, in order."""
        parts: list[memoryview] = []
        left = self.received
        for slot in self._slots:
            if not left:
                break
            if slot is None:
                raise ProtocolError("a reply whose caller was cancelled is not what was asked for")
            parts.append(slot[:left])
            left -= len(parts[-1])
        return parts

    def drop(self) -> None:
        """Let nothing more be written into the payloads' memory."""
        self._dropped = True
        for slot in self.pattern.payload_slots:
            self._slots[slot] = None


class Reply:
    """What one request expects back: ``count`` RESP replies in a row.

    When ``done``, either ``error`` is set (the connection broke), or ``matched`` is true (all went as the template
    predicted; ``values`` is empty), or ``values`` holds ``count`` results: ``bytes``, ``int``, ``None``, lists of them,
    :class:`ServerError` instances, and whatever :meth:`bulk` named. ``refusal``: the last of them that may pass;
    ``redirected``: whether another server has to be asked for some of them.
    """

    __slots__ = (
        *("abandoned", "count", "done", "error", "matched", "redirected", "refusal"),
        *("sent", "template", "values", "waiter"),
    )

    def __init__(self, count: int = 1, template: Template | None = None) -> None:
        self.count = count
        self.template = template
        self.values: list[Any] = []
        self.done = False
        self.matched = False
        self.redirected = False
        self.abandoned = False
        self.sent = False  # a byte of the request was given to the kernel
        self.error: Exception | None = None
        self.refusal: ServerUnavailable | None = None
        self.waiter: Any = None

    def bulk(self, size: int) -> tuple[Sequence[memoryview], Any] | None:
        """Where the next bulk string of ``size`` bytes goes, and what stands for it in ``values``; ``None``: as ``bytes``."""
        return None

    element: Callable[[bytearray, int, int], tuple[Any, int] | None] | None = None
    """A shortcut for a reply that is a long array: ``element(staging, start, end)`` may give the element that begins at
    ``start``, and where it ends, if it is complete there and looks as expected; otherwise it is parsed as usual."""

    def accepts(self, value: Any) -> bool:
        """Whether the server may answer so. If not, this is another request's reply: the connection is given up."""
        return True

    def again(self) -> Reply:
        """What one of its commands expects back elsewhere."""
        return type(self)()

    def result(self) -> Any:
        """The only value; raises it if it is a :class:`ServerError`."""
        (value,) = self.values
        if isinstance(value, ServerError):
            raise value
        return value


_REDIRECTION = re.compile(r"(MOVED|ASK) (\d{1,5}) \S*:(\d{1,5})", re.ASCII)

SLOTS = 16_384
"""Of a cluster."""


def server_error(line: bytes) -> ServerError:
    text = line.decode("utf-8", "replace")
    code = text.partition(" ")[0]
    if code == "OOM":
        return ServerFull(text)
    there = _REDIRECTION.fullmatch(text)
    if there and int(there[2]) < SLOTS and int(there[3]) < 1 << 16:
        return Redirected(text)
    return ServerUnavailable(text) if code in ServerUnavailable.CODES else ServerError(text)


DROPPED = memoryview(bytearray(STAGING))
"""Bytes that nobody wants are received here, over and over."""

_INCOMPLETE: Any = object()


class _Whole:
    """A long bulk string that nobody named a place for: it becomes ``bytes`` when it is complete."""

    __slots__ = ("memory",)

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory


class Parser:
    """Replies in the order of their requests. See the module's text for the two paths.

    ``refused``: is told the code of each error that the server answers with, also if nobody waits for that any more.
    """

    def __init__(self, max_bulk: int = MAX_BULK, refused: Callable[[str], None] | None = None) -> None:
        self.pending: deque[Reply] = deque()
        self._max_bulk = max_bulk
        self._refused = refused
        self._staging = bytearray(STAGING)
        self._view = memoryview(self._staging)
        self._start = 0  # staging[start:end] arrived and is not parsed yet
        self._end = 0
        self._stack: list[tuple[int, list[Any]]] = []  # arrays that are being filled: (length, items)
        self._body: deque[memoryview | int] = deque()  # places of the bulk string being received; int: dropped
        self._body_value: Any = None
        self._in_body = False

    def expect(self, reply: Reply) -> None:
        """The next reply that the server has not been asked for yet is this one."""
        self.pending.append(reply)

    # where the bytes go

    def get_buffers(self) -> list[memoryview]:
        """Where the next bytes belong, in order. Never empty."""
        buffers: list[memoryview] = []
        room = TURN
        if self._in_body:
            for place in self._body:
                if isinstance(place, int):
                    buffers.append(DROPPED[:place])
                    return buffers
                if len(place) > room:
                    buffers.append(place[:room])
                    return buffers
                buffers.append(place)
                room -= len(place)
                if len(buffers) >= MAX_VECTORS:
                    return buffers
        elif self._start == self._end and not self._stack:
            for reply in self.pending:
                if reply.template is None or reply.values:
                    break
                room = reply.template.missing(buffers, room)
                if room == 0 or len(buffers) >= MAX_VECTORS:
                    return buffers[:MAX_VECTORS]
        if self._start == self._end:
            self._start = self._end = 0
            if len(self._staging) > STAGING:
                self._replace_staging()
        elif len(self._staging) - self._end < STAGING // 4:
            self._compact()
        buffers.append(self._view[self._end :])
        return buffers

    def _compact(self) -> None:
        """Make room behind the unparsed bytes: move them to the front, or to a larger buffer if they fill this one."""
        unparsed = self._view[self._start : self._end]
        if len(unparsed) > len(self._staging) // 2:
            self._replace_staging(unparsed)
        else:
            self._staging[: len(unparsed)] = bytes(unparsed)
            self._start, self._end = 0, len(unparsed)

    def _replace_staging(self, *parts: Buffer) -> None:
        total = sum(len(part) for part in parts)
        staging = bytearray(max(2 * total, STAGING))
        at = 0
        for part in parts:
            staging[at : at + len(part)] = part
            at += len(part)
        self._staging, self._view = staging, memoryview(staging)
        self._start, self._end = 0, total

    # what has come

    def advance(self, count: int) -> list[Reply]:
        """``count`` bytes were written into the buffers of the last :meth:`get_buffers`; the replies that are complete now.

        Raises:
            ProtocolError: these bytes are not RESP2, or nobody asked for them. The connection must be closed.
        """
        done: list[Reply] = []
        if self._in_body:
            count = self._advance_body(count)
        elif self._start == self._end and not self._stack:
            count = self._advance_templates(count, done)
        self._end += count
        if self._end > self._start or self._in_body:
            self._parse(done)
        return done

    def _advance_body(self, count: int) -> int:
        body = self._body
        while count and body:
            place = body[0]
            size = place if isinstance(place, int) else len(place)
            if count < size:
                body[0] = place - count if isinstance(place, int) else place[count:]
                return 0
            body.popleft()
            count -= size
        return count

    def _advance_templates(self, count: int, done: list[Reply]) -> int:
        """Account for bytes that were scattered over predicted replies; return how many went to the staging buffer."""
        pending = self.pending
        while count and pending:
            reply = pending[0]
            template = reply.template
            if template is None or reply.values:
                break
            count = template.advance(count)
            if not template.verify():
                self._unpredict(count)
                return 0
            if template.received == template.pattern.size:
                reply.matched = True
                self._finish(done)
        return count

    def _unpredict(self, count: int) -> None:
        """The first pending reply is not as predicted: move it, and the ``count`` bytes behind it, to the staging buffer."""
        parts: list[Buffer] = []
        for index, reply in enumerate(self.pending):
            template = reply.template
            if template is None or (index and not count):
                break
            if index:
                count = template.advance(count)
            parts += template.arrived()
            template.received = 0
        parts.append(self._view[self._end : self._end + count])
        self.pending[0].template = None
        self._replace_staging(*parts)

    def _finish(self, done: list[Reply]) -> None:
        reply = self.pending.popleft()
        reply.done = True
        reply.template = None
        done.append(reply)

    # the generic path

    def _parse(self, done: list[Reply]) -> None:
        while True:
            if not self._in_body and self._start == self._end:
                return
            if not self.pending:
                text = bytes(self._view[self._start : min(self._end, self._start + 80)])
                raise ProtocolError(f"the server sent something that nobody asked for: {text!r}")
            reply = self.pending[0]
            if reply.template is not None and not self._in_body and not self._stack and not reply.values:
                if not self._feed_template(reply, reply.template, done):
                    return
                continue
            if not self._parse_values(reply):
                return
            self._finish(done)

    def _parse_values(self, reply: Reply) -> bool:
        """Take staged values of this reply; whether it has all."""
        stack = self._stack
        while True:
            if reply.element is not None and len(stack) == 1:
                self._take_elements(reply.element, *stack[0])
            value = self._next_value(reply)
            if value is _INCOMPLETE:
                return False
            while stack:
                length, items = stack[-1]
                items.append(value)
                if len(items) < length:
                    break
                value = items
                stack.pop()
            else:
                if not (reply.abandoned or reply.accepts(value)):
                    raise ProtocolError(f"a reply of another kind than was asked for: {type(value).__name__}")
                reply.values.append(value)
                if len(reply.values) == reply.count:
                    return True

    def _take_elements(
        self, element: Callable[[bytearray, int, int], tuple[Any, int] | None], length: int, items: list[Any]
    ) -> None:
        """Take staged elements of an array by the reply's shortcut; at least one is left, to end the array."""
        while len(items) < length - 1 and (found := element(self._staging, self._start, self._end)):
            value, self._start = found
            items.append(value)

    def _feed_template(self, reply: Reply, template: Template, done: list[Reply]) -> bool:
        """Move staged bytes to where the prediction wants them; whether parsing can go on with what is staged."""
        buffers: list[memoryview] = []
        template.missing(buffers, self._end - self._start)
        start, moved = self._start, 0
        for buffer in buffers:
            buffer[:] = self._view[start + moved : start + moved + len(buffer)]
            moved += len(buffer)
        template.advance(moved)
        if not template.verify():
            # The bytes of earlier calls lie in the template only, these here in both.
            template.received -= moved
            if template.received:  # only of the first: to move all the others for each of them would be quadratic
                self._replace_staging(*template.arrived(), self._view[start : self._end])
            reply.template = None
            return True
        self._start += moved
        if template.received < template.pattern.size:
            return self._start < self._end
        reply.matched = True
        self._finish(done)
        return True

    def _next_value(self, reply: Reply) -> Any:
        """The next complete value that is not an array with elements, or ``_INCOMPLETE``."""
        if self._in_body:
            return self._take_body()
        staging, end = self._staging, self._end
        while True:
            start = self._start
            stop = staging.find(b"\r\n", start, end)
            if (end - 1 if stop < 0 else stop) - start > MAX_LINE:  # its \r may be the last that has come
                raise ProtocolError(f"no end of line within {MAX_LINE} bytes")
            if stop < 0:
                return _INCOMPLETE
            kind = staging[start]
            line = staging[start + 1 : stop]
            behind = stop + 2
            if kind == 0x24:  # $
                size = self._number(line)
                if size > self._max_bulk or size < -1:
                    raise ProtocolError(f"a bulk string of {size} bytes (max_value_bytes is {self._max_bulk})")
                if size >= 0:
                    place = None if reply.abandoned else reply.bulk(size)
                    if place is None and not reply.abandoned and size + 2 <= STAGING // 2:
                        if end - behind < size + 2:
                            return _INCOMPLETE  # it fits into the staging buffer: wait until it is all there
                        self._start = behind + size + 2
                        if not staging.startswith(b"\r\n", behind + size):
                            raise ProtocolError("a bulk string that is longer than its announced length")
                        return bytes(staging[behind : behind + size])
                    self._start = behind
                    self._begin_body(reply, size, place)
                    return self._take_body()
                value: Any = None
            elif kind == 0x2B:  # +
                value = bytes(line)
            elif kind == 0x3A:  # :
                value = self._number(line)
            elif kind == 0x2D:  # -
                value = server_error(bytes(line))
                if self._refused is not None:
                    self._refused(value.code)
                if self._stack:
                    pass  # one among the results of a command that has run
                elif isinstance(value, ServerUnavailable):
                    reply.refusal = value
                elif isinstance(value, Redirected):
                    reply.redirected = True
            elif kind == 0x2A:  # *
                length = self._number(line)
                if length > 0:
                    if len(self._stack) >= MAX_DEPTH:
                        raise ProtocolError(f"arrays nested deeper than {MAX_DEPTH}")
                    self._stack.append((length, []))
                    self._start = behind
                    if behind == end:
                        return _INCOMPLETE
                    continue
                if length < -1:
                    raise ProtocolError(f"an array of {length} elements")
                value = [] if length == 0 else None
            else:
                raise ProtocolError(f"a reply that begins with {bytes([kind]) + line[:40]!r}")
            self._start = behind
            return value

    @staticmethod
    def _number(line: bytearray) -> int:
        if len(line) > 20 or not (line.isdigit() or (line[:1] == b"-" and line[1:].isdigit())):
            raise ProtocolError(f"{bytes(line[:40])!r} where a number belongs")
        return int(line)

    def _begin_body(self, reply: Reply, size: int, place: tuple[Sequence[memoryview], Any] | None) -> None:
        self._in_body = True
        if reply.abandoned:
            self._body_value = None
            if size:
                self._body.append(size)
        elif place is None:
            self._body_value = _Whole(aligned_empty(size).data)
            self._body.append(self._body_value.memory)
        else:
            self._body_value = place[1]
            self._body.extend(part for part in place[0] if len(part))

    def _take_body(self) -> Any:
        """Move staged bytes to their places; the value once its bytes and the end of line are there."""
        body = self._body
        while body and self._start < self._end:
            place = body[0]
            size = place if isinstance(place, int) else len(place)
            count = min(size, self._end - self._start)
            if not isinstance(place, int):
                place[:count] = self._view[self._start : self._start + count]
            self._start += count
            self._advance_body(count)
        if body or self._end - self._start < 2:
            return _INCOMPLETE
        if self._staging[self._start : self._start + 2] != b"\r\n":
            raise ProtocolError("a bulk string that is longer than its announced length")
        self._start += 2
        self._in_body = False
        value, self._body_value = self._body_value, None
        return value.memory.tobytes() if isinstance(value, _Whole) else value

    # callers who go away

    def abandon(self, reply: Reply) -> None:
        """Nothing is written into this reply's memory any more; its bytes are received and dropped."""
        reply.abandoned = True
        template = reply.template
        if template is not None:
            if template.received > MAX_GATHER:
                template.drop()
            else:
                if template.received:
                    # Only the first pending reply can be half there, and then nothing is staged.
                    self._replace_staging(*template.arrived())
                reply.template = None
        if self._in_body and self.pending and self.pending[0] is reply:
            left = sum(place if isinstance(place, int) else len(place) for place in self._body)
            self._body.clear()
            if left:
                self._body.append(left)
            self._body_value = None
        if self._stack and self.pending[0] is reply:
            for _, items in self._stack:
                items[:] = [None] * len(items)  # only their number is wanted

    def clear(self) -> None:
        """Let go of all memory. Nothing may come any more."""
        self.pending.clear()
        self._stack.clear()
        self._body.clear()
        self._body_value = None
        self._staging, self._view = bytearray(), memoryview(b"")

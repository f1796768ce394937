"""Versions of a policy's weights, from one trainer to any number of actors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from numpy.typing import NDArray

from aionpredis import streams
from aionpredis.errors import UsageError
from aionpredis.names import check_name
from aionpredis.requests import encode_record, set_command, ttl_options

if TYPE_CHECKING:
    from aionpredis.client import Client

__all__ = ["Policy", "PolicyVersion", "PolicyWatch"]

LEASE = 60.0
"""Seconds that weights live before they are announced: a publisher that dies in between leaves nothing behind."""


class PolicyVersion(NamedTuple):
    """``version``: 1, 2, …; ``weights``: arrays by name, memory of their own."""

    version: int
    weights: dict[str, NDArray[Any]]


class Policy:
    """Published versions of a policy's weights. Made by :meth:`aionpredis.Client.policy`.

    Each version is one immutable record under a key of its own; a small stream only announces it. So a thousand waiting
    actors cost the server a thousand small messages, and each fetches the weights when it wants them.

    ``name``: letters, digits, ``_``, ``.``, ``-``; a replay's policy has the replay's name. ``keep``: how many versions
    stay readable; publishing deletes older ones.
    """

    def __init__(self, client: Client, name: str, *, keep: int = 4) -> None:
        self.name = check_name(name)
        if keep < 1:
            raise UsageError(f"keep is at least 1, not {keep}")
        self._client = client
        self._keep = keep
        self._stream = f"{{{name}}}:policy"

    def __repr__(self) -> str:
        return f"<aionpredis.Policy {self.name}>"

    def _key(self, version: int, token: str) -> str:
        return f"{self.name}:policy:{version}:{token}"

    async def publish(self, weights: Mapping[str, object]) -> int:
        """Make ``weights`` the newest version; its number. Publishers on other hosts may do so at the same time.

        Raises:
            EncodeError: a weight's dtype cannot stand in a record; nothing was sent.
            ServerFull: the server's memory is full.
        """
        client = self._client
        token = os.urandom(8).hex()
        value = await client.encode_value(encode_record, weights, None, self.name)
        while True:
            last = await streams.last_generated(client, self._stream)
            version = 1 if last is None else last[0] + 1
            key = self._key(version, token)
            await client.send(set_command(key.encode(), value, ttl_options(LEASE)))
            if not await streams.claim(client, self._stream, version, {b"token": token.encode()}, make=True):
                await client.call("UNLINK", key, repeatable=True)  # another publisher took this number
            elif await client.call("PERSIST", key, repeatable=True) or await client.exists(key):
                break  # EXISTS: a repeated PERSIST says 0, too. If the lease ran out, they become the next version
        await self._forget(version - self._keep)
        return version

    async def _forget(self, version: int) -> None:
        """Delete this version and the older ones: the weights first, so that a crash leaves nothing unnamed."""
        if version < 1:
            return
        old = await streams.page(self._client, self._stream, "-", f"{version}-0")
        if old:
            keys = [self._key(left, fields[b"token"].decode()) for (left, _), fields in old]
            await self._client.call("UNLINK", *keys, repeatable=True)
            await self._client.call("XTRIM", self._stream, "MINID", f"{version + 1}-0", repeatable=True)

    async def latest(self) -> PolicyVersion | None:
        """The newest version; ``None`` if none was published."""
        return (await self._newest(0, b""))[1]

    async def _newest(self, after: int, token: bytes) -> tuple[int, PolicyVersion | None, bytes]:
        """The newest version's number; the newest that can be read, with its token, unless that one is ``after``."""
        newest: streams.Entry | None = None
        while True:
            entries = await streams.newest(self._client, self._stream, self._keep)
            if not entries or entries[0] == newest:
                return newest[0][0] if newest else after, None, b""
            # One that is not there was deleted meanwhile, or its publisher died when it had just announced it.
            newest = entries[0]
            for entry in entries:
                (version, _), fields = entry
                if version == after and token in (b"", fields[b"token"]):
                    return newest[0][0], None, b""
                found = await self._load(entry)
                if found is not None:
                    return newest[0][0], found, fields[b"token"]

    async def get(self, version: int) -> PolicyVersion | None:
        """That version; ``None`` if there is none, or it was deleted as old."""
        entries = await streams.page(self._client, self._stream, f"{version}-0", f"{version}-0")
        return await self._load(entries[0]) if entries else None

    async def _load(self, entry: streams.Entry) -> PolicyVersion | None:
        (version, _), fields = entry
        weights = await self._client.get_record(self._key(version, fields[b"token"].decode()))
        return None if weights is None else PolicyVersion(version, weights)

    async def delete(self) -> None:
        """Delete all versions. Who publishes afterwards begins with version 1 again."""
        versions = await streams.page(self._client, self._stream, "-", "+")
        keys = [self._key(left, fields[b"token"].decode()) for (left, _), fields in versions]
        await self._client.call("UNLINK", *keys, self._stream, repeatable=True)

    def watch(self, after: int = 0) -> PolicyWatch:
        """``async for version, weights in policy.watch():`` each time the newest version to date, as it appears.

        ``after``: begin behind that version; 0 yields the present one first. Versions published in quick succession are
        skipped over. Waits for ever if nothing is published.
        """
        return PolicyWatch(self, after)


class PolicyWatch:
    """Iterator of :meth:`Policy.watch`; nothing has to be closed."""

    def __init__(self, policy: Policy, after: int) -> None:
        self._policy = policy
        self._after = after
        self._token = b""

    def __aiter__(self) -> PolicyWatch:
        return self

    async def __anext__(self) -> PolicyVersion:
        policy = self._policy
        while True:
            # Any other version is news: a smaller number means that the stream was deleted and begun again.
            newest, found, token = await policy._newest(self._after, self._token)
            if found is not None:
                self._after, self._token = found.version, token
                return found
            await streams.read_blocking(policy._client, policy._stream, (newest, 0), 1)

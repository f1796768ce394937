"""Versions of a policy's weights, without async."""

from __future__ import annotations

import aionpredis
from aionpredis import policy
from aionpredis.blocking.facade import Facade, Steps, made, waits

__all__ = ["Policy", "PolicyWatch"]


class PolicyWatch(Steps[policy.PolicyWatch, aionpredis.PolicyVersion]):
    """Iterator of :meth:`Policy.watch`; nothing has to be closed."""


class Policy(Facade[aionpredis.Policy]):
    """:class:`aionpredis.Policy` without async. Made by :meth:`Client.policy`; of a replay: :attr:`Replay.policy`."""

    publish = waits(aionpredis.Policy.publish)
    latest = waits(aionpredis.Policy.latest)
    get = waits(aionpredis.Policy.get)
    delete = waits(aionpredis.Policy.delete)
    watch = made(PolicyWatch, aionpredis.Policy.watch)

    @property
    def name(self) -> str:
        return self._target.name

"""What can go wrong in a demo, and how to find it in a task group's exception."""

from __future__ import annotations

from aionpredis.errors import AionpredisError

__all__ = ["DemoFailed", "cause_of"]


class DemoFailed(AionpredisError):
    """A simulator ended too early, or not at all."""


def cause_of(error: BaseException, kinds: tuple[type[BaseException], ...] = (AionpredisError,)) -> BaseException | None:
    """The error of these kinds that a task group, or nested ones, raised; ``None`` if there is another among them."""
    if isinstance(error, kinds):
        return error
    if isinstance(error, BaseExceptionGroup):
        causes = [cause_of(each, kinds) for each in error.exceptions]
        return None if None in causes else causes[0]
    return None

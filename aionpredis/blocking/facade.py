"""How a blocking class is made of an async one: its methods are the async class' own, run in the loop and waited for.

So names, parameters, types and docstrings are those of the async class, and cannot differ from them.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Concatenate, Generic, NoReturn, ParamSpec, Self, TypeVar

from aionpredis.blocking.loop import Host, Loop
from aionpredis.errors import UsageError

__all__ = ["Entered", "Facade", "Steps", "in_loop", "like", "made", "waits", "waits_for"]

A = TypeVar("A")
C = TypeVar("C", bound=Callable[..., object])
F = TypeVar("F", bound="Facade[Any]")
P = ParamSpec("P")
T = TypeVar("T")


class Facade(Generic[A]):
    """The blocking side of an async object. ``owner``: what must not be collected before it."""

    def __init__(self, loop: Loop, target: A, owner: object) -> None:
        self._loop = loop
        self._target = target
        self._owner = owner

    def __repr__(self) -> str:
        return repr(self._target).replace("<aionpredis.", "<aionpredis.blocking.", 1)

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            f"a {type(self).__name__} cannot be copied or sent to another process: call blocking.connect() there"
        )


class Entered(Facade[A]):
    """A facade for ``with``."""

    _host: Host | None = None

    def __enter__(self) -> Self:
        if self._host is not None:
            raise UsageError(f"a {type(self).__name__} is for one `with` block")
        self._host = self._loop.enter(self._target)  # type: ignore[arg-type]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if self._host is None:
            raise UsageError(f"this {type(self).__name__} was never entered: use it in a `with` block")
        return self._loop.leave(self._host, kind, error, trace)


class Steps(Facade[A], Generic[A, T]):
    """A facade for ``for``: each step is one of the async iterator."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        try:
            return self._loop.call(self._target.__anext__)  # type: ignore[attr-defined, no-any-return]
        except StopAsyncIteration:
            raise StopIteration from None


def waits(method: Callable[Concatenate[Any, P], Awaitable[T]]) -> Callable[Concatenate[Any, P], T]:
    """The blocking one of an async method."""

    @functools.wraps(method)
    def call(self: Facade[Any], /, *arguments: P.args, **options: P.kwargs) -> T:
        return self._loop.call(method, self._target, *map(_target, arguments), **_targets(options))

    return call


def waits_for(
    kind: type[F], method: Callable[Concatenate[Any, P], Awaitable[object]]
) -> Callable[Concatenate[Any, P], F]:
    """The blocking one of an async method, whose result gets a facade of this kind."""

    @functools.wraps(method)
    def call(self: Facade[Any], /, *arguments: P.args, **options: P.kwargs) -> F:
        target = self._loop.call(method, self._target, *map(_target, arguments), **_targets(options))
        return kind(self._loop, target, self)

    return call


def made(kind: type[F], method: Callable[Concatenate[Any, P], object]) -> Callable[Concatenate[Any, P], F]:
    """A method that does no IO, whose result gets a facade of this kind. In the loop: what it makes may be bound to one, and
    the caller's thread may have one of another kind.
    """
    make = in_loop(method)

    @functools.wraps(method)
    def call(self: Facade[Any], /, *arguments: P.args, **options: P.kwargs) -> F:
        return kind(self._loop, make(self, *arguments, **options), self)

    return call


def in_loop(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """A method that does no IO, but changes what a task of the loop may be using."""

    async def run(target: Any, *arguments: P.args, **options: P.kwargs) -> T:
        return method(target, *arguments, **options)

    @functools.wraps(method)
    def call(self: Facade[Any], /, *arguments: P.args, **options: P.kwargs) -> T:
        return self._loop.call(run, self._target, *arguments, **options)

    return call


def like(method: Callable[..., object]) -> Callable[[C], C]:
    """Take over the signature and the docstring of an async method."""
    return functools.wraps(method)  # type: ignore[return-value]


def _target(argument: Any) -> Any:
    """Of a facade, what async methods know."""
    return argument._target if isinstance(argument, Facade) else argument


def _targets(options: dict[str, Any]) -> dict[str, Any]:
    return {name: _target(option) for name, option in options.items()}

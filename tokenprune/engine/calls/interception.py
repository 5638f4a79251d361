"""Intercepting a method of one object, for as long as a context is open.

Forward hooks of PyTorch would not do: code that `torch.compile` made before does not look for new hooks, hooks run in
the order of their registration, so that what others see depends on who came first, and they have no `finally`. A method
in the instance's own dictionary is seen by compiled code, is innermost to all hooks, and is one function around the
call.

Calls of some threads only are intercepted: a model that one thread prunes may be called by another one at the time.

Code that runs under a shadow is not compiled: neither `look`, nor what the intercepted method calls. Code that should
be compiled all the same is called through `compiled`.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType
from typing import Any

from torch._C._dynamo.eval_frame import set_eval_frame  # what torch.compiler.disable is made of
from torch._dynamo.decorators import skip

from tokenprune.errors import EngineError, UnsupportedError

REASON = "tokenprune.prune() looks on here"
_CONCERNS: ContextVar[Callable[[], bool] | None] = ContextVar("_CONCERNS", default=None)
_LOCK = threading.Lock()


class _Compiler(threading.local):
    """Of one thread.

    Attributes:
        paused: what compiled the code around the outermost shadow that is being called; None = nothing did.
        active: whether anything compiled the code right around the innermost one.
    """

    paused: Any = None
    active = False


_COMPILER = _Compiler()


@contextmanager
def concerning(concerns: Callable[[], bool]) -> Iterator[None]:
    """Shadows that are made in this context intercept threads where `concerns()` is true, in place of this one."""
    token = _CONCERNS.set(concerns)
    try:
        yield
    finally:
        _CONCERNS.reset(token)


@contextmanager
def shadowed(thing: Any, name: str, look: Callable[..., Any], every_thread: bool = False) -> Iterator[Shadow | None]:
    """Send calls of `thing.name(...)` to `look(original, ...)`; the class and other objects are left alone.

    Calls of other threads are left alone too, but see `concerning`; with `every_thread` it is up to `look` to do so.
    Several shadows may be on one method, and end in any order. Nothing happens where there is no such method.
    `torch.compile` leaves `look` and all that it calls alone.

    Yields:
        What stands in for the method; None where there is no such method.

    Raises:
        EngineError: at the end, if the method was put back meanwhile, so that calls went past the look.
    """
    with _LOCK:
        original = getattr(thing, name, None)
        if original is not None:
            concerns = None if every_thread else _CONCERNS.get() or _only_here()
            shadow = Shadow(thing, name, original, look, concerns)
            thing.__dict__[name] = shadow
    if original is None:
        yield None
        return
    try:
        yield shadow
    finally:
        taken_off = shadow.taken_off()
        shadow.lift()
        with _LOCK:  # what others put on top since stays, and takes this one along when it goes
            while isinstance(top := thing.__dict__.get(name), Shadow) and not top.open:
                if top.before is None:
                    del thing.__dict__[name]
                else:
                    thing.__dict__[name] = top.before
    if taken_off:
        raise shadow.bypassed()


def _only_here() -> Callable[[], bool]:
    thread = threading.get_ident()
    return lambda: threading.get_ident() == thread


def _functions(method: Any) -> Iterator[Any]:
    """A method's function, and those that it wraps (`functools.wraps`), innermost last."""
    while method is not None:
        yield method if isinstance(method, Shadow) else getattr(method, "__func__", method)
        method = getattr(method, "__wrapped__", None)


class Shadow:
    """Calls `look(original, ...)`. Refuses to be copied: the copy's calls would go to the original object. Once the
    look is over it is copied and pickled as the original.

    Attributes:
        before: what stood in the object's own dictionary.
        open: until the look is over; then calls go on to the original.
    """

    # not in __dict__, which `functools.update_wrapper` copies into what others put around
    __slots__ = ("__dict__", "__weakref__", "_concerns", "_look", "_name", "_original", "_thing", "before")
    __tokenprune__ = True

    def __init__(
        self,
        thing: Any,
        name: str,
        original: Callable[..., Any],
        look: Callable[..., Any],
        concerns: Callable[[], bool] | None,
    ) -> None:
        # without the original's attributes, by which torch.compile would find its way around the shadow
        functools.update_wrapper(self, original, updated=())
        self._thing, self._name, self.before = thing, name, thing.__dict__.get(name)
        self._original, self._concerns = original, concerns
        self._look: Callable[..., Any] | None = look

    @property
    def open(self) -> bool:
        """True while calls go to `look`."""
        return self._look is not None

    @property
    def __func__(self) -> Callable[..., Any]:
        """For those who wrap a method's function and bind it again (mixed precision of accelerate), so that a copy of
        the object calls its own. Raises AttributeError where the original is no method."""
        inner: Any = self._original.__func__  # type: ignore[attr-defined]

        @functools.wraps(self)
        def function(thing: Any, *args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs) if thing is self._thing else inner(thing, *args, **kwargs)

        return function

    @property
    def __code__(self) -> Any:  # torch.export asks for it
        return self._original.__code__

    def concerned(self) -> bool:
        """True if calls of this thread are intercepted."""
        return self._concerns is None or self._concerns()

    def in_place(self) -> bool:
        """True if calls of the method come here, directly or through wrappers put around it since (those that say what
        they wrap)."""
        return any(function is self for function in _functions(self._thing.__dict__.get(self._name)))

    def taken_off(self) -> bool:
        """True if the method is certainly the one that was there before, or something around that. Code that has
        kept `module.forward`, as hooks of accelerate do, may put it back."""
        if self.in_place():
            return False
        found = self._thing.__dict__.get(self._name)
        while not hasattr(found, "__func__") and hasattr(found, "__wrapped__"):
            found = found.__wrapped__
        function = getattr(found, "__func__", found)
        return found is None or any(function is known for known in _functions(self._original))

    def bypassed(self) -> EngineError:
        """The error for calls that went past the shadow."""
        return EngineError(
            f"{type(self._thing).__name__}.{self._name} was replaced while tokenprune looked on, so calls since then "
            "were not seen, and not pruned; put hooks and wrappers (accelerate, mixed precision) on the model, or take "
            "them off it, before tokenprune.prune() begins"
        )

    def lift(self) -> None:
        """Only pass calls on from now: other code may have kept this, as `torch.compile(model.forward)` does."""
        self._look = None

    @skip
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        compiler = set_eval_frame(None)
        look, concerns = self._look, self._concerns
        if look is None or not (concerns is None or concerns()):
            set_eval_frame(compiler)
            return self._original(*args, **kwargs)
        outer = _COMPILER.paused, _COMPILER.active
        _COMPILER.active = compiler is not None
        if compiler is not None:
            _COMPILER.paused = compiler
        try:
            return look(self._original, *args, **kwargs)
        finally:
            _COMPILER.paused, _COMPILER.active = outer
            set_eval_frame(compiler)

    __call__._torchdynamo_disable_msg = REASON  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self._copied(), memo)

    def __reduce__(self) -> Any:
        return _itself, (self._copied(),)

    def _copied(self) -> Callable[..., Any]:
        if self.open:
            raise UnsupportedError(
                "a model cannot be copied or pickled while it is under tokenprune.prune(), since the copy would call "
                "the original; copy it before or after"
            )
        return self._original


def _itself(original: Callable[..., Any]) -> Callable[..., Any]:
    return original


def being_compiled() -> bool:
    """Called from `look`: True if the code that made the call is compiled, so that forward hooks may not have run."""
    return _COMPILER.active


def compiled(number: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function from under a shadow, compiled as the code around the shadow is.

    Args:
        number: which of several similar ones it is. PyTorch limits the graphs of a piece of code (8 by default), and
            layers of a model share theirs, so each number counts for itself.
        function: to call.
        args: for it.
        kwargs: for it.
    """
    if _COMPILER.paused is None:  # nothing compiled the code around
        return function(*args, **kwargs)
    set_eval_frame(_COMPILER.paused)
    try:
        return _frame(number)(function, args, kwargs)
    finally:
        set_eval_frame(None)


@functools.cache
def _frame(number: int) -> Callable[..., Any]:
    return FunctionType(_call.__code__.replace(co_name=f"layer_{number}"), globals())


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)

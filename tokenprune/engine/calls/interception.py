"""Interception of a method of one object while a context is open.

PyTorch's forward hooks are not enough: code that `torch.compile` compiled earlier ignores new hooks; hooks run in the
order of registration, so what other hooks see would depend on that order; and they have no `finally`. A method in the
instance's `__dict__` is found by compiled code, runs inside all hooks, and is one function around the call.

Only calls of certain threads are intercepted: another thread may call the same model without pruning.

Neither `wrapper` nor what the intercepted method calls is compiled; `run_compiled` makes an exception.
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

from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, set_eval_frame  # what torch.compiler is made of
from torch._dynamo import config as dynamo
from torch._dynamo.decorators import skip

from tokenprune.errors import EngineError, UnsupportedError

REASON = "tokenprune.prune() intercepts this call"
_APPLIES: ContextVar[Callable[[], bool] | None] = ContextVar("_APPLIES", default=None)
_LOCK = threading.Lock()


class _Compiler(threading.local):
    """State of `torch.compile` in one thread.

    Attributes:
        paused: the compiler of the code around the outermost intercepted call; None = that code is not compiled.
        active: whether the code directly around the innermost intercepted call is compiled.
    """

    paused: Any = None
    active = False


_COMPILER = _Compiler()


@contextmanager
def intercepting(applies: Callable[[], bool]) -> Iterator[None]:
    """Shadows created while this is open intercept calls of all threads where `applies()` is true."""
    token = _APPLIES.set(applies)
    try:
        yield
    finally:
        _APPLIES.reset(token)


@contextmanager
def shadowed(thing: Any, name: str, wrapper: Callable[..., Any], every_thread: bool = False) -> Iterator[Shadow | None]:
    """Replace calls of `thing.name(...)` by `wrapper(original, ...)`, on this object only.

    By default only calls of this thread are intercepted (see `intercepting`); with `every_thread`, those of all
    threads. A method may have several shadows, which may end in any order. `torch.compile` skips `wrapper` and
    everything that it calls.

    Yields:
        The replacement of the method; None if there is no such method.

    Raises:
        EngineError: at the end, if the original method was restored meanwhile, so that calls were missed.
    """
    with _LOCK:
        original = getattr(thing, name, None)
        if original is not None:
            applies = None if every_thread else _APPLIES.get() or _current_thread()
            shadow = Shadow(thing, name, original, wrapper, applies)
            thing.__dict__[name] = shadow
    if original is None:
        yield None
        return
    try:
        yield shadow
    finally:
        was_removed = shadow.was_removed()
        shadow.disable()
        with _LOCK:  # wrappers installed later stay in place; the last one to go removes this one too
            while isinstance(top := thing.__dict__.get(name), Shadow) and not top.open:
                if top.before is None:
                    del thing.__dict__[name]
                else:
                    thing.__dict__[name] = top.before
    if was_removed:
        raise shadow.bypass_error()


def _current_thread() -> Callable[[], bool]:
    thread = threading.get_ident()
    return lambda: threading.get_ident() == thread


def _functions(method: Any) -> Iterator[Any]:
    """A method's function and those that it wraps (`functools.wraps`), innermost last."""
    while method is not None:
        yield method if isinstance(method, Shadow) else getattr(method, "__func__", method)
        method = getattr(method, "__wrapped__", None)


class Shadow:
    """Calls `wrapper(original, ...)` while it is enabled, then the original.

    While enabled it cannot be copied, since the copy would call the original object; afterwards it is copied and
    pickled as the original method.

    Attributes:
        before: the previous entry of the object's `__dict__`.
    """

    # not in __dict__, which `functools.update_wrapper` copies into other wrappers
    __slots__ = ("__dict__", "__weakref__", "_applies", "_name", "_original", "_thing", "_wrapper", "before")
    __tokenprune__ = True

    def __init__(
        self,
        thing: Any,
        name: str,
        original: Callable[..., Any],
        wrapper: Callable[..., Any],
        applies: Callable[[], bool] | None,
    ) -> None:
        # without the original's attributes, through which torch.compile would bypass the shadow
        functools.update_wrapper(self, original, updated=())
        self._thing, self._name, self.before = thing, name, thing.__dict__.get(name)
        self._original, self._applies = original, applies
        self._wrapper: Callable[..., Any] | None = wrapper

    @property
    def open(self) -> bool:
        """True while calls go to `wrapper`."""
        return self._wrapper is not None

    @property
    def __func__(self) -> Callable[..., Any]:
        """For code that wraps a method's function and binds it again (accelerate's mixed precision), so that a copy of
        the object calls its own method. Raises AttributeError if the original is not a method."""
        inner: Any = self._original.__func__  # type: ignore[attr-defined]

        @functools.wraps(self)
        def function(thing: Any, *args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs) if thing is self._thing else inner(thing, *args, **kwargs)

        return function

    @property
    def __code__(self) -> Any:  # used by torch.export
        return self._original.__code__

    def applies(self) -> bool:
        """True if calls of this thread are intercepted."""
        return self._applies is None or self._applies()

    def is_installed(self) -> bool:
        """True if calls of the method arrive here, directly or through later wrappers that set `__wrapped__`."""
        return any(function is self for function in _functions(self._thing.__dict__.get(self._name)))

    def is_bypassed(self) -> bool:
        """Whether calls of this thread should be intercepted and are not, since other code replaced the method."""
        return self.open and self.applies() and not self.is_installed()

    def was_removed(self) -> bool:
        """True if the earlier method, or a wrapper of it, was restored, as code that stores `module.forward` may do
        (accelerate's hooks)."""
        if self.is_installed():
            return False
        found = self._thing.__dict__.get(self._name)
        while not hasattr(found, "__func__") and hasattr(found, "__wrapped__"):
            found = found.__wrapped__
        function = getattr(found, "__func__", found)
        return found is None or any(function is known for known in _functions(self._original))

    def bypass_error(self) -> EngineError:
        """The error for calls that bypassed the shadow."""
        return EngineError(
            f"{type(self._thing).__name__}.{self._name} was replaced while tokenprune.prune() was open, so later calls "
            "were not pruned; add or remove hooks and wrappers (accelerate, mixed precision) before the context is "
            "opened"
        )

    def disable(self) -> None:
        """Call only the original from now on; other code may still refer to this, as `torch.compile(model.forward)`
        does."""
        self._wrapper = None

    @skip
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        compiler = set_eval_frame(None)
        wrapper, applies = self._wrapper, self._applies
        if wrapper is None or not (applies is None or applies()):
            set_eval_frame(compiler)
            return self._original(*args, **kwargs)
        outer = _COMPILER.paused, _COMPILER.active
        _COMPILER.active = compiler is not None
        if compiler is not None:
            _COMPILER.paused = compiler
        try:
            return wrapper(self._original, *args, **kwargs)
        finally:
            _COMPILER.paused, _COMPILER.active = outer
            set_eval_frame(compiler)

    __call__._torchdynamo_disable_msg = REASON  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self._copied(), memo)

    def __reduce__(self) -> Any:
        return _identity, (self._copied(),)

    def _copied(self) -> Callable[..., Any]:
        if self.open:
            raise UnsupportedError(
                "a model cannot be copied or pickled under tokenprune.prune(), since the copy would call the original; "
                "copy it before or after"
            )
        return self._original


def _identity(original: Callable[..., Any]) -> Callable[..., Any]:
    return original


def is_compiled_call() -> bool:
    """True if the code that called the current `wrapper` is compiled, so that forward hooks may not have run."""
    return _COMPILER.active


def is_compiled_run() -> bool:
    """True if the code around the outermost intercepted call is compiled, and so is what `run_compiled` calls."""
    return _COMPILER.paused is not None


def run_compiled(numbers: tuple[int, int], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function inside an intercepted call, compiled if the code around that call is.

    Args:
        numbers: of the functions that may share graphs with it, and of itself. PyTorch limits the number of graphs for
            each code object (8 by default): if those with the first number did not fit, it gets its own.
        function: what to call.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """
    if _COMPILER.paused is None:
        return function(*args, **kwargs)
    set_eval_frame(_COMPILER.paused)
    try:
        shared, own = map(_frame, numbers)
        full = len(_debug_get_cache_entry_list(shared.__code__)) >= dynamo.recompile_limit
        return (own if full else shared)(function, args, kwargs)
    finally:
        set_eval_frame(None)


@functools.cache
def _frame(number: int) -> Callable[..., Any]:
    return FunctionType(_call.__code__.replace(co_name=f"layer_{number}"), globals())


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)

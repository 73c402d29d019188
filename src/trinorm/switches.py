"""Switches for the whole process, as attributes of ``trinorm.options``.

    trinorm.options.batch_invariant = True

    with trinorm.options(autocast_keeps_dtype=True):
        ...

A ``with`` sets them for its block, in every thread: it is not for threads that overlap, nor for setting while another
thread calls a norm. torch.compile compiles anew for another setting; what is exported keeps that of its export.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


class Options:
    """The switches and their defaults; each is a bool.

    batch_invariant: what a call without the argument of that name does (:func:`trinorm.functional.layer_norm` and
        :func:`trinorm.functional.group_norm` say what); BatchNorm, which has none, it leaves alone.
    autocast_keeps_dtype: under autocast a norm returns its input's dtype, as it does elsewhere. False: it returns what
        torch's own norm does, which for some norms on some devices is fp32 (``F.layer_norm`` on CUDA): twice the bytes,
        which the next matrix product casts back. Statistics and sums are in fp32 in both.
    inductor_fuses: torch.compile and torch.export record torch's own operators where they would record the kernels, for
        Inductor to fuse with what is around them: graphs of pointwise ops and norms then take what they take with torch's
        norms, for other bits than an eager call's, and torch's range (rows whose squares overflow fp32 are lost). Where
        matrix products stand between, the kernels are no slower (docs/pytorch.md has both). Calls that promise more, with
        ``batch_invariant`` or ``cast="llama"``, whose rounding Inductor would leave out, have the kernels all the same.
    """

    batch_invariant: bool = False
    autocast_keeps_dtype: bool = False
    inductor_fuses: bool = False

    def __setattr__(self, name: str, value: bool) -> None:
        if name not in _NAMES:
            raise AttributeError(f"trinorm.options has no {name!r}; it has {', '.join(_NAMES)}")
        if not isinstance(value, bool):
            raise TypeError(f"trinorm.options.{name} must be True or False, not {value!r}")
        super().__setattr__(name, value)
        for hear in _LISTENERS:
            hear()

    @contextlib.contextmanager
    def __call__(self, **switches: bool) -> Iterator[None]:
        before = {name: getattr(self, name) for name in switches if name in _NAMES}
        try:
            for name, value in switches.items():
                setattr(self, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)


def when_set(hear: Callable[[], None]) -> None:
    """Call ``hear`` whenever a switch was set: what was found with the old one no longer holds."""
    _LISTENERS.append(hear)


_NAMES = tuple(Options.__annotations__)
_LISTENERS: list[Callable[[], None]] = []

options = Options()

"""The cheap way to do a call again: its allocations and its launches, for new tensors.

Triton's own way to start a kernel costs 13.8 µs on an H200's host, of which the driver's part is about 3: it looks at
every argument anew. A call of the same sizes, strides and dtypes looks the same every time, so what it came to is kept,
as a Python function written for it. RMSNorm's forward:

    def replay(i0, i1, i2):
        if current_device() != device or <a profiler or a hook listens>:
            return function(i0, i1, i2)
        p0 = i0.data_ptr()
        p1 = i1.data_ptr()
        o0 = empty(size0, stride0, dtype0)
        q0 = o0.data_ptr()
        if (p0 | p1 | q0) & 15:
            return function(i0, i1, i2)
        stream = stream_of(device)
        start0(x0, y0, z0, stream, handle0, ..., q0, None, None, p0, p1, None, n0_6, n0_7, ...)
        return o0, None, None

What a call makes and does not return lies in one block, each piece so far from its begin (``q1 = block + at1``).

Written out, because loops over tensors and launches cost .8 of 4.2 µs (no GPU, the driver a stub that returns at once).

For any number of rows (``rows_of_length``) what follows from it (launch.Count) is asked anew, and nothing else differs:

        m = i0.numel() // length
        c0 = of0(m)
        ...
        s0 = i0.shape
        o0 = empty((s0[0], s0[1]), (s0[1], 1), dtype0)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from .launch import Count, Leading, Made, Started, Watched, plain, watched

Results = tuple[Tensor | None, ...]
Function = Callable[..., Results]

# Triton compiles a kernel anew by whether a pointer is a multiple of this.
_ALIGNMENT = 16

# Pieces of one block begin at multiples of this, as torch's own memory on GPUs does.
_APART = 512


def record(
    function: Function, *inputs: Tensor | None, rows_of_length: int | None = None
) -> tuple[Results, Function | None]:
    """``function(*inputs)``, and the same function by repeating its launches; None where they cannot be repeated.

    The latter serves inputs of the sizes, strides, dtypes, device and absences of these, and does not ask whether they
    are. Where another device is current, a profiler listens or a tensor is less aligned, it calls ``function``.

    rows_of_length: how many elements a row has; the first input, and what has its size, is contiguous, and the repetition
    serves any number of rows, in as many dims, of which the function chooses the same launches.

    ``function`` allocates by launch.empty, starts kernels by launch.launch, and does nothing else: what torch's own ops
    computed would not be repeated. So each result must be one that a launch was given.

    Recording costs 27 µs where the function costs 16 and its repetition 2 (RMSNorm's forward, the driver a stub).
    """
    # Each its own object, which tells one input from another where a tensor is passed twice.
    inputs = tuple(None if t is None else t.detach() for t in inputs)
    with watched() as seen:
        results = function(*inputs)
    return results, _replay(function, inputs, results, seen, rows_of_length) if seen.started else None


def _replay(
    function: Function, inputs: Sequence[Tensor | None], results: Results, seen: Watched, rows_of_length: int | None
) -> Function | None:
    started = seen.started
    given = {id(t): f"i{i}" for i, t in enumerate(inputs) if t is not None}
    made = {id(t): f"o{i}" for i, (t, _) in enumerate(seen.made)}
    used = {id(t): t for launch in started for t in launch.args if isinstance(t, Tensor)}
    aligned = all(t.data_ptr() % _ALIGNMENT == 0 for t in (*used.values(), *inputs) if t is not None)
    launched = used.keys() <= given.keys() | made.keys() and all(t is None or id(t) in used for t in results)
    interpreted = any(launch.compiled is None for launch in started)
    if (
        not aligned
        or not launched
        or interpreted
        or _listened_to()
        or any(launch.kernel.pre_run_hooks for launch in started)
    ):
        return None
    place, device = next(iter(used.values())).device, driver.active.get_current_device()
    if place.index not in (None, device):  # launch.launch switched to it and back
        return None

    text = _Text(rows_of_length, given)
    pointers = [f"p{name[1:]} = {name}.data_ptr()" for name in given.values()]
    memory = text.memory(seen.made, {id(t) for t in results})
    starts = [text.start(i, launch, given | made) for i, launch in enumerate(started)]
    values = text.values | dict(
        function=function,
        # The one below torch.cuda.current_device: that a tensor is on a GPU proves that CUDA is initialized.
        current_device=getattr(torch._C, "_cuda_getDevice", None) or driver.active.get_current_device,
        device=device,
        stream_of=driver.active.get_current_stream,
        empty=_empty(place),
        runtime=knobs.runtime,
        enter=_ENTER,
        leave=_LEAVE,
        binaries=[launch.compiled for launch in started],  # which Triton unloads when nobody holds them
    )
    values |= {f"kernel{i}": launch.kernel for i, launch in enumerate(started)}
    hooks = [f"kernel{i}.pre_run_hooks" for i in range(len(started))]
    arguments = ", ".join(f"i{i}" for i in range(len(inputs)))
    ordinarily = f"    return function({arguments})"
    body = [
        f"if current_device() != device or {_LISTENED_TO} or {' or '.join(hooks)}:",
        ordinarily,
        *text.counts,
        *pointers,
        *memory,
        f"if ({' | '.join((*map(_pointer, given.values()), *text.allocated))}) & {_ALIGNMENT - 1}:",
        ordinarily,
        "stream = stream_of(device)",
        *starts,
        f"return {', '.join(made.get(id(t), 'None') for t in results)},",
    ]
    make = _made_of(tuple(values), f"def replay({arguments}, *, binaries=binaries):", tuple(body))
    return make(**values)


def _pointer(name: str) -> str:
    """Where the address of an input or of what was made is kept."""
    return ("p" if name[0] == "i" else "q") + name[1:]


@functools.lru_cache(maxsize=256)
def _made_of(values: tuple[str, ...], head: str, body: tuple[str, ...]) -> Callable[..., Function]:
    """``values -> the function of this head and body``. Numbers are values: few texts serve every size."""
    text = "\n".join([f"def make({', '.join(values)}):", f" {head}", *(f"  {line}" for line in body), " return replay"])
    namespace: dict[str, Any] = {}
    exec(text, namespace)
    return namespace["make"]


class _Text:
    """The lines of a repetition. values: what they name. counts: those of Counts. allocated: where memory is made."""

    def __init__(self, rows_of_length: int | None, given: Mapping[int, str]) -> None:
        self.values: dict[str, Any] = {}
        self.counts: list[str] = []
        self.allocated: list[str] = []
        self._given = given
        self._shapes: dict[str, str] = {}
        self._general = rows_of_length is not None
        self._names: dict[Any, str] = {int: "m"}
        if self._general:
            self.values["length"] = rows_of_length
            self.counts.append("m = i0.numel() // length")

    def number(self, name: str, number: Any) -> str:
        """What stands for a number: a value of this name, or a Count of the call's rows."""
        if not self._general or type(number) is not Count:
            (self.values[name],) = plain((number,))
            return name
        if (known := self._names.get(number.of)) is None:
            known = self._names[number.of] = f"c{len(self._names)}"
            self.values[f"of_{known}"] = number.of
            self.counts.append(f"{known} = of_{known}(m)")
        return known

    def memory(self, made: Sequence[Made], returned: Set[int]) -> list[str]:
        """The lines that make memory, each piece at ``q{i}``: ``o{i}`` where it is returned, and of the rest, which nobody
        sees, one block, as torch takes .6 µs for each (on a CPU). For any number of rows each is an ``o{i}``.
        """
        hidden = [] if self._general else [i for i, (t, _) in enumerate(made) if id(t) not in returned]
        lines = [line for i, each in enumerate(made) if i not in hidden for line in self._allocation(i, each)]
        if not hidden:
            return lines
        size = 0
        lines += ["room = empty(bytes, (1,), byte)", "block = room.data_ptr()"]
        for i in hidden:
            self.values[f"at{i}"] = size
            lines.append(f"q{i} = block + at{i}")
            size += -(-made[i].tensor.untyped_storage().nbytes() // _APART) * _APART
        self.values |= {"bytes": (size,), "byte": torch.uint8}
        self.allocated.append("block")
        return lines

    def _allocation(self, i: int, made: Made) -> list[str]:
        """The lines that make ``o{i}``."""
        self.allocated.append(f"q{i}")
        self.values[f"dtype{i}"] = made.tensor.dtype
        address = f"q{i} = o{i}.data_ptr()"
        if not self._general:
            self.values |= {f"size{i}": tuple(made.tensor.shape), f"stride{i}": made.tensor.stride()}
            return [f"o{i} = empty(size{i}, stride{i}, dtype{i})", address]
        lines = []
        if isinstance(made.size, (Tensor, Leading)):
            of = self._given[id(made.size if isinstance(made.size, Tensor) else made.size.of)]
            if of not in self._shapes:
                self._shapes[of] = f"s{i}"
                lines.append(f"s{i} = {of}.shape")
            sizes = [f"{self._shapes[of]}[{j}]" for j in range(made.tensor.dim())]
        else:
            sizes = [self.number(f"size{i}_{j}", size) for j, size in enumerate(made.size)]
        strides = [" * ".join(sizes[j + 1 :]) or "1" for j in range(len(sizes))]
        size, stride = (f"({''.join(f'{part}, ' for part in parts)})" for parts in (sizes, strides))
        return [*lines, f"o{i} = empty({size}, {stride}, dtype{i})", address]

    def start(self, i: int, launch: Started, tensors: Mapping[int, str]) -> str:
        """The line that starts the launch."""
        compiled, kernel, grid, args = launch
        run = compiled.run
        x, y, z = (self.number(f"{axis}{i}", size) for axis, size in zip("xyz", (*grid, 1, 1), strict=False))
        self.values |= {f"handle{i}": compiled.function, f"meta{i}": compiled.packed_metadata}
        names = []
        for j, arg in enumerate(args):
            if arg is None or isinstance(arg, Tensor):
                names.append("None" if arg is None else _pointer(tensors[id(arg)]))
            else:
                names.append(self.number(f"n{i}_{j}", arg))
        # Constexprs are in the binary; Triton passes over what stands in their places.
        names += ["None"] * (len(kernel.arg_names) - len(args))
        arguments = ", ".join(names)
        begin = f"start{i}({x}, {y}, {z}, stream, handle{i}"
        if not _is_plain(run) or not (3, 6) <= _TRITON <= (3, 9):
            self.values[f"start{i}"] = run
            return f"{begin}, meta{i}, None, None, None, {arguments})"
        # What ``run`` itself calls, when it has found that no kernel here asks for scratch memory: 1.9 µs less.
        self.values |= {f"start{i}": run.launch, f"grid{i}": run.launch_cooperative_grid, f"pdl{i}": run.launch_pdl}
        if _TRITON == (3, 6):
            return f"{begin}, grid{i}, pdl{i}, None, None, meta{i}, None, None, None, {arguments})"
        self.values |= {f"annotations{i}": run.arg_annotations, f"signature{i}": run.kernel_signature}
        return (
            f"{begin}, grid{i}, pdl{i}, meta{i}, None, None, None, None, None, annotations{i}, signature{i}, ({arguments}))"
        )


_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])


def _is_plain(run: Any) -> bool:
    """Whether Triton's launcher does nothing but call the driver: NVIDIA's, no scratch memory, no sanitizer."""
    return (
        type(run).__name__ == "CudaLauncher"
        and not run.global_scratch_size
        and not run.profile_scratch_size
        and not getattr(run, "gsan_enabled", False)
    )


# The chains of hooks that Triton starts with: profilers add to them, or put something else in their place.
_ENTER, _LEAVE = type(knobs.runtime).launch_enter_hook, type(knobs.runtime).launch_exit_hook

# Whether a profiler wants to hear of launches, which Triton's own way tells it.
_LISTENED_TO = (
    "enter.calls or leave.calls or runtime.launch_enter_hook is not enter or runtime.launch_exit_hook is not leave"
)
_listened_to: Callable[[], bool] = eval(f"lambda: {_LISTENED_TO}", dict(enter=_ENTER, leave=_LEAVE, runtime=knobs.runtime))


def _empty(device: torch.device) -> Callable[..., Tensor]:
    """``(size, stride, dtype) -> Tensor`` on the device, which is current.

    Inductor's own, where torch has it: .35 µs on a CPU where torch.empty_strided costs .84, and torch.empty 1.17.
    """
    found = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    return found or functools.partial(_empty_strided, device)


def _empty_strided(device: torch.device, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=device)

"""Dependent launch, as compiled: every kernel that may be put on the device early waits before it touches memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import Executor

import pytest
import torch

import every_kernel
from trinorm import inspection
from trinorm.forced import forced
from trinorm.formats import FORMATS
from trinorm.ops.hosts import (
    channel_layers,
    channels,
    conditioned_rows,
    dynamic_rows,
    gated_sum_rows,
    heads,
    poly_rows,
    quantized_rows,
    rows,
    weight_rows,
)
from trinorm.ops.problems.conditioned import Conditioned
from trinorm.ops.problems.gated_sum import problem_of
from trinorm.ops.problems.quantized import Given, Quantizing
from trinorm.spec import DYNAMIC_TANH, LAYER_NORM, RMS_NORM, ConditionedNorm

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@\S+ )?(\S+)(?: (.*?))?\s*;", re.MULTILINE)
_ACCESS = re.compile(r"(LDG|LDGSTS|STG|LD|ST|UTMALDG|UTMASTG|UBLKCP|REDG?|ATOMG?|CCTL)\b")


def waits_first(binary: inspection.Binary) -> bool:
    """Whether no path reaches an access of global memory, or the kernel's end, but through the wait (ACQBULK)."""
    listing = inspection._nvidia("nvdisasm", "--binary", "SM90a", given=inspection._code(binary.code))
    code = [(int(at, 16), bool(predicate), name, of) for at, predicate, name, of in _INSTRUCTION.findall(listing)]
    where = {at: i for i, (at, *_) in enumerate(code)}
    ahead, seen = [0], set()
    while ahead:
        i = ahead.pop()
        if i in seen or i >= len(code):
            continue
        seen.add(i)
        _, predicated, name, of = code[i]
        if name.startswith("ACQBULK") and not predicated:
            continue
        if _ACCESS.match(name) or (name.startswith("EXIT") and not predicated):
            return False
        target = re.search(r"\b0x([0-9a-f]+)$", of) if name.startswith(("BRA", "JMP")) else None
        if target and int(target[1], 16) in where:
            ahead.append(where[int(target[1], 16)])
        if predicated or re.search(r"\bU?P\d", of) or not name.startswith(("BRA", "JMP", "EXIT", "RET")):
            ahead.append(i + 1)
    return True


def early(calls: list[inspection.Call]) -> list[inspection.Binary]:
    """Those that may be launched early, compiled; that any may is what the launch asks for."""
    assert all(call.options["PDL"] == call.options.get("launch_pdl", False) for call in calls)
    asked = [call for call in calls if call.options["PDL"]]
    return [inspection.compile_call(call.kernel, call.args, call.options, "sm_90") for call in asked]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def row_calls() -> list[inspection.Call]:
    """Every kernel of the row family, forward and backward."""
    with inspection.recorded() as calls:
        for m, n, forward, backward in every_kernel.CALLS:
            x, w = meta(m, n), meta(n)
            with forced(forward=forward, backward=backward):
                _, mean, rstd = rows.forward(LAYER_NORM, x, 1, w, w, 1e-5, save=True)
                rows.backward(LAYER_NORM, x, x, 1, w, mean, rstd, dx=True, dw=w.dtype, db=w.dtype)
    return calls


def channel_calls() -> list[inspection.Call]:
    with inspection.recorded() as calls:
        for spec, shape, groups in every_kernel.IMAGES[6:13:3]:
            for order in (torch.contiguous_format, torch.channels_last):
                x, w = meta(*shape).to(memory_format=order), meta(shape[1])
                problem = channels.Problem(spec, groups, 1e-5)
                _, mean, rstd = channels.forward(problem, x, w, w)
                assert mean is not None and rstd is not None
                channels.backward(problem, x, x, w, w, mean, rstd, dx=True, dw=w.dtype, db=w.dtype)
        for shape in every_kernel.LAYERS[1:]:
            x, w = meta(*shape), meta(shape[1])
            _, mean, rstd = channel_layers.forward(x, w, w, 1e-6, save=True)
            assert mean is not None and rstd is not None
            channel_layers.backward(x, x, w, mean, rstd, dx=True, dw=w.dtype, db=w.dtype)
    return calls


def head_calls() -> list[inspection.Call]:
    packed, w = meta(700, 48, 128), meta(128)
    query, key = (heads.Side(t, w) for t in (packed[:, :32], packed[:, 32:40]))
    rotation = heads.Rotation(meta(700, 128), meta(700, 128), False)
    with inspection.recorded() as calls:
        *ys, of_query, of_key = heads.forward(RMS_NORM, query, key, 1e-6, rotation, save=True)
        wanted = (heads.Wanted(y, rstd, True, True) for y, rstd in zip(ys, (of_query, of_key), strict=True))
        heads.backward(RMS_NORM, query, key, *wanted, rotation)
    return calls


def conditioned_calls() -> list[inspection.Call]:
    with inspection.recorded() as calls:
        for spec, weight in (
            (ConditionedNorm(LAYER_NORM, modulated=True), meta(4, 1, 128)),
            (ConditionedNorm(RMS_NORM, "silu"), meta(128)),
            (ConditionedNorm(RMS_NORM, "silu", gate_first=True), meta(128)),
            (ConditionedNorm(LAYER_NORM, "silu"), meta(10000)),
        ):
            n = weight.shape[-1]
            x, gate = meta(4, 700, n), meta(4, 700, n)
            problem = Conditioned(spec, 1, n, 1e-6, x.dtype)
            inputs = conditioned_rows.Inputs(x, gate if spec.gate else None, weight, weight)
            y, mean, rstd = conditioned_rows.forward(problem, inputs, save=True)
            assert y is not None and rstd is not None
            conditioned_rows.backward(problem, inputs, y, mean, rstd, (True, spec.gate is not None, True, True))
        x, w = meta(4, 700, 128), meta(4, 1, 128)
        of_sum = problem_of(Conditioned(ConditionedNorm(LAYER_NORM, modulated=True), 1, 128, 1e-6, x.dtype), x, x)
        _, total, mean, rstd = gated_sum_rows.forward(of_sum, x, x, w, w, w, save=True)
        assert total is not None and rstd is not None
        gated_sum_rows.backward(of_sum, (True,) * 5, x, x, w, w, w, total, mean, rstd, x)
    return calls


def quantized_calls() -> list[inspection.Call]:
    x, w, one = meta(700, 1000), meta(1000), torch.empty(1, device="meta")
    with inspection.recorded() as calls:
        for name in ("fp8", "int8_token", "nvfp4"):
            problem = Quantizing(RMS_NORM, 1, 1e-6, name, "row_major", False, True)
            quantized_rows.forward(problem, Given(x, None, x, w, None, one if FORMATS[name].given else None))
    return calls


def element_calls() -> list[inspection.Call]:
    x, w = meta(700, 128), meta(128)
    with inspection.recorded() as calls:
        inputs = dynamic_rows.Inputs(x, meta(1), None, w, w)
        dynamic_rows.forward(DYNAMIC_TANH, 1, inputs)
        dynamic_rows.backward(DYNAMIC_TANH, 1, inputs, x, (True,) * 5)
        poly_rows.forward(1e-6, x, meta(3), meta(1))
        poly_rows.backward(1e-6, (True,) * 3, x, x, meta(3), meta(1))
        for dim, g in ((0, meta(700, 1)), (None, meta(1))):
            weight_rows.forward(dim, x, g)
            weight_rows.backward(dim, (True, True), x, x, g)
    return calls


def late(calls_of: Callable[[], list[inspection.Call]]) -> list[str]:
    """The kernels that may be launched early and do not wait first."""
    binaries = early(calls_of())
    assert binaries
    return [binary.kernel for binary in binaries if not waits_first(binary)]


def is_late_without_the_wait() -> bool:
    call = head_calls()[0]
    return not waits_first(inspection.compile_call(call.kernel, call.args, call.options | {"PDL": False}, "sm_90"))


@pytest.mark.parametrize(
    "calls_of", [row_calls, channel_calls, head_calls, conditioned_calls, element_calls, quantized_calls]
)
def test_waits_before_any_access(calls_of: Callable[[], list[inspection.Call]], compiling: Executor) -> None:
    assert compiling.submit(late, calls_of).result() == []


def test_a_kernel_that_does_not_wait_is_seen(compiling: Executor) -> None:
    assert compiling.submit(is_late_without_the_wait).result()

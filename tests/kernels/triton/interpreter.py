"""Makes Triton's interpreter compute what a GPU computes, where it does not by itself.

A kernel proved in the interpreter proves nothing where the interpreter's arithmetic is wrong. As of Triton
3.7 these are wrong in it, and ``repair`` replaces them:

- float32 -> bfloat16 cuts the low bits off; a GPU rounds to nearest even.
- integers -> bfloat16 become the bit pattern of the integer.
- arithmetic, comparisons and ``tl.dot`` of bfloat16 are those of its bit patterns as integers: garbage.
- float32 -> float8 loses carries (-1.998 becomes -1) and wraps at the top; a GPU saturates at 448.
- ``tl.maximum`` and ``tl.minimum`` hand NaN on; a GPU's give the other operand.

What stays different, and no test can see here: programs run one after the other (no races), ``tl.dot`` adds
in float32 whatever its ``input_precision``, ``tl.argmax`` of a row with NaN names the NaN, a mask that lets
nothing wrong through is still needed (out-of-range pointers are read for real), ``x = 3`` inside a kernel
makes a tensor (write ``x: tl.constexpr = 3``), libdevice and inline assembly do not exist.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch


@functools.cache
def repair() -> None:
    """Once per process, however often it is called, with triton imported under TRITON_INTERPRET=1."""
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    patch_once_per_launch()
    narrow_types = {
        tl.bfloat16: (torch.bfloat16, torch.uint16),
        tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
        tl.float8e4b8: (torch.float8_e4m3fnuz, torch.uint8),
        tl.float8e5: (torch.float8_e5m2, torch.uint8),
        tl.float8e5b16: (torch.float8_e5m2fnuz, torch.uint8),
    }
    plain_cast, plain_convert = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp
    plain_binary = InterpreterBuilder.binary_op

    def widen(handle: Any) -> Any:
        """The numbers that a handle holds, exactly."""
        if handle.dtype.scalar not in narrow_types:
            return handle.data
        dtype, _ = narrow_types[handle.dtype.scalar]
        return torch.from_numpy(np.array(handle.data)).view(dtype).float().numpy()

    def narrow(values: Any, dtype: Any) -> Any:
        """Numbers -> a handle of ``dtype``, rounded to nearest even."""
        target, bits = narrow_types[dtype.scalar]
        rounded = torch.from_numpy(np.array(values, dtype=np.float32)).to(target)
        return TensorHandle(rounded.view(bits).numpy(), dtype.scalar)

    def cast(self: Any, source: Any, dtype: Any) -> Any:
        if dtype.scalar in narrow_types:
            return narrow(widen(source), dtype)
        if source.dtype.scalar in narrow_types:
            source = TensorHandle(widen(source), tl.float32)
        return plain_cast(self, source, dtype)

    def convert(self: Any, source: Any, dtype: Any, rounding: Any) -> Any:
        toward_zero = rounding == ir.ROUNDING_MODE.RTZ
        return plain_convert(self, source, dtype, rounding) if toward_zero else cast(self, source, dtype)

    def binary(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if left.dtype.scalar not in narrow_types:
            return plain_binary(self, left, right, operation)
        result = operation(widen(left), widen(right))
        if result.dtype == np.bool_:
            return TensorHandle(result, tl.int1)
        return narrow(result, left.dtype)

    def dot(self: Any, a: Any, b: Any, start: Any, _precision: Any, _imprecise: Any) -> Any:
        products = np.matmul(widen(a), widen(b), dtype=start.data.dtype)
        return TensorHandle(products + start.data, start.dtype.scalar)

    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_fp_to_fp = convert
    InterpreterBuilder.binary_op = binary
    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.create_maxnumf = lambda self, left, right: self.binary_op(left, right, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, left, right: self.binary_op(left, right, np.fmin)


@functools.cache
def forget_order() -> None:
    """After ``repair``: sums of float32 are taken in float64 and rounded once.

    numpy orders a sum by the shapes of the tensors it is in; the kernels take care that the order depends on
    the shapes of weights alone. Whether a token's bits depend on its neighbours can only be asked so.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

    plain_dot, plain_sum = InterpreterBuilder.create_dot, ReduceOps.sum

    def dot(self: Any, a: Any, b: Any, start: Any, precision: Any, imprecise: Any) -> Any:
        if start.data.dtype != np.float32:
            return plain_dot(self, a, b, start, precision, imprecise)
        wide = TensorHandle(start.data.astype(np.float64), tl.float64)
        total = plain_dot(self, a, b, wide, precision, imprecise)
        return TensorHandle(total.data.astype(np.float32), start.dtype.scalar)

    def add_up(self: Any, operand: Any) -> Any:
        if operand.handle.data.dtype != np.float32:
            return plain_sum(self, operand)
        total = np.sum(operand.handle.data, axis=self.axis, keepdims=self.keep_dims, dtype=np.float64)
        return self.to_tensor(total.astype(np.float32), operand.dtype)

    InterpreterBuilder.create_dot = dot
    ReduceOps.sum = add_up


def patch_once_per_launch() -> None:
    """The interpreter looks through all of ``triton.language`` for functions to replace whenever one jitted
    function calls another, a third of its time. Within a launch they are replaced already.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    plain, plain_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        """Triton 3.6 takes a number out of an array of one dimension, which NumPy 2.4 refuses."""
        plain_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    def patch(fn: Any) -> Any:
        languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return interpreter._LangPatchScope()
        return plain(fn)

    interpreter._patch_lang, interpreter._patch_lang_tensor = patch, patch_tensor

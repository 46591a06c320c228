"""Scalar functions that generated kernels call: those that Triton lacks, or that have a faster form for short storage types."""

import triton
import triton.language as tl


@triton.jit
def _hardware_tanh(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def tanh(x, FAST: tl.constexpr):
    """tanh x; FAST: the hardware's, about 1e-4 off. Otherwise within 3e-7 of its size, near 0 by a least-squares polynomial in x^2."""
    if FAST:
        return _hardware_tanh(x)
    else:
        z = x * x
        near = (((-6.27639e-3 * z + 2.111621e-2) * z - 5.387514e-2) * z + 1.3332924e-1) * z - 3.3333330e-1
        return tl.where(z < 0.36, near * z * x + x, 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x)))


@triton.jit
def sin(x, FAST: tl.constexpr):
    """sin x; FAST: the hardware's, about 1e-6 and x's own rounding off. Otherwise `_turned`."""
    if FAST:
        return tl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return _turned(x, 0)


@triton.jit
def cos(x, FAST: tl.constexpr):
    """cos x, as `sin`."""
    if FAST:
        return tl.inline_asm_elementwise("cos.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return _turned(x, 1)


@triton.jit
def _turned(x, quarters):
    """sin(x + quarters pi/2) within 1e-7, NaN beyond |x| = 4e6, where float32 has two numbers a radian.

    Without branches, unlike the library's, in whose place several elements would wait for one another: the nearest multiple k pi/2 is taken off
    in three parts, of which the first two times k are exact, then near-minimax polynomials in the square of the rest.
    """
    shifted = x * 0.6366197723675814 + 12582912.0  # 1.5 * 2^23: the last bits are those of the rounded integer
    k = shifted - 12582912.0
    r = ((x - k * 1.5703125) - k * 4.837512969970703e-4) - k * 7.549790126404332e-8
    z = r * r
    sine = ((-1.9495102e-4 * z + 8.331974e-3) * z - 0.16666651) * z * r + r
    cosine = ((2.443789e-5 * z - 1.3887363e-3) * z + 4.1666646e-2) * z * z - 0.5 * z + 1.0
    quadrant = shifted.to(tl.int32, bitcast=True) + quarters
    value = tl.where((quadrant & 1) == 0, sine, cosine)
    value = tl.where((quadrant & 2) == 0, value, -value)
    return tl.where(tl.abs(x) < 4e6, value, float("nan"))


@triton.jit
def _hardware_exp2(x):
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def exp(x, FAST: tl.constexpr):
    """e^x, 6e-8 max(1, |x|) off; FAST: what is below 2^-126 is zero, which spares three of five instructions."""
    if FAST:
        return _hardware_exp2(1.4426950408889634 * x)
    else:
        return tl.exp(x)


@triton.jit
def expm1(x, FAST: tl.constexpr):
    """e^x - 1, near 0 by its series; FAST: 2e-6 off."""
    if FAST:
        near = x * (1.0 + x * (1 / 2) * (1.0 + x * (1 / 3) * (1.0 + x * (1 / 4))))
        return tl.where(tl.abs(x) < 0.1, near, exp(x, FAST) - 1.0)
    else:
        near = 1.0 + x * (1 / 5) * (1.0 + x * (1 / 6) * (1.0 + x * (1 / 7)))
        near = x * (1.0 + x * (1 / 2) * (1.0 + x * (1 / 3) * (1.0 + x * (1 / 4) * near)))
        return tl.where(tl.abs(x) < 0.3, near, tl.exp(x) - 1.0)


@triton.jit
def log(x, FAST: tl.constexpr):
    """log x; FAST: the hardware's, 2e-7 off near 1 however small the result, and of less than 2^-126 minus infinity: 2 instructions, not 30."""
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1; mul.f32 $0, $0, 0f3F317218;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log(x)


@triton.jit
def log1p(x, FAST: tl.constexpr):
    """log(1 + x). FAST: near 0 by its series, 3e-6 off; otherwise what rounding 1 + x loses is made good by the ratio of x to what it keeps."""
    u = 1.0 + x
    if FAST:
        near = x * (1.0 - x * (1 / 2 - x * (1 / 3 - x * (1 / 4 - x * (1 / 5)))))
        return tl.where(tl.abs(x) < 0.1, near, log(u, FAST))
    else:
        kept = u - 1.0
        near = tl.where(kept == 0.0, x, tl.log(u) * (x / tl.where(kept == 0.0, 1.0, kept)))
        return tl.where(x < 1.0, near, tl.log(u))


@triton.jit
def sqrt(x, FAST: tl.constexpr):
    """The square root; FAST: what is below 2^-126 is zero."""
    if FAST:
        return tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.sqrt(x)


@triton.jit
def rsqrt(x, FAST: tl.constexpr):
    """1 / sqrt(x), as `sqrt`."""
    if FAST:
        return tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.rsqrt(x)


@triton.jit
def divided(a, b, FAST: tl.constexpr):
    """a / b; FAST: by the hardware's reciprocal, which is zero for |b| > 2^126: 2 instructions in place of 9."""
    if FAST:
        return a * tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [b], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return a / b


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """1 / (1 + e^-x). FAST: within 5e-7 of it up to |x| = 10, 4e-6 far out. By the hardware's tanh it would be 1e-4 off, which is 4% of a gate at -6,
    and of its gradient."""
    if FAST:
        return divided(1.0, 1.0 + _hardware_exp2(-1.4426950408889634 * x), FAST)
    else:
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def erf(x, FAST: tl.constexpr):
    """The error function; FAST: 6e-7 off, by formula 7.1.26 of Abramowitz and Stegun."""
    if FAST:
        t = divided(1.0, 1.0 + 0.3275911 * tl.abs(x), FAST)
        p = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
        value = 1.0 - p * exp(-x * x, FAST)
        return tl.where(x < 0.0, -value, value)
    else:
        return tl.erf(x)


@triton.jit
def sign(x):
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))  # of NaN too, as PyTorch's


@triton.jit
def larger(a, b):
    """max(a, b), NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(a, b):
    """min(a, b), NaN if either is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def atan2(y, x, FAST: tl.constexpr):
    """The angle of (x, y), by the polynomial of Cephes' atanf on |t| <= tan(pi/8)."""
    a, b = tl.abs(y), tl.abs(x)
    low, high = smaller(a, b), larger(a, b)
    fold = (low >= 0.4142135623730950 * high) & (low > 0.0)
    over, under = tl.where(fold, low - high, low), tl.where(fold, low + high, high)
    nothing = high < 1.1754944e-38 if FAST else high == 0.0  # of what counts as zero
    over = tl.where((low == high) | nothing, 0.0, over)  # the same infinity twice: pi/4
    t = divided(over, tl.where(nothing, 1.0, under), FAST)
    z = t * t
    angle = (((8.05374449538e-2 * z - 1.38776856032e-1) * z + 1.99777106478e-1) * z - 3.33329491539e-1) * z * t + t
    angle = tl.where(fold, angle + 0.7853981633974483, angle)
    angle = tl.where(a > b, 1.5707963267948966 - angle, angle)
    angle = tl.where(x < 0.0, 3.141592653589793 - angle, angle)
    return tl.where(y < 0.0, -angle, angle)


@triton.jit
def hypot(a, b, FAST: tl.constexpr):
    """sqrt(a^2 + b^2), where squares would be too large or small too; NaN if either is, beside infinity too."""
    a, b = tl.abs(a), tl.abs(b)
    high, low = larger(a, b), smaller(a, b)
    least = 1.1754944e-38 if FAST else 0.0  # below which is what counts as zero
    # Twice zero or infinity has no ratio.
    ratio = tl.where((low < high) & (high > least), divided(low, high, FAST), 1.0)
    return high * sqrt(1.0 + ratio * ratio, FAST)


@triton.jit
def difference(end, start):
    """end - start, zero where both are the same infinity or both NaN."""
    same = (end == start) | ((end != end) & (start != start))
    return tl.where(same, 0.0, end - start)


@triton.jit
def finite(x, limit):
    """x, zero where it is not below the limit in size."""
    return tl.where(tl.abs(x) < limit, x, 0.0)


@triton.jit
def clamped(x):
    """A matrix entry kept finite, so that products of two are: NaN becomes 0."""
    return tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), -1e12), 1e12)


@triton.jit
def full(value, like):
    """The value, spread over the tile if it is one number or one row."""
    return tl.broadcast_to(value, like.shape)


@triton.jit
def above(v, own, step, live, first):
    """Each row gets v of the row above, by way of the memory at `own`, `step` numbers a row (tl.gather in a loop breaks the compiler)."""
    tl.debug_barrier()
    tl.store(own, v, mask=live)
    tl.debug_barrier()
    return tl.load(own - step, mask=live & (first == 0), other=0.0)


@triton.jit
def leading(v):
    """The bits of v that a bf16 holds."""
    return (v.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _column(v, k):
    return tl.sum(tl.where(tl.arange(0, v.shape[1])[None, :] == k, v, 0.0), 1)[:, None]


@triton.jit
def _line(matrix, k):
    return tl.sum(tl.where(tl.arange(0, matrix.shape[0])[:, None] == k, matrix, 0.0), 0)[None, :]


@triton.jit
def mixed(v, matrix, inside, same, FAST: tl.constexpr, MASKED: tl.constexpr, APART: tl.constexpr):
    """v times a block-diagonal matrix, for each row of v. FAST: each factor as a sum of two bf16, 2^-16 off.

    APART: what is not finite in one head stays there; otherwise 0 x NaN takes it to the others. Rare, so a loop, which is quick to compile.
    """
    v = tl.broadcast_to(v, inside.shape)
    if MASKED:
        v = tl.where(inside, v, 0.0)
    if APART:
        product = tl.zeros(inside.shape, tl.float32)
        for k in range(inside.shape[1]):
            product += tl.where(_line(same.to(tl.int32), k) > 0, _column(v, k) * _line(matrix, k), 0.0)
        return product
    elif FAST:
        high, top = leading(v), leading(matrix)
        low, rest = (v - high).to(tl.bfloat16), (matrix - top).to(tl.bfloat16)
        high, top = high.to(tl.bfloat16), top.to(tl.bfloat16)
        return tl.dot(high, top, tl.dot(high, rest, tl.dot(low, top)))
    else:
        return tl.dot(v, matrix, input_precision="tf32x3")


@triton.jit
def totalled(v, inside, same, FAST: tl.constexpr, MASKED: tl.constexpr, APART: tl.constexpr):
    """The sum of v over the channels of a head, in each of them: a product by ones, with the precision of `mixed`."""
    v = tl.broadcast_to(v, inside.shape)
    if MASKED:
        v = tl.where(inside, v, 0.0)
    if APART:
        total = tl.zeros(inside.shape, tl.float32)
        for k in range(inside.shape[1]):
            total += tl.where(_line(same.to(tl.int32), k) > 0, _column(v, k), 0.0)
        return total
    elif FAST:
        high = leading(v)
        ones = same.to(tl.bfloat16)
        return tl.dot(high.to(tl.bfloat16), ones, tl.dot((v - high).to(tl.bfloat16), ones))
    else:
        return tl.dot(v, same.to(tl.float32), input_precision="tf32x3")


@triton.jit
def outer(total, g, v, ok, FAST: tl.constexpr, MASKED: tl.constexpr):
    """total + sum over rows of g v^T."""
    g, v = tl.broadcast_to(g, ok.shape), tl.broadcast_to(v, ok.shape)
    if MASKED:
        g, v = tl.where(ok, g, 0.0), tl.where(ok, v, 0.0)
    if FAST:
        return tl.dot(tl.trans(g.to(tl.bfloat16)), v.to(tl.bfloat16), total)
    else:
        return tl.dot(tl.trans(g), v, total, input_precision="tf32x3")

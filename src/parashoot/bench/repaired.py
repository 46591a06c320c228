"""A function of a peer's kernel that Triton no longer compiles as published, in a file of its own because Triton reads its source."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh x in float32, for FlashRNN's backward kernel, which takes the exponential of bfloat16: Triton 3.6 refuses that."""
    e = tl.exp(-2.0 * x.to(tl.float32))
    return (1.0 - e) / (1.0 + e)

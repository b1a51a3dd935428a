"""The constants of the noise of kernels/gumbel.py, for every backend. They are here because compiled code is cached by
the content of this folder."""

ROUNDS = 10  # of Philox
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LN_2 = 0.6931471824645996
# -log(1 - v) = v * Q(v) for 0 < v <= 1/2, and log(1 + f) = f * R(f) for sqrt(1/2) - 1 <= f <= sqrt(2) - 1: coefficients
# of Q and R from the constant up, by interpolation at 2,000 Chebyshev nodes.
LOG_BELOW_ONE = (
    *(0.9999998211860657, 0.5000368356704712, 0.33185362815856934, 0.27235743403434753),
    *(0.0374123640358448, 0.7871947288513184, -1.0840892791748047, 1.1863799095153809),
)
LOG_AROUND_ONE = (
    *(0.9999999403953552, -0.5000036358833313, 0.33335113525390625, -0.24970071017742157),
    *(0.19898565113544464, -0.17247013747692108, 0.1623418927192688, -0.10134056955575943),
)
SQRT_HALF_BITS = 0x3F3504F3  # of the fp32 number
LEAST_WORD = 256  # smaller ones are as good as this one: tokens with such noise are never drawn

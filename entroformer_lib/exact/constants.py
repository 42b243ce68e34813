"""Numbers that tensor operations and compiled loops share."""

import math

import torch

PEAK = 2**14  # numbers are rounded to integers of at most this size
# Values that attention sums are multiples of 2^-14 up to 256. With weights of at most 1 in 15 bits, whose sum is 1, or
# 2^15 ones as large as the largest, every sum stays below 2^53.
FIXED_STEPS, LARGEST_VALUE = 2.0**14, 256.0
# 2^f on [0, 1): Taylor's polynomial of exp(f ln 2), as float32 constants; its error of 2^-20 is below the rounding.
POLYNOMIAL = [float(torch.tensor(math.log(2) ** i / math.factorial(i))) for i in range(8)]
LOWEST_POWER = -40

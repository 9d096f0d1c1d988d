"""Generated worked arithmetic: the one source of the sample corpus that is made, not found.

A document is a page of exercises of one kind, each with its steps spelled out, so that a small model can learn the
pattern and its progress shows early. Every answer is computed, and `tests` recompute it from the text.
"""

import math
import random
from collections.abc import Callable, Iterator


def problems(total_bytes: int, seed: int) -> Iterator[str]:
    """Documents of 0.3 to 3 kB (ASCII) until they hold `total_bytes`; the same for the same seed."""
    rng = random.Random(seed)
    written = 0
    while written < total_bytes:
        kind = rng.choice(_KINDS)
        title = (kind.__doc__ or "").strip().rstrip(".")
        exercises = [f"{number}. {kind(rng)}" for number in range(1, rng.randint(6, 14))]
        document = f"{title}\n\n" + "\n\n".join(exercises) + "\n"
        yield document
        written += len(document)


def _addition(rng: random.Random) -> str:
    """Addition, column by column."""
    a, b = rng.randrange(10, 10 ** rng.randint(2, 6)), rng.randrange(10, 10 ** rng.randint(2, 6))
    steps, carry = [], 0
    left, right = str(a)[::-1], str(b)[::-1]
    for i in range(max(len(left), len(right))):
        x = int(left[i]) if i < len(left) else 0
        y = int(right[i]) if i < len(right) else 0
        total = x + y + carry
        brought = f" + {carry}" if carry else ""
        carry = total // 10
        kept = f"write {total % 10}, carry {carry}" if carry else f"write {total}"
        steps.append(f"{x} + {y}{brought} = {total}, {kept}")
    return f"{a} + {b}\n   " + "\n   ".join(steps) + f"\n   {a} + {b} = {a + b}"


def _multiplication(rng: random.Random) -> str:
    """Multiplication by partial products."""
    a, b = rng.randrange(12, 10000), rng.randrange(12, 1000)
    digits = [(int(digit), place) for place, digit in enumerate(reversed(str(b))) if digit != "0"]
    parts = [(digit * 10**place, a * digit * 10**place) for digit, place in digits]
    lines = [f"{a} * {factor} = {product}" for factor, product in parts]
    total = " + ".join(str(product) for _, product in parts)
    return f"{a} * {b}\n   " + "\n   ".join(lines) + f"\n   {total} = {a * b}"


def _division(rng: random.Random) -> str:
    """Division with remainder."""
    b = rng.randrange(2, 100)
    a = rng.randrange(b, 100000)
    whole, rest = divmod(a, b)
    return f"{a} / {b}\n   {b} * {whole} = {b * whole}\n   {a} - {b * whole} = {rest}\n   {a} = {b} * {whole} + {rest}"


def _euclid(rng: random.Random) -> str:
    """Greatest common divisors by Euclid's algorithm."""
    common = rng.randrange(1, 60)
    a, b = sorted((common * rng.randrange(2, 200), common * rng.randrange(2, 200)), reverse=True)
    lines, x, y = [], a, b
    while y:
        lines.append(f"{x} = {x // y} * {y} + {x % y}")
        x, y = y, x % y
    return f"gcd({a}, {b})\n   " + "\n   ".join(lines) + f"\n   gcd({a}, {b}) = {x}"


def _equation(rng: random.Random) -> str:
    """Linear equations, one step at a time."""
    a, x, b = rng.randrange(2, 40), rng.randrange(-50, 100), rng.randrange(1, 400)
    return f"Solve {a}x + {b} = {a * x + b}.\n   {a}x = {a * x + b} - {b} = {a * x}\n   x = {a * x} / {a} = {x}"


def _fractions(rng: random.Random) -> str:
    """Sums of fractions in lowest terms."""
    a, b, c, d = rng.randrange(1, 20), rng.randrange(2, 25), rng.randrange(1, 20), rng.randrange(2, 25)
    bottom = math.lcm(b, d)
    left, right = a * (bottom // b), c * (bottom // d)
    top = left + right
    common = math.gcd(top, bottom)
    return (
        f"{a}/{b} + {c}/{d}\n   common denominator {bottom}\n"
        f"   {left}/{bottom} + {right}/{bottom} = {top}/{bottom}\n   lowest terms: {top // common}/{bottom // common}"
    )


def _shopping(rng: random.Random) -> str:
    """Word problems about buying things."""
    name, other = rng.sample(("Ada", "Emmy", "Carl", "Sofia", "Alan", "Grace", "Leonhard", "Maryam"), 2)
    thing, extra = rng.sample(("apples", "pencils", "notebooks", "candles", "ropes", "stamps", "bricks", "lamps"), 2)
    n, price, m, cost = rng.randint(2, 30), rng.randint(1, 25), rng.randint(2, 30), rng.randint(1, 25)
    total = n * price + m * cost
    paid = math.ceil(total / 100) * 100
    return (
        f"{name} buys {n} {thing} at {price} coins each, and {other} buys {m} {extra} at {cost} coins each. "
        f"They pay together with {paid} coins. How many coins come back?\n"
        f"   {name} pays {n} * {price} = {n * price} coins.\n   {other} pays {m} * {cost} = {m * cost} coins.\n"
        f"   Together that is {n * price} + {m * cost} = {total} coins.\n"
        f"   {paid} - {total} = {paid - total} coins come back."
    )


def _sequence(rng: random.Random) -> str:
    """Arithmetic sequences."""
    start, step, count = rng.randint(-20, 60), rng.randint(2, 30), rng.randint(5, 40)
    shown = ", ".join(str(start + i * step) for i in range(4))
    last = start + (count - 1) * step
    return (
        f"A sequence begins {shown}, ... Find term {count} and the sum of the first {count} terms.\n"
        f"   Each term is {step} more than the one before.\n"
        f"   Term {count} is {start} + {count - 1} * {step} = {last}.\n"
        f"   The sum is {count} * ({start} + {last}) / 2 = {count * (start + last) // 2}."
    )


_KINDS: tuple[Callable[[random.Random], str], ...] = (
    _addition, _multiplication, _division, _euclid, _equation, _fractions, _shopping, _sequence,
)  # fmt: skip

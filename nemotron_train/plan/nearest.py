"""What value would work instead: the closest multiples and divisors, for error messages."""


def nearest_multiples(value: int, divisor: int) -> str:
    """Return the positive multiples of `divisor` around `value`, as text: `4 or 6`."""
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)


def next_multiple(value: int, divisor: int) -> int:
    return -(-value // divisor) * divisor


def nearest_doublings(value: int, start: int) -> str:
    """Return what around `value` is `start` times a power of two, as text."""
    below = start
    while below > value and below % 2 == 0:
        below //= 2
    while below * 2 <= value:
        below *= 2
    return f"{below} or {below * 2}"


def nearest_divisors(value: int, wanted: int) -> str:
    """Return the divisors of `value` around `wanted`, as text."""
    below = next(divisor for divisor in range(min(wanted, value), 0, -1) if value % divisor == 0)
    above = next((divisor for divisor in range(wanted, value + 1) if value % divisor == 0), below)
    return str(below) if above == below else f"{below} or {above}"

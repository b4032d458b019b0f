"""Figures as text, with no-break spaces between number and unit."""

NBSP = "\N{NO-BREAK SPACE}"
PERCENT = f"{NBSP}%"
MINUS = "\N{MINUS SIGN}"


def percent(fraction: float | None) -> str:
    """0.595 as "59.5 %"; "–" where it was not measured."""
    return "–" if fraction is None else f"{100 * fraction:.1f}{PERCENT}".replace("-", MINUS)


def points(difference: float) -> str:
    """0.123 as "+12.3": a difference of percentages."""
    return signed(100 * difference, 1)


def signed(value: float, digits: int = 2) -> str:
    """-0.5 as "−0.50"; what rounds to zero has no sign."""
    told = f"{abs(value):.{digits}f}"
    sign = "" if not float(told) else "+" if value > 0 else MINUS
    return sign + told


def probability(p: float | None) -> str:
    """0.0312 as "0.031"; below what a test on finite data can tell, "<1e-15"."""
    return "–" if p is None else "<1e-15" if p < 1e-15 else f"{p:.2g}"


def count(value: float | None) -> str:
    """1234567.8 as "1,234,568"; a decimal is kept below ten."""
    if value is None:
        return "–"
    return f"{value:,.1f}" if abs(value) < 10 and value != round(value) else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """5025 as "1 h 23 min", 83 as "1 min 23 s", 8.34 as "8.3 s"."""
    if seconds is None:
        return "–"
    if seconds < 59.5:
        told = f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    else:
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes_left = divmod(minutes, 60)
        told = f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"
    return told.replace(" ", NBSP)

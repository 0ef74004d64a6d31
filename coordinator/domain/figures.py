"""Figures for people: a few digits, and large ones without an exponent."""

from __future__ import annotations


def in_digits(value: float, digits: int) -> str:
    """Return a number rounded to so many digits that mean something: 213 is 210."""
    return f"{float(f'{value:.{digits}g}'):.15g}"

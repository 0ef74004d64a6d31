"""Hands out work, keeps the weights, shows the fleet. Never imports torch or worker."""

from __future__ import annotations

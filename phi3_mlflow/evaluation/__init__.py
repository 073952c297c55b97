"""Measuring a registered version, and the gate that decides whether it may become champion."""

"""What is measured on held-out samples while a run trains."""

from __future__ import annotations

from llama.config.section import Count, NonNegative, Section


class Validation(Section):
    """Loss on held-out samples, the same ones each time."""

    interval: NonNegative = 0
    """Steps between validations; 0: never."""
    batches: Count = 8
    """Global batches in one validation."""

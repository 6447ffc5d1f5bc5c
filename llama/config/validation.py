"""What is measured on held-out samples while a run trains, and when that ends it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from llama.config.section import Count, NonNegative, Section


class Validation(Section):
    """Loss and perplexity on held-out samples, the same ones each time; of each source too where there are several."""

    interval: NonNegative = 0
    """Steps between validations; 0: never."""
    batches: Count = 8
    """Global batches in one validation; of conversations at most all that are held out, each once."""
    at_start: bool = False
    """Validate before the first step too: what the model can do that training starts from."""
    accuracy: bool = False
    """Of conversations, also count the last answers that the model would give word for word (of each part, where
    chat.truncation=split makes several)."""
    samples: NonNegative = 0
    """Held-out conversations whose last answer is generated, greedily, at each validation and shown."""
    prompts: tuple[str, ...] = ()
    """Prompts of one's own that are answered with them; without `chat:` texts that are continued."""
    sample_tokens: Count = 64
    """Longest text that is generated."""
    patience: Count | None = None
    """Validations in a row without improvement after which the run ends; null: it takes all its steps."""
    min_improvement: Annotated[float, Field(ge=0)] = 0.0
    """What the loss must fall by to count as improvement."""

    @model_validator(mode="after")
    def _check(self) -> Validation:
        given = [key for key in ("at_start", "accuracy", "samples", "prompts", "patience") if getattr(self, key)]
        if given and not self.interval:
            raise ValueError(
                f"{given[0]} needs validations and there are none; set validation.interval, such as validation.interval=100"
            )
        if self.min_improvement and self.patience is None:
            raise ValueError("min_improvement is what patience waits for; set validation.patience too")
        return self

"""The learning rate of each step: linear warm-up, then constant, linear, cosine (Loshchilov and Hutter 2017) or WSD."""

from __future__ import annotations

import math

from llama.config import Recipe


def learning_rate(step: int, recipe: Recipe) -> float:
    """Of optimizer step `step`, counted from 0.

    Warm-up reaches optimizer.lr after warmup_steps (or its share of the run); linear and cosine reach min_lr at
    decay_steps and stay there; wsd (warm-up, stable, decay: MiniCPM, Hu et al. 2024) falls linearly over the last
    decay_steps of the run.
    """
    peak, s = recipe.optimizer.lr, recipe.schedule
    warmup = s.warmup(recipe.train.steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if s.kind == "constant":
        return peak
    if s.kind == "wsd":
        length = s.decay_steps or max(1, recipe.train.steps // 10)
        done = (step - (recipe.train.steps - length)) / length
        return peak + (s.min_lr - peak) * min(1.0, max(0.0, done))
    span = (s.decay_steps or recipe.train.steps) - warmup
    done = min(1.0, (step - warmup) / max(1, span))
    if s.kind == "linear":
        return peak + (s.min_lr - peak) * done
    return s.min_lr + (peak - s.min_lr) * 0.5 * (1 + math.cos(math.pi * done))

"""Conversations as training examples: templates, which tokens are trained, packing, batches."""

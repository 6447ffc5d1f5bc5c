"""The Llama network in plain PyTorch: one device, no process groups."""

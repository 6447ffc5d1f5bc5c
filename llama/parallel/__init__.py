"""How one network is laid over many ranks, on PyTorch's DeviceMesh, DTensor, FSDP2 and pipelining."""

"""Process groups over shared memory: the backend "sluice" of torch.distributed."""

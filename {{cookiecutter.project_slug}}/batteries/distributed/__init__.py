"""Layer 1: process group, collectives, device selection, unwrapping, SyncBatchNorm on CPU, launcher."""

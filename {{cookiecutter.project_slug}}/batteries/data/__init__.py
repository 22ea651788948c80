"""Layer 2: batch plan, loaders, worker processes, split files, image files, image statistics, duplicates."""

"""Layer 1: the tracker interface, one module per tracking library, and the manager of a run's trackers."""

"""Several processes: what ranks tell each other, sharding, and signals."""

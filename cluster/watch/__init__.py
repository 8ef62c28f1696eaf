"""New releases, found on a schedule, become pruned releases: judged, pruned, gated, published once."""

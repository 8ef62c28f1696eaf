"""What a run will need and how it uses memory: work, footprint and time, from shapes alone, and what fits."""

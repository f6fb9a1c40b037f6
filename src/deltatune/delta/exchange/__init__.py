"""Exchange: saved deltas in the formats of other libraries."""

"""What a delta is held against: a head alone, and all weights."""

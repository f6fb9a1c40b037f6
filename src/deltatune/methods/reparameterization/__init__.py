"""Methods that train a small function whose value is a change of the weights."""

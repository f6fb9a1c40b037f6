"""Methods that add parameters of their own to the network."""

"""Methods that train chosen parameters of the network."""

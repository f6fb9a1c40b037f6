"""Studies: the schema of a result, its statistics, its table for the console and its report."""

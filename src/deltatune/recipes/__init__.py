"""One runnable file per published system, and the ledger of their claims."""

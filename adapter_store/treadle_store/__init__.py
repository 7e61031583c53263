"""The adapter store: the only owner of durable state (journal, leases, catalog, keys, blobs)."""

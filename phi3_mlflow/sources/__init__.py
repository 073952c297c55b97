"""Where a checkpoint comes from, and how it gets here unharmed: see `fetch.fetch_source`."""

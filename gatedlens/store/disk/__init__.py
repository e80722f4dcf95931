"""What a store is on disk: layout, manifest, journal, shards and Arrow files, whole after any stop."""

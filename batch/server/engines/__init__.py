"""What the endpoint executes: preview (no model), echo (rehearsal), later flux."""

"""The embedded model, the grammar and scripts that made it, and config-only shapes of real models."""

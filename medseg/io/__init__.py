"""Reading and writing of volumes: one way in, one way out, no torch."""

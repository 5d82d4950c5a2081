"""Reading and writing of volumes: one reader, one writer, no torch."""

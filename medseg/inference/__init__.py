"""From a volume to labels on its own grid: the one engine behind every entry point."""

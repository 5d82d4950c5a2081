"""The command line: parsing and printing; every command is one call into the package."""

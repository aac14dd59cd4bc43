"""Command lines: parse, call the library, print."""

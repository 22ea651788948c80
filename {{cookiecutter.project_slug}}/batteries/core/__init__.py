"""Layer 0: errors, text, files, tables, the command line, option ranges, ranks, signals, seeding, memory."""

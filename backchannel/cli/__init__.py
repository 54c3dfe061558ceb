"""The command line: one thin file per noun, and nothing heavy before a command needs it."""

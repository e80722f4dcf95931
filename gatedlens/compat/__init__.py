"""Other libraries' own interfaces, for code that was written against them: one file a library."""

"""The built-in corpus: a generator of small Chinese stories and its language files."""

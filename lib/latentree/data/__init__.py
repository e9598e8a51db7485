"""What text there is: grammars, corpora, two-level processes; any document again by its number."""
